"""Sampling many: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dydit_scale.cli.main import main
from dydit_scale.data.shapes.motion import MOTIONS
from dydit_scale.parallel.world import World
from dydit_scale.sampling.generate import generate, sampler_timesteps
from dydit_scale.train.loop import train
from dydit_scale.workflows import sample_many as workflow
from dydit_scale.workflows import sample_set
from dydit_scale.workflows.runs import load_run, sample_config
from dydit_scale.workflows.sample import PackOptions
from dydit_scale.workflows.sample_many import Drawn, sample_many
from dydit_scale.workflows.sample_set import Subjects, Wanted
from tests.families.journey import NAMES, family_recipe, write_world
from tests.multiprocess.test_faults import PATIENCE, job, until
from tests.parallel.launch import free_port
from tests.sampling.adm import read_member

CONFIG = {"steps": 2, "batch": 4, "cfg": 2.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained runs by family, each under its name."""
    folder = tmp_path_factory.mktemp("runs")
    for family, adapter in (("dit", "none"), ("flux", "td_lora"), ("latte-classes", "none")):
        world = folder / f"{family}-world"
        write_world(world, family)
        train(family_recipe(world, family, adapter, run=str(folder / family)), World())
    return folder


def draw(run: Path, out: Path, num: int = 10, *, npz: bool = True, **options: Any) -> Drawn:
    config = {**CONFIG, **options.pop("config", {})}
    packing = options.pop("packing", PackOptions(fixed_tokens=options.pop("fixed_tokens", False)))
    wanted = Wanted(num=num, out=out, npz=out.with_suffix(".npz") if npz else None, **options)
    return sample_many(run, wanted, World(), config=config, packing=packing)


