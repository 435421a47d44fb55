"""``dydit ckpt``: tables, verdicts, and weights taken out of checkpoints of ours and of other systems."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from dydit_scale.checkpoint.parts import Part, Parts
from dydit_scale.checkpoint.writer import save_checkpoint
from dydit_scale.cli.main import main
from dydit_scale.parallel.world import ONE_PROCESS
from dydit_scale.train.attempt import take_folder
from tests.parallel.toy import config_of, losses_of, make_toy, toy_engine

X, Y = torch.arange(6.0).view(2, 3), torch.ones(4)


def ckpt(*words: object) -> int:
    return main(["ckpt", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints 1 to 4."""
    for step in (1, 2, 3, 4):
        tensors = {
            "param.x": X + step,
            "param.y": Y,
            "ema.x": X - step,
            "ema.y": Y,
            "count.optimizer": torch.tensor(step),
        }
        save_checkpoint(tmp_path / "run" / "checkpoints", step, tensors, {}, keep=9)
    return tmp_path / "run"


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_and_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    spoil(folder / "step-0000000002" / "rank-00000-00001.safetensors")
    (folder / "step-0000000003" / "manifest.json").unlink()
    (folder / ".tmp-step-0000000005.abc").mkdir()
    for place in (run, folder):
        assert ckpt("ls", place) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["checkpoint", "written", "(UTC)", "size", "by", "tensors", "pieces"]
        assert [row.split()[0][-3:] for row in rows] == ["001", "002", "003", "004", "abc"]
        assert rows[0].split()[-6:] == ["1", "x", "unknown", "5", "5", "whole"] and "0.0 MiB" in rows[0]
        assert rows[1].endswith("whole"), "contents are not read"
        assert rows[2].endswith("manifest.json is missing") and rows[4].endswith("unfinished")
    assert ckpt("verify", run) == 1
    said = capsys.readouterr().out.splitlines()
    assert "step-0000000001: whole" in said[0] and "sha256 differs" in said[1] and "manifest.json is missing" in said[2]
    assert ckpt("verify", run, 4) == 0 and ckpt("verify", run, 2) == 1
    assert ckpt("verify", run, 9) == 64 and "no checkpoint of step 9; there are" in capsys.readouterr().err
    assert ckpt("ls", run / "nothing") == 64 and "expected the folder of a run" in capsys.readouterr().err


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt("prune", run, "--keep", 1, "--keep-every", 2) == 0
    assert "deleted step-0000000001, step-0000000003" in capsys.readouterr().out
    assert sorted(path.name[-1] for path in (run / "checkpoints").glob("step-*")) == ["2", "4"]
    assert ckpt("prune", run, "--keep", 0) == 64


def test_prune_leaves_a_run_alone_that_trains(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = take_folder(run, wait=0)
    for place in (run, run / "checkpoints"):
        assert ckpt("prune", place, "--keep", 1) == 64
        assert "in use by process" in capsys.readouterr().err
    assert len(list((run / "checkpoints").glob("step-*"))) == 4
    attempt.end("done")
    assert ckpt("prune", run, "--keep", 1) == 0 and len(list((run / "checkpoints").glob("step-*"))) == 1


def test_ours_to_one_plain_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run / "checkpoints" / "step-0000000004"
    for n, (words, expected) in enumerate((
        ([run], X - 4),
        ([run, "--weights", "param"], X + 4),
        ([run, "--step", 2], X - 2),
        ([last, "--weights", "ema"], X - 4),
    )):  # fmt: skip
        assert ckpt("convert", *words[:1], tmp_path / f"{n}.safetensors", *words[1:]) == 0
        found = load_file(tmp_path / f"{n}.safetensors")
        assert set(found) == {"x", "y"} and torch.equal(found["x"], expected) and torch.equal(found["y"], Y)
    assert "step 4, ema weights" in capsys.readouterr().out
    for words, message in (
        ([run, tmp_path / "0.safetensors"], "exists already"),
        ([tmp_path, tmp_path / "n"], "no checkpoint of dydit_scale"),
        ([last, tmp_path / "n", "--step", 1], "a step belongs to a run"),
        ([tmp_path / "no", tmp_path / "n"], "expected the folder of a checkpoint or a run"),
        ([run, tmp_path / "n", "--prefix", "z."], "no name begins with 'z.'; the first is 'x'"),
    ):
        assert ckpt("convert", *words) == 64 and message in capsys.readouterr().err
    spoil(last / "rank-00000-00001.safetensors")
    assert ckpt("convert", last, tmp_path / "n") == 64 and "sha256 differs" in capsys.readouterr().err
    assert not (tmp_path / "n").exists() and not list(tmp_path.glob(".*"))


def test_pieces_are_put_together(tmp_path: Path) -> None:
    from tests.checkpoint.test_pieces import written

    ranks: list[Parts] = [{"param.x": Part(X.flatten()[:4], X.shape)}, {"param.x": Part(X.flatten()[4:], X.shape, 4)}]
    assert ckpt("convert", written(tmp_path / "copy", *ranks), tmp_path / "out") == 0
    assert torch.equal(load_file(tmp_path / "out")["x"], X)
    assert ckpt("convert", tmp_path / "copy", tmp_path / "n", "--weights", "ema") == 64


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_deepspeeds_own_checkpoints(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    engine: Any = toy_engine(config_of(name), ONE_PROCESS)
    losses_of(engine, range(2))
    engine.deepspeed.save_checkpoint(str(tmp_path / "theirs"), tag="global_step2")
    for n, source in enumerate((tmp_path / "theirs", tmp_path / "theirs" / "global_step2")):
        out = tmp_path / f"{n}.safetensors"
        assert ckpt("convert", source, out) == 64
        assert "this is a DeepSpeed checkpoint, which is pickle" in capfd.readouterr().err and not out.exists()
        assert ckpt("convert", source, out, "--trust-pickle") == 0
        found = load_file(out)
        assert all(torch.equal(found[key], tensor) for key, tensor in engine.trainable_state().items())
        assert set(found) == {*engine.network.state_dict()}, "frozen weights and buffers too"
        assert torch.equal(found["enter.weight"], make_toy().enter.weight)


def test_torch_distributed_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"model": {"x": X, "y": {"z": Y.bfloat16()}}, "optimizer": {"x": X * 2, "note": "kept as pickle"}}
    dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    assert ckpt("convert", tmp_path / "theirs", tmp_path / "out") == 64
    assert "a torch.distributed checkpoint, which is pickle" in capsys.readouterr().err
    assert ckpt("convert", tmp_path / "theirs", tmp_path / "out", "--trust-pickle") == 0
    found = load_file(tmp_path / "out")
    assert set(found) == {"x", "y.z"} and torch.equal(found["x"], X) and found["y.z"].dtype == torch.bfloat16
    assert ckpt("convert", tmp_path / "theirs", tmp_path / "moments", "--trust-pickle", "--prefix", "optimizer.") == 0
    assert torch.equal(load_file(tmp_path / "moments")["x"], X * 2)


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_without_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sung = tmp_path / "sung"
    for folder, files in (
        ("dcp", [".metadata"]),
        ("tag", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]),
        ("nothing", ["model.pt", "latest"]),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_bytes(pickle.dumps(Canary(sung)))
        assert ckpt("convert", tmp_path / folder, tmp_path / "out") == 64
        expected = "no checkpoint of" if folder == "nothing" else "add --trust-pickle"
        assert expected in capsys.readouterr().err
    assert ckpt("ls", tmp_path / "dcp") == 64 and ckpt("verify", tmp_path / "tag") == 64
    assert not sung.exists()
    pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    assert sung.exists(), "the canary can sing"
