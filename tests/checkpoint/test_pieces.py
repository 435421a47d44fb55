"""Pieces cover every tensor once, and no more of them is read than is asked for."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dydit_scale.checkpoint import folder as folder_module
from dydit_scale.checkpoint import writer as writer_module
from dydit_scale.checkpoint.draft import Origin, write_manifest, write_parts
from dydit_scale.checkpoint.files import file_digest
from dydit_scale.checkpoint.folder import abandon, commit
from dydit_scale.checkpoint.manifest import Damaged, digest, find_damage, read_manifest
from dydit_scale.checkpoint.parts import Part, Parts, Stage, whole
from dydit_scale.checkpoint.state import capture, of_kind, restore
from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint, open_checkpoint
from dydit_scale.checkpoint.tensor_file import DTYPES, TensorFile
from dydit_scale.checkpoint.writer import CheckpointWriter, SaveReport, save_checkpoint
from dydit_scale.parallel.lazy import Renamed
from dydit_scale.parallel.world import ONE_PROCESS
from tests.checkpoint.resume import gathered, go, start

FULL = torch.arange(24.0).reshape(2, 3, 4)


def written(folder: Path, *ranks: Parts) -> Path:
    """A checkpoint in the pieces of several ranks."""
    folder.mkdir()
    for rank, parts in enumerate(ranks):
        write_parts(folder, rank, 1, parts)
    write_manifest(folder, Origin(1, {}, len(ranks), "zero2"))
    return folder


def cut(*edges: int, full: torch.Tensor = FULL) -> list[Parts]:
    flat = full.flatten()
    return [{"x": Part(flat[a:b], full.shape, a)} for a, b in itertools.pairwise(edges)]


def test_pieces_of_any_cut_are_put_together(tmp_path: Path) -> None:
    for n, edges in enumerate(((0, 24), (0, 7, 24), (0, 5, 6, 19, 24), (0, 12, 12, 24))):
        parts = [p if p["x"].values.numel() else {} for p in cut(*edges)]
        path = written(tmp_path / str(n), *parts)
        assert find_damage(path) is None
        tensors = open_checkpoint(path).tensors
        assert torch.equal(tensors["x"], FULL)
        for first in range(24):
            for last in range(first, 25):
                assert torch.equal(tensors.flat("x", first, last - first), FULL.flatten()[first:last])  # type: ignore[attr-defined]


def test_what_one_rank_holds_whole_is_an_ordinary_file_of_every_type(tmp_path: Path) -> None:
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(2, dtype=torch.float64)}
    tensors |= {"scalar": torch.tensor(4), "empty": torch.zeros(0, 3), "across": torch.arange(6.0).view(2, 3).T}
    path = save_checkpoint(tmp_path, 1, tensors, {})
    theirs = safetensors.torch.load_file(path / "rank-00000-00001.safetensors")
    ours = open_checkpoint(path).tensors
    assert len(DTYPES) == 12 and set(theirs) == set(ours) == set(tensors)
    for name, tensor in tensors.items():
        for found in (theirs[name], ours[name]):
            assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.float()), name
    with pytest.raises(RuntimeError, match=r"complex64 is none of"):
        save_checkpoint(tmp_path, 2, {"x": torch.zeros(2, dtype=torch.complex64)}, {})


@pytest.mark.parametrize(
    "ranks,message",
    [
        (cut(0, 7) + cut(9, 24), "x: elements 7 to 8 of 24 are missing"),
        (cut(0, 9) + cut(7, 24), "x: elements 7 to 8 of 24 are there twice"),
        (cut(3, 24), "x: elements 0 to 2 of 24 are missing"),
        (cut(0, 7), "x: expected pieces of 24 elements, got 7"),
        (cut(0, 24) + cut(0, 24), "x: elements 0 to 23 of 24 are there twice"),
        (cut(0, 7) + cut(7, 24, full=FULL.view(4, 6)), "x: one rank has"),
        (cut(0, 7) + cut(7, 24, full=FULL.double()), "x: one rank has"),
    ],
)
def test_pieces_that_do_not_fit_are_not_committed(tmp_path: Path, ranks: list[Parts], message: str) -> None:
    with pytest.raises(Damaged, match=message):
        written(tmp_path / "x", *ranks)


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "x", *cut(0, 7, 24)) / "manifest.json"
    data, spaces = path.read_bytes(), 0
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if find_damage(path.parent) is None:
            spaces += 1
            assert data[place : place + 1].isspace() and json.loads(changed) == json.loads(data)
    assert spaces < 5


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = torch.arange(10000.0)
    save_checkpoint(tmp_path, 1, {"param.a": big, "param.b": big, "ema.a": -big}, {})
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    read: list[tuple[str, int, int]] = []
    real = TensorFile.read_into

    def watched(self: TensorFile, name: str, start: int, out: torch.Tensor) -> None:
        read.append((name, start, len(out)))
        real(self, name, start, out)

    monkeypatch.setattr(TensorFile, "read_into", watched)
    tensors = of_kind(checkpoint, "param")
    assert list(tensors) == ["a", "b"] and tensors.shape("a") == (10000,) and "a" in tensors and "c" not in tensors
    assert read == []
    assert torch.equal(tensors.flat("a", 17, 5), big[17:22]) and torch.equal(tensors["b"], big)
    assert read == [("param.a", 17, 5), ("param.b", 0, 10000)]
    assert torch.equal(Renamed({"x": big}, {"y": "x"}).flat("y", 3, 2), big[3:5])
    with pytest.raises(KeyError):
        tensors["c"]


def test_a_file_changed_after_it_was_verified_is_an_error_not_a_wrong_tensor(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"param.a": torch.zeros(8)}, {})
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    safetensors.torch.save_file({"param.a": torch.zeros(7)}, path / "rank-00000-00001.safetensors")
    with pytest.raises(ValueError, match=r"param\.a: expected 8 elements"):
        checkpoint.tensors["param.a"]


def older(folder: Path, tensors: dict[str, torch.Tensor], meta: dict) -> Path:
    """A canon-v1 checkpoint: whole tensors in numbered files, a manifest without tensors."""
    path = folder / "step-0000000003"
    path.mkdir(parents=True)
    names, files = list(tensors), []
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = path / f"state-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name].contiguous() for name in chosen}, file)
        files.append({"name": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)})
    body = {"format": "canon-v1", "step": 3, "written": "2026-01-01T00:00:00Z", "packages": {"torch": "2"}}
    body |= {"meta": meta, "files": files}
    (path / "manifest.json").write_text(json.dumps(body | {"digest": digest(body)}))
    return path


def test_older_checkpoints_are_read(tmp_path: Path) -> None:
    ema = start(ONE_PROCESS, "single")
    go(ema, range(3))
    tensors = gathered(ema)
    path = older(tmp_path, tensors, {"consumed": 24})
    assert read_manifest(path).world_size is None
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.meta == {"consumed": 24} and set(checkpoint.tensors) == set(tensors)
    other = start(ONE_PROCESS, "single", spoiled=True)
    restore(checkpoint, other.engine, other)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in gathered(other).items())
    data = bytearray((path / "state-00002-of-00002.safetensors").read_bytes())
    data[-1] ^= 4
    (path / "state-00002-of-00002.safetensors").write_bytes(data)
    assert "state-00002-of-00002.safetensors: its sha256" in (find_damage(path) or "")


def test_restore_takes_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No full tensor that was read is alive when the next one is."""
    ema = start(ONE_PROCESS, "single")
    go(ema, range(2))
    save_checkpoint(tmp_path, 2, capture(ema.engine, ema), {})
    checkpoint = load_checkpoint(tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    alive: list[torch.Tensor] = []
    known: list[weakref.ref] = []
    real = type(checkpoint.tensors).flat

    def watched(self: object, name: str, start: int, numel: int) -> torch.Tensor:
        alive[:] = [tensor for ref in known if (tensor := ref()) is not None]
        assert not alive, name
        out = real(self, name, start, numel)  # type: ignore[arg-type]
        known.append(weakref.ref(out))
        return out

    monkeypatch.setattr(type(checkpoint.tensors), "flat", watched)
    other = start(ONE_PROCESS, "single", spoiled=True)
    restore(checkpoint, other.engine, other)
    assert len(known) == len(checkpoint.tensors)
    a, b = gathered(ema), gathered(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stage_keeps_the_values_and_its_memory() -> None:
    stage, tensor = Stage(), torch.arange(6.0).view(2, 3)
    first = stage.copy(whole({"x": tensor.T}))["x"]
    tensor += 1
    assert torch.equal(first.values, tensor.T - 1) and first.shape == (3, 2)
    again = stage.copy(whole({"x": tensor.T}))["x"]
    assert again.values.data_ptr() == first.values.data_ptr() and torch.equal(again.values, tensor.T)


def test_training_goes_on_while_a_save_is_written(tmp_path: Path) -> None:
    """What is saved are the values at the call, whatever happens to the tensors then."""
    tensor, reports = torch.zeros(1 << 16), []
    writer = CheckpointWriter(tmp_path, tell=reports.append, keep=9)
    for step in (1, 2, 3):
        tensor.fill_(step)
        writer.save(step, whole({"param.x": tensor}), {})
        tensor.fill_(-1)
        assert len(reports) == step - 1
    writer.wait()
    writer.wait()
    assert [report.step for report in reports] == [1, 2, 3] and not any(report.problem for report in reports)
    assert all(report.total_seconds > 0 and report.bytes > tensor.nbytes for report in reports)
    for step in (1, 2, 3):
        checkpoint = load_checkpoint(tmp_path, step)
        assert checkpoint is not None and checkpoint.tensors["param.x"].unique().tolist() == [step]


def test_a_disk_that_hangs_fails_the_save_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "checkpoint.writing=2:hang,checkpoint.before_commit=3:hang")
    reports: list[SaveReport] = []
    writer = CheckpointWriter(tmp_path, tell=reports.append, limit=0.5)
    for step in (1, 2, 3, 4):
        writer.save(step, whole({"param.x": torch.full((9,), float(step))}), {})
    writer.wait()
    assert [report.problem == "" for report in reports] == [True, False, False, True]
    assert "not written within 0.5 s; does the disk hang?" in reports[1].problem
    assert "not committed within" in reports[2].problem and [report.failures for report in reports] == [0, 1, 2, 0]
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["1", "4"]
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.tensors["param.x"].unique().tolist() == [4]
    assert not list(tmp_path.glob(".*"))


class Hanging:
    """A disk whose folder syncs hang until it is told to go on."""

    def __init__(self, patch: pytest.MonkeyPatch, module: object, name: str, at: int) -> None:
        self.go_on, self.ended, self.calls = threading.Event(), threading.Event(), 0
        self.real, self.at = getattr(module, name), at
        patch.setattr(module, name, self)

    def __call__(self, *args: object, **options: object) -> object:
        self.calls += 1
        if self.calls != self.at:
            return self.real(*args, **options)
        self.go_on.wait(20)
        try:
            return self.real(*args, **options)
        finally:
            self.ended.set()


@pytest.mark.parametrize("deleting", [False, True], ids=["afterwards", "while the draft is deleted"])
def test_a_commit_that_comes_too_late_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleting: bool
) -> None:
    """The thread hangs in the commit itself; the draft that is given up must not get the name of a checkpoint."""
    save_checkpoint(tmp_path, 1, {"param.x": torch.zeros(3)}, {})
    hanging = Hanging(monkeypatch, writer_module, "commit", 1)
    real = shutil.rmtree

    def slow(path: Path, **options: bool) -> None:
        if deleting and path.name.startswith(".tmp-step-0000000002"):
            next(path.glob("*.safetensors")).unlink()
            hanging.go_on.set()
            hanging.ended.wait(20)
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    reports: list[SaveReport] = []
    writer = CheckpointWriter(tmp_path, tell=reports.append, limit=0.3)
    writer.save(2, whole({"param.x": torch.ones(3)}), {})
    writer.wait()
    assert "not committed within 0.3 s" in reports[0].problem
    hanging.go_on.set()
    assert hanging.ended.wait(20)
    assert [path.name for path in tmp_path.iterdir() if path.name != "latest"] == ["step-0000000001"]
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_commit_given_up_while_it_replaces_another_leaves_that_one(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"param.x": torch.zeros(3)}, {})
    draft = tmp_path / ".tmp-step-0000000001.0"
    draft.mkdir()

    def given_up(folder: Path) -> None:
        abandon(draft)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(folder_module, "sync_folder", given_up)
        commit(draft, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{draft.name}.abandoned", "latest", path.name]


def test_a_save_committed_just_before_it_is_given_up_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread hangs behind the rename. When it wakes up it must not touch what came since."""
    reports: list[SaveReport] = []
    writer = CheckpointWriter(tmp_path, tell=reports.append, limit=0.3, keep=9)
    real, hang, ended = folder_module.rename_synced, threading.Event(), threading.Event()
    before = set(threading.enumerate())

    def behind(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "step-0000000002":
            hang.wait(20)
            ended.set()

    monkeypatch.setattr(folder_module, "rename_synced", behind)
    for step in (1, 2, 3):
        writer.save(step, whole({"param.x": torch.full((3,), float(step))}), {})
    writer.wait()
    hang.set()
    assert ended.wait(20)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert [report.problem for report in reports] == ["", "", ""] and reports[1].path is not None
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["1", "2", "3"]
    assert (tmp_path / "latest").read_text() == "step-0000000003\n"


@pytest.mark.parametrize("point", ["writing", "before_commit"])
def test_a_hung_disk_holds_training_up_for_the_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", f"checkpoint.{point}=1:hang")
    writer = CheckpointWriter(tmp_path, limit=1.0)
    writer.save(1, whole({"param.x": torch.zeros(3)}), {})
    began = time.monotonic()
    writer.wait()
    assert 0.9 < time.monotonic() - began < 2.5
    began = time.monotonic()
    writer.save(2, whole({"param.x": torch.zeros(3)}), {})
    assert time.monotonic() - began < 0.7, "the old thread is not waited for again"
    writer.wait()
    assert [path.name[-1] for path in tmp_path.glob("step-*")] == ["2"]


def test_a_stage_has_one_block_of_memory_for_each_type() -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3).T,
        "b": torch.arange(5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 2),
        "d": torch.tensor(7.0),
        "e": torch.ones(3, dtype=torch.bfloat16),
    }
    stage = Stage()
    copies = stage.copy(whole(tensors))
    assert all(torch.equal(copies[name].values, tensor) for name, tensor in tensors.items())
    storages = {name: part.values.untyped_storage() for name, part in copies.items()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
    assert sorted(sizes.values()) == [8 * 2, 7 * 4]
    first = copies["a"].values.data_ptr()
    assert stage.copy(whole(tensors))["a"].values.data_ptr() == first
    other = stage.copy(whole({"a": torch.ones(9)}))
    assert list(other) == ["a"] and other["a"].values.tolist() == [1] * 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_stage_for_cuda_is_pinned_and_reused() -> None:
    stage, tensor = Stage(), torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    first = stage.copy(whole({"x": tensor}))["x"].values
    tensor += 1
    assert first.is_pinned() and torch.equal(first, (tensor - 1).cpu())
    assert stage.copy(whole({"x": tensor}))["x"].values.data_ptr() == first.data_ptr()


def test_every_nth_is_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, {"param.x": torch.zeros(1)}, {}, keep=2, keep_every=3)
    assert [path.name[-1] for path in sorted(tmp_path.glob("step-*"))] == ["3", "6", "7"]


def test_bad_settings_are_named(tmp_path: Path) -> None:
    for wrong in ({"keep": 0}, {"keep_every": -1}, {"failures": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            CheckpointWriter(tmp_path, **wrong)  # type: ignore[arg-type]