def block_times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "blocks").iterdir()}


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``set/`` and ``set.npz`` of ten pictures of the DiT run."""
    folder = tmp_path_factory.mktemp("made")
    assert draw(runs / "dit", folder / "set").drawn == 10
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def test_classes_take_turns(runs: Path, made: Path) -> None:
    npz = made / "set.npz"
    pixels, labels = read_member(npz, "arr_0"), read_member(npz, "arr_1")
    assert pixels.shape == (10, 16, 16, 3) and labels.tolist() == list(range(10))
    assert (made / "set" / "prompts.txt").read_text().split() == [str(i) for i in range(10)]
    run = load_run(runs / "dit")
    run.network.pack(sampler_timesteps(run.pipeline, config := sample_config(run, **CONFIG)))
    assert (generate(run.pipeline, NAMES[:10], config) == pixels).all()
    assert len(np.unique(pixels, axis=0)) == 10


def test_classes_are_balanced(runs: Path) -> None:
    subjects = sample_set.find_subjects(load_run(runs / "dit"), [])
    counts = Counter(subjects.of(range(3 * len(NAMES) + 5)))
    assert len(counts) == len(NAMES) and set(counts.values()) == {3, 4} and sum(counts.values()) == 3 * len(NAMES) + 5


def test_a_picture_does_not_depend_on_its_batch(runs: Path, made: Path, tmp_path: Path) -> None:
    pixels = read_member(made / "set.npz", "arr_0").astype(int)
    for batch in (1, 10):
        draw(runs / "dit", tmp_path / str(batch), config={"batch": batch})
        other = read_member(tmp_path / f"{batch}.npz", "arr_0").astype(int)
        assert np.abs(other - pixels).max() <= 1
    draw(runs / "dit", tmp_path / "seed", config={"seed": 1})
    assert np.abs(read_member(tmp_path / "seed.npz", "arr_0").astype(int) - pixels).max() > 1


def test_numbers_of_tokens_are_counted_alike_in_every_start(runs: Path, tmp_path: Path) -> None:
    draw(runs / "dit", tmp_path / "whole", fixed_tokens=True)
    draw(runs / "dit", tmp_path / "set", 4, fixed_tokens=True)
    assert draw(runs / "dit", tmp_path / "set", fixed_tokens=True).drawn == 6
    assert (tmp_path / "set.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with pytest.raises(ValueError, match="otherwise: fixed_tokens True, now False"):
        draw(runs / "dit", tmp_path / "set")


def test_it_goes_on_where_it_was_stopped(
    runs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, drawn = tmp_path / "set", workflow.generate, []

    def stopped(*args: Any, first: int, **options: Any) -> np.ndarray:
        drawn.append(first)
        if first == 8:
            raise KeyboardInterrupt
        return real(*args, first=first, **options)

    monkeypatch.setattr(workflow, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(runs / "dit", out)
    monkeypatch.setattr(workflow, "generate", real)
    (out / "blocks" / ".block-000002.safetensors.part").write_bytes(b"half")
    before = block_times(out)
    assert drawn == [0, 4, 8] and not (tmp_path / "set.npz").exists()
    assert draw(runs / "dit", out, config={"batch": None}).drawn == 2  # the batch of the set
    after = block_times(out)
    assert len(after) == 3 and after.items() >= {n: t for n, t in before.items() if n.startswith("block")}.items()
    assert (tmp_path / "set.npz").read_bytes() == (made / "set.npz").read_bytes()
    assert draw(runs / "dit", out).drawn == 0 and block_times(out) == after


def test_damaged_blocks_are_drawn_again(runs: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = sorted((copy / "set" / "blocks").iterdir())
    before = block_times(copy / "set")
    first.write_bytes(first.read_bytes()[:-5])
    data = bytearray(third.read_bytes())
    data[-5] ^= 1
    third.write_bytes(data)
    npz = (copy / "set.npz").read_bytes()
    (copy / "set.npz").unlink()
    assert draw(runs / "dit", copy / "set").drawn == 6
    assert capsys.readouterr().out.count("; it is drawn again") == 2
    assert (copy / "set.npz").read_bytes() == npz
    assert block_times(copy / "set")[second.name] == before[second.name]


def test_a_set_grows(runs: Path, copy: Path, tmp_path: Path) -> None:
    before = block_times(copy / "set")
    assert draw(runs / "dit", copy / "set", 21).drawn == 13  # the block that was not full, and what is new
    after = block_times(copy / "set")
    assert sorted(name for name in before if after[name] == before[name]) == sorted(before)[:2]
    draw(runs / "dit", tmp_path / "whole", 21)
    assert (copy / "set.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_smaller_set_is_the_beginning_of_the_one_that_is_there(runs: Path, copy: Path, made: Path) -> None:
    before = block_times(copy / "set")
    (copy / ".set.npz.part").write_bytes(b"left by a kill")
    assert draw(runs / "dit", copy / "set", 6).drawn == 0
    assert block_times(copy / "set") == before
    with np.load(copy / "set.npz") as small, np.load(made / "set.npz") as whole:
        assert (small["arr_0"] == whole["arr_0"][:6]).all()
    assert not (copy / ".set.npz.part").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"steps": 3}}, r"otherwise: steps 2, now 3\."),
        ({"config": {"seed": 5, "cfg": 1.5}}, r"otherwise: cfg 2\.0, now 1\.5; seed 0, now 5\."),
        ({"config": {"batch": 5}}, r"otherwise: batch 4, now 5\."),
        ({"config": {"sampler": "ddim"}}, r"otherwise: sampler None, now ddim\."),
        ({"prompts": ["3"]}, r"otherwise: prompts \d+:\w+, now 1:\w+\. .* another --out"),
    ],
)
def test_two_ways_of_drawing_are_not_mixed(runs: Path, copy: Path, options: dict[str, Any], said: str) -> None:
    before, npz = block_times(copy / "set"), (copy / "set.npz").stat().st_mtime_ns
    with pytest.raises(ValueError, match=said):
        draw(runs / "dit", copy / "set", **options)
    assert block_times(copy / "set") == before and (copy / "set.npz").stat().st_mtime_ns == npz


def test_other_weights_are_not_mixed_in(runs: Path, copy: Path, tmp_path: Path) -> None:
    run = load_run(runs / "dit").recipe
    other = replace(run, run=str(tmp_path / "longer"), train=replace(run.train, steps=3))
    train(other, World())
    with pytest.raises(ValueError, match=r"otherwise: checkpoint \w+, now \w+; step 2, now 3\."):
        draw(tmp_path / "longer", copy / "set")


def test_prompts_take_turns_and_become_files(runs: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", "two rings"]
    draw(runs / "flux", tmp_path / "set", 5, npz=False, pictures=True, prompts=prompts)
    assert (tmp_path / "set" / "prompts.txt").read_text().splitlines() == [*prompts, *prompts, prompts[0]]
    files = sorted((tmp_path / "set" / "pictures").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(5)]
    shown = [np.asarray(Image.open(path)) for path in files]
    draw(runs / "flux", tmp_path / "set", 5, prompts=prompts)
    assert (read_member(tmp_path / "set.npz", "arr_0") == shown).all()
    with np.load(tmp_path / "set.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0"]
    with pytest.raises(ValueError, match=r"holds 000003\.png and 1 more files that are none of these 3 pictures"):
        draw(runs / "flux", tmp_path / "set", 3, pictures=True, prompts=prompts)


def test_names_sort_as_numbers_do(tmp_path: Path) -> None:
    wanted = Wanted(num=1_000_001, out=tmp_path, npz=None, pictures=True)
    assert [wanted.picture_name(n, clip=False) for n in (7, 10**6)] == ["0000007.png", "1000000.png"]


def test_clips(runs: Path, tmp_path: Path) -> None:
    draw(runs / "latte-classes", tmp_path / "set", 3, pictures=True, config={"batch": 2})
    clips = read_member(tmp_path / "set.npz", "arr_0")
    assert clips.shape == (3, 8, 16, 16, 3) and read_member(tmp_path / "set.npz", "arr_1").tolist() == [0, 1, 2]
    assert len(MOTIONS) > 3
    files = sorted((tmp_path / "set" / "pictures").iterdir())
    assert [path.name for path in files] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    assert all(path.stat().st_size > 500 for path in files)


def test_a_batch_that_fits_is_found(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, subjects, tried = load_run(runs / "dit"), Subjects(["1"], None), []

    def hungry(pipe: Any, prompts: list[str], config: Any, **_: Any) -> None:
        assert len(prompts) == config.batch
        tried.append(config.batch)
        if config.batch > limit:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(workflow, "generate", hungry)
    for num, most, expected in ((1000, 40, [128, 64, 32]), (1000, 500, [128]), (9, 5, [9, 4])):
        limit = most
        tried.clear()
        assert workflow._batch_that_fits(run, sample_config(run), subjects, num) == expected[-1]
        assert tried == expected
    limit = 0
    with pytest.raises(ValueError, match="does not hold what drawing one picture needs"):
        workflow._batch_that_fits(run, sample_config(run), subjects, 3)


def test_a_batch_that_does_not_fit_is_told(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(workflow, "generate", hungry)
    with pytest.raises(ValueError, match="does not hold a batch of 4; choose a smaller --batch"):
        draw(runs / "dit", tmp_path / "set")


def test_a_full_disk_is_told_and_survived(
    runs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = os.fsync, tmp_path / "set"

    def full(handle: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{handle}")) == ".block-000001.safetensors.part":
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="the disk is full; free some space and run the command again"):
        draw(runs / "dit", out)
    monkeypatch.setattr(os, "fsync", real)
    assert draw(runs / "dit", out).drawn == 6
    assert (tmp_path / "set.npz").read_bytes() == (made / "set.npz").read_bytes()


def test_a_small_disk_is_told_before_the_work(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "_draw", lambda *_: pytest.fail("nothing is to be drawn"))
    with pytest.raises(ValueError, match=r"0\.0 GiB of pictures are to be written"):
        monkeypatch.setattr(sample_set.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 2 * 10 * 768 - 1))
        draw(runs / "dit", tmp_path / "set")


def test_folders_of_other_things_are_refused(runs: Path, made: Path, tmp_path: Path, copy: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds holiday\.png, but no sampling\.json"):
        draw(runs / "dit", tmp_path / "set")
    (copy / "set" / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match=r"sampling\.json: cannot be read"):
        draw(runs / "dit", copy / "set")
    with (made / "set" / workflow.LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process samples into it"):
            draw(runs / "dit", made / "set")


def test_mistakes_are_told_in_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz = ["--npz", str(tmp_path / "a.npz")]
    cases = [
        ("dit", ["--num", "0", *npz], "--num: expected 1 or more"),
        ("dit", ["--num", "4"], "give --npz FILE, --pictures, or both"),
        ("dit", npz, "say with --num how many"),
        ("dit", ["--num", "4", "--npz", str(tmp_path / "a.zip")], "a file that ends in .npz"),
        ("dit", ["--num", "4", "--fps", "0", *npz], "--fps: expected 1 to 50"),
        ("dit", ["--num", "4", "--prompt", "a red circel", *npz], "did you mean 'a red circle'"),
        ("dit", ["--num", "4", "--sampler", "euler", *npz], "sampler 'euler'"),
        ("dit", ["--num", "4", "--height", "18", *npz], "picture height 18"),
        ("flux", ["--num", "4", *npz], "its model reads text; give --prompts"),
        ("flux", ["--num", "4", "--prompt", "a\nb", *npz], r"prompt 'a\nb': expected one line of text"),
        ("flux", ["--num", "4", "--prompt", " ", *npz], "prompt ' ': expected one line of text"),
    ]
    for run, words, said in cases:
        assert main(["sample", str(runs / run), *words]) == 64, words
        assert said in capsys.readouterr().err, words
    assert list(tmp_path.iterdir()) == []


def test_the_command(runs: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz = tmp_path / "new" / "set.npz"
    words = [
        "sample",
        str(runs / "dit"),
        "--num",
        "10",
        "--npz",
        str(npz),
        "--steps",
        "2",
        "--cfg",
        "2",
        "--batch",
        "4",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "packed:" in said and f"{npz}: 10 pictures, 10 drawn now by one process in" in said
    assert npz.read_bytes() == (made / "set.npz").read_bytes()
    result = json.loads((tmp_path / "new" / "set" / "drawn.json").read_text())
    assert result["drawn"] == 10 and result["pictures_per_second"] == pytest.approx(10 / result["seconds"])
    assert main(words) == 0 and "all of them there already" in capsys.readouterr().out


def unplanned(*args: Any) -> torch.Tensor:
    """The sampler's timesteps without the last."""
    return sampler_timesteps(*args)[:-1]


