"""Checkpoints survive kills, damage and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_scale.checkpoint import draft, files, store, writer
from dydit_scale.checkpoint import folder as folder_module
from dydit_scale.checkpoint import manifest as manifest_module
from dydit_scale.checkpoint.folder import checkpoint_path, list_checkpoints, prune, recover
from dydit_scale.checkpoint.manifest import digest, find_damage
from dydit_scale.checkpoint.store import CheckpointError, load_checkpoint
from dydit_scale.checkpoint.tensor_file import Written
from dydit_scale.checkpoint.writer import save_checkpoint

META = {"consumed": 24, "recipe": {"lr": 1e-4, "widths": [1, 2]}, "name": "run ü"}


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {
        "param.a": torch.full((3, 5), float(step)),
        "param.b": torch.arange(4, dtype=torch.bfloat16),
        "param.transposed": torch.arange(6.0).reshape(2, 3).T,
        "param.empty": torch.zeros(0, 2),
        "count.optimizer": torch.tensor(step),
    }


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, tensors_of(step), META, keep=keep)


def loaded_step(folder: Path) -> int:
    checkpoint = load_checkpoint(folder, repair=True)
    assert checkpoint is not None
    expected = tensors_of(checkpoint.step)
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())
    return checkpoint.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "deep" / "checkpoints", 100)
    assert path == tmp_path / "deep" / "checkpoints" / "step-0000000100"
    checkpoint = load_checkpoint(path.parent)
    assert checkpoint is not None and checkpoint.path == path
    assert checkpoint.step == 100 and checkpoint.meta == META
    assert loaded_step(path.parent) == 100
    assert all(checkpoint.tensors[name].dtype == tensor.dtype for name, tensor in tensors_of(100).items())
    assert names(path) == ["manifest.json", STATE]
    assert (path.parent / "latest").read_text() == "step-0000000100\n"


def test_large_states_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "MAX_FILE_BYTES", 64)
    path = save(tmp_path, 1)
    assert len(list(path.glob("*.safetensors"))) == 2
    assert loaded_step(tmp_path) == 1


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def _edit_meta(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["meta"]["consumed"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest))


STATE = "rank-00000-00001.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda path: _flip(path / STATE), "rank-00000-00001.* sha256 differs"),
    "short": (lambda path: os.truncate(path / STATE, 100), "rank-00000-00001.* expected .* bytes, got 100"),
    "empty": (lambda path: (path / STATE).write_bytes(b""), "rank-00000-00001.* got 0"),
    "gone": (lambda path: (path / STATE).unlink(), "rank-00000-00001.* is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "short manifest": (lambda path: os.truncate(path / "manifest.json", 100), "manifest.json: not readable"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json: not readable"),
    "edited manifest": (_edit_meta, "manifest.json: its digest does not fit"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    save(tmp_path, 1)
    spoil(save(tmp_path, 2))
    with pytest.warns(RuntimeWarning, match=f"CHECKPOINT DAMAGED.*step-0000000002: {message}"):
        assert loaded_step(tmp_path) == 1
    assert names(tmp_path) == ["latest", "step-0000000001", "step-0000000002.corrupt"]
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2
    spoil(checkpoint_path(tmp_path, 2))
    with pytest.warns(RuntimeWarning):
        assert loaded_step(tmp_path) == 1
    assert "step-0000000002.corrupt1" in names(tmp_path)


def test_no_fresh_start_over_damaged_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2):
        _flip(save(tmp_path, step) / STATE)
    for _ in range(2):  # the second start finds them renamed
        with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"whole, damaged: .*step-0000000001"):
            warnings.simplefilter("ignore")
            load_checkpoint(tmp_path, repair=True)
    assert names(tmp_path) == ["latest", "step-0000000001.corrupt", "step-0000000002.corrupt"]


def test_nothing_committed_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent") is None
    (tmp_path / ".tmp-step-0000000001").mkdir()
    (tmp_path / "step-1").mkdir()
    assert load_checkpoint(tmp_path) is None and list_checkpoints(tmp_path) == []


def test_a_wanted_step_is_that_step_or_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    older = load_checkpoint(tmp_path, 1)
    assert older is not None and older.step == 1
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are .*step-0000000002"):
        load_checkpoint(tmp_path, 3)
    _flip(checkpoint_path(tmp_path, 2) / STATE)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load_checkpoint(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000000001", "step-0000000002"]


def test_the_last_whole_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "3"]
    os.truncate(checkpoint_path(tmp_path, 3) / STATE, 5)
    save(tmp_path, 4)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "3", "4"], "a damaged one does not count"
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 5, keep=0)


def test_a_run_that_went_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    with pytest.warns(RuntimeWarning, match=r"later than step-0000000002"):
        path = save_checkpoint(tmp_path, 2, {"param.new": torch.ones(1)}, {})
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.path == path and list(checkpoint.tensors) == ["param.new"]
    assert names(tmp_path) == ["latest", "step-0000000001", "step-0000000002", "step-0000000003.left"]


class Killed(BaseException):
    """Ends a save where it is, as a kill does: no handler for Exception sees it."""


class AtOnce:
    """A thread that runs within ``start``, where an exception of it is seen."""

    def __init__(self, *, target: Callable[..., object], args: tuple[object, ...], **options: object) -> None:
        self.target, self.args = target, args

    def start(self) -> None:
        self.target(*self.args)

    def join(self, timeout: float) -> None: ...

    def is_alive(self) -> bool:
        return False


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_killed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """A kill before any write, rename or sync of a save leaves the old or the new checkpoint, and a usable folder."""
    moments = 0
    while True:
        folder = tmp_path / f"{moments}"
        save(folder, 1)
        with monkeypatch.context() as patch:
            patch.setattr(writer.threading, "Thread", AtOnce)
            calls = _kill_at(patch, moments)
            try:
                save(folder, 1 if again else 2, keep=1)
                finished = True
            except Killed:
                finished = False
        step = loaded_step(folder)
        assert step == 1 or (not again and step == 2)
        assert loaded_step(folder) == step
        save(folder, 3, keep=1)
        assert names(folder) == ["latest", "step-0000000003"]
        if finished:
            break
        moments += 1
    assert moments == len(calls) >= 12


def _kill_at(patch: pytest.MonkeyPatch, moment: int) -> list[str]:
    calls: list[str] = []

    def before(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if len(calls) == moment:
                raise Killed(name)
            calls.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "open"):
        patch.setattr(os, name, before(name, getattr(os, name)))
    patch.setattr(shutil, "rmtree", before("rmtree", shutil.rmtree))
    return calls


def test_no_space_left_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step 2 was not written.*disk full.* MiB needed, .* MiB free"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-0000000001"]
    assert loaded_step(tmp_path) == 1
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_is_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 1)
    if not foreseen:  # another process takes the space after the check
        monkeypatch.setattr(writer, "check_space", lambda folder, needed: None)
    with pytest.raises(
        CheckpointError, match=r"step 2 was not written.*disk full.*3\.\d MiB needed, [012]\.\d MiB free"
    ):
        save_checkpoint(folder, 2, {"param.a": torch.zeros(3 << 18)}, {})
    assert names(folder) == ["latest", "step-0000000001"]
    assert loaded_step(folder) == 1
    save(folder, 2)
    assert loaded_step(folder) == 2


def test_meta_must_be_json(tmp_path: Path) -> None:
    for meta in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(CheckpointError, match="step 1 was not written"):
            save_checkpoint(tmp_path, 1, tensors_of(1), meta)
    assert names(tmp_path) == []


def test_what_is_read_back_must_be_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = draft.write_tensor_file

    def lossy(path: Path, *args: Any, **options: Any) -> Written:
        written = real(path, *args, **options)
        _flip(path)
        return written

    monkeypatch.setattr(draft, "write_tensor_file", lossy)
    with pytest.raises(CheckpointError, match=r"read back differently.*sha256"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    """A training may be at work in the folder."""
    save(tmp_path, 1)
    _flip(save(tmp_path, 2) / STATE)
    shutil.copytree(checkpoint_path(tmp_path, 1), tmp_path / ".trash-step-0000000003")
    before = names(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"DAMAGED, taking the one before: .*step-0000000002.*sha256 differs"):
        checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        load_checkpoint(tmp_path, 3)
    assert names(tmp_path) == before


@pytest.mark.parametrize("moment", ["listed", "read"])
def test_a_checkpoint_pruned_while_it_is_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    name = {"listed": "read_manifest", "read": "check_content"}[moment]
    real = getattr(store, name)

    def late(path: Path, *args: Any) -> object:
        if path.name.endswith("2"):
            shutil.rmtree(path, ignore_errors=True)
        return real(path, *args)

    monkeypatch.setattr(store, name, late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_what_rotted_does_not_count_as_kept(tmp_path: Path) -> None:
    """Its sizes are right, so only its digests tell."""
    for step in (1, 2):
        save(tmp_path, step)
    _flip(checkpoint_path(tmp_path, 2) / STATE)
    folder_module._READ.clear()  # as in a process that did not write them
    with pytest.warns(RuntimeWarning, match=r"step-0000000002: damaged, not counted.*sha256 differs"):
        assert prune(tmp_path, keep=1) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 3)
        assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "2", "3"]
        save(tmp_path, 4)
    # now two whole ones are newer: the last good one before the damaged one may go, and so may the damaged one
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "4"]


def test_each_checkpoint_is_hashed_once_for_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = manifest_module.check_content
    monkeypatch.setattr(
        manifest_module, "check_content", lambda path, *args: (read.append(path.name[-1]), real(path, *args))
    )
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert read == [], "it was read back when it was written"
    folder_module._READ.clear()
    for step in (4, 5):
        save(tmp_path, step, keep=3)
    assert read == ["3", "2"]


def test_other_formats_are_not_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": "canon-v9"}
    body = {key: value for key, value in manifest.items() if key != "digest"}
    (path / "manifest.json").write_text(json.dumps(body | {"digest": digest(body)}))
    message = r"format canon-v9, this version reads canon-v2 and canon-v1; update dydit_scale"
    for repair in (False, True):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path, repair=repair)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, 2)
    assert message in (find_damage(path) or "")
    prune(tmp_path, keep=1)
    path.rename(tmp_path / ".trash-step-0000000002")
    recover(tmp_path)
    assert names(tmp_path) == ["latest", "step-0000000001", "step-0000000002"], "nothing is renamed or deleted"