def test_forwards_that_ran_masked_are_told(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "some forwards ran masked, at the static model's cost: timestep"
    words = ["sample", str(runs / "dit"), "--steps", "2", "--cfg", "2", "--batch", "4", "--share-scores"]
    few = [*words, "--prompt", NAMES[0], "--out", str(tmp_path / "few"), "--pack-weights", "int8", "--fused-tokens"]
    many = [*words, "--num", "4", "--npz", str(tmp_path / "set.npz")]
    assert main(few) == 0
    printed = capsys.readouterr().out
    assert said not in printed and "MLPs in fused kernels (they are for CUDA, and the model is on cpu)" in printed
    assert json.loads((tmp_path / "few" / "speed.json").read_text())["fallback"] is None
    monkeypatch.setattr("dydit_scale.workflows.sample.sampler_timesteps", unplanned)
    assert main(few) == 0 and said in capsys.readouterr().out
    assert "is not among the 1 packed" in json.loads((tmp_path / "few" / "speed.json").read_text())["fallback"]
    assert main(many) == 0 and said in capsys.readouterr().out


def test_ways_to_pack_are_part_of_how_a_set_was_made(runs: Path, tmp_path: Path) -> None:
    shared = PackOptions(share_scores=True, weights="int8")
    draw(runs / "dit", tmp_path / "set", 4, packing=shared)
    assert draw(runs / "dit", tmp_path / "set", packing=shared).drawn == 6
    draw(runs / "dit", tmp_path / "other")
    ours, plain = (read_member(tmp_path / f"{name}.npz", "arr_0").astype(int) for name in ("set", "other"))
    assert np.abs(ours - plain).max() > 0
    with pytest.raises(ValueError, match="otherwise: share_scores True, now None; weights int8, now None"):
        draw(runs / "dit", tmp_path / "set")
    with pytest.raises(ValueError, match="FluxPipeline runs the branches of guidance one after the other"):
        draw(runs / "flux", tmp_path / "flux", prompts=["a red circle"], packing=shared)
    with pytest.raises(ValueError, match="share_scores: expected two branches of guidance, got cfg 1"):
        draw(runs / "dit", tmp_path / "alone", config={"cfg": 1.0}, packing=shared)


@contextmanager
def two_ranks(launcher: str, words: list[str], log: Path) -> Iterator[list[psutil.Process]]:
    """Two ranks of the command ``words``, under torchrun or by themselves; yields those whose ends are awaited."""
    command = [sys.executable, "-m", "dydit_scale.cli.main", *words]
    with ExitStack() as stack:
        if launcher == "torchrun":
            command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), *command[1:]]
            started = [stack.enter_context(job(command, log))]
        else:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
            started = [
                stack.enter_context(job(command, log.with_suffix(f".{rank}"), RANK=rank, LOCAL_RANK=rank, **meeting))
                for rank in ("0", "1")
            ]
        yield [psutil.Process(process.pid) for process in started]


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def rank_one(started: list[psutil.Process]) -> psutil.Process:
    for process in [p for s in started for p in (s, *s.children(recursive=True))]:
        with suppress(psutil.Error):
            if process.environ().get("RANK") == "1":
                return process
    raise AssertionError("no rank 1 is running")


def many_words(runs: Path, npz: Path) -> list[str]:
    config = ["--steps", "40", "--batch", "2", "--cfg", "2"]
    return ["sample", str(runs / "dit"), "--num-samples", "81", "--npz", str(npz), *config]


def kill_one_of_two(launcher: str, runs: Path, npz: Path) -> dict[str, int]:
    """Start two ranks, kill one when some blocks are there, and see that both end; the blocks that stay."""
    blocks = npz.with_suffix("") / "blocks"
    with two_ranks(launcher, many_words(runs, npz), npz.with_suffix(".log")) as started:
        until(lambda: len(list(blocks.glob("block-*"))) >= 5 or not all(map(running, started)), "five blocks")
        os.kill(rank_one(started).pid, signal.SIGKILL)
        assert all(process.wait(PATIENCE) for process in started), "every process says that it failed"
    there = {path.name: path.stat().st_mtime_ns for path in blocks.glob("block-*")}
    assert 5 <= len(there) < 41 and not npz.exists()
    return there


@pytest.mark.launch
@pytest.mark.slow  # processes are started two times
@pytest.mark.timeout(900)
def test_two_ranks_of_which_one_is_killed_lose_no_picture(runs: Path, tmp_path: Path) -> None:
    npz = {name: tmp_path / f"{name}.npz" for name in ("two", "one", "unbroken")}
    there = kill_one_of_two("torchrun", runs, npz["two"])
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    with two_ranks("torchrun", many_words(runs, npz["two"]), tmp_path / "again.log") as started:
        assert not any(process.wait(PATIENCE) for process in started)
    assert there.items() <= block_times(tmp_path / "two").items()
    for name in ("one", "unbroken"):  # not in this process, where the checks of shapes take most of the time
        with job(
            [sys.executable, "-m", "dydit_scale.cli.main", *many_words(runs, npz[name])], tmp_path / f"{name}.log"
        ) as one:
            assert one.wait(PATIENCE) == 0
    assert npz["two"].read_bytes() == npz["one"].read_bytes() == npz["unbroken"].read_bytes()
    assert len(np.unique(read_member(npz["two"], "arr_0"), axis=0)) == 81


@pytest.mark.launch
@pytest.mark.slow  # processes are started
@pytest.mark.timeout(900)
def test_a_rank_leaves_by_itself_when_the_other_is_gone(runs: Path, tmp_path: Path) -> None:
    assert kill_one_of_two("none", runs, tmp_path / "set.npz")
