"""Checkpoints on disk: written aside, committed by a rename, verified before use; safetensors and JSON, never pickle.

Format canon-v1, the same for every engine and number of ranks:

    checkpoints/step-0000001000/state-00001-of-00002.safetensors ...   full tensors
    checkpoints/step-0000001000/manifest.json                          step, meta, size and sha256 of every file
    checkpoints/latest                                                 the newest name: a hint for people, never read

A folder named ``step-...`` is complete, for it gets its name last. What is unfinished is named ``.tmp-...``, what was
found damaged ``step-....corrupt``, what a run went back from ``step-....left``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
from torch import Tensor

from dydit_scale.checkpoint.files import check_space, file_digest, rename_synced, sync_folder, write_synced
from dydit_scale.parallel.reduce import max_flag
from dydit_scale.parallel.world import ONE_PROCESS, World, broadcast_object

FORMAT = "canon-v1"
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 1 << 30  # one file is serialised in memory at a time
_NAME = re.compile(r"step-(\d{10,})")
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank alike."""


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU
    meta: dict[str, Any]
    path: Path


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"step-{step:010d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in ``folder``, oldest first; not verified."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    world: World = ONE_PROCESS,
) -> Path:
    """Write and commit one checkpoint; rank 0 writes its ``tensors`` and ``meta`` (JSON), the others wait. Collective.

    The newest ``keep`` complete checkpoints stay, older ones go. One process at a time may write to ``folder``.

    Raises CheckpointError on every rank if anything fails; then the unfinished folder is removed and the previous
    checkpoints are as they were.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep: expected >= 1, got {keep}")
    return _on_main(world, lambda: _save(folder, step, tensors, meta, keep))


def _save(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> Path:
    target, draft = checkpoint_path(folder, step), folder / f".tmp-{checkpoint_path(folder, step).name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        check_space(folder, _bytes_of(tensors))
        draft.mkdir()
        files = _write_tensors(draft, tensors)
        _write_manifest(draft, step, meta, files)
        if problem := find_damage(draft):
            raise CheckpointError(f"{draft}: read back differently from what was written: {problem}")
        _commit(draft, target)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} was not written to {folder}: {error}") from error
    _after_commit(folder, target, keep)
    return target


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    headers = (1 << 16) + 512 * len(tensors)
    return headers + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_tensors(draft: Path, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    parts, files = _split(tensors), []
    for number, names in enumerate(parts, start=1):
        data = safetensors.torch.save({name: tensors[name].detach().cpu().contiguous() for name in names})
        path = draft / f"state-{number:05d}-of-{len(parts):05d}.safetensors"
        write_synced(path, data)
        # the digest of what was meant to be written, not of what lies on the disk
        files.append({"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return files


def _split(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in files of at most MAX_FILE_BYTES (a larger tensor has its own), in order; at least one file."""
    parts: list[list[str]] = [[]]
    room = MAX_FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and parts[-1]:
            parts.append([])
            room = MAX_FILE_BYTES
        parts[-1].append(name)
        room -= size
    return parts


def _write_manifest(draft: Path, step: int, meta: Mapping[str, Any], files: list[dict[str, Any]]) -> None:
    body = {
        "format": FORMAT,
        "step": step,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": {name: _version(name) for name in ("dydit_scale", "torch", "deepspeed", "diffusers", "peft")},
        "meta": dict(meta),
        "files": files,
    }
    body = json.loads(json.dumps(body, allow_nan=False))  # as it will be read: tuples become lists, keys strings
    text = json.dumps(body | {"digest": _digest(body)}, indent=1, allow_nan=False)
    write_synced(draft / MANIFEST, text.encode())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(draft: Path, target: Path) -> None:
    sync_folder(draft)
    if target.exists():  # a run that went back and came here again
        rename_synced(target, _trash_name(target))
    rename_synced(draft, target)


def _trash_name(path: Path) -> Path:
    return path.with_name(f".trash-{path.name}")


def _after_commit(folder: Path, target: Path, keep: int) -> None:
    """Housekeeping; the checkpoint is safe already, so a failure here is only told."""
    try:
        hint = folder / ".tmp-latest"
        write_synced(hint, f"{target.name}\n".encode())
        rename_synced(hint, folder / "latest")
        steps = list_checkpoints(folder)
        for left in steps[steps.index(target) + 1 :]:
            # of a branch that the run went back from; the next start would take it for the newest
            rename_synced(left, _free_name(left, "left"))
            warnings.warn(f"{left}: later than {target.name}, renamed to *.left", RuntimeWarning, stacklevel=2)
        complete = [path for path in list_checkpoints(folder) if find_damage(path, digests=False) is None]
        for old in complete[:-keep]:
            trash = _trash_name(old)
            rename_synced(old, trash)
            shutil.rmtree(trash)
        _tidy(folder)
    except OSError as error:
        warnings.warn(f"{folder}: tidying up after {target.name} failed: {error}", RuntimeWarning, stacklevel=2)


def _tidy(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    _recover(folder)
    for pattern in (".tmp-step-*", ".trash-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def _recover(folder: Path) -> None:
    """Take back a checkpoint whose replacement was killed between the two renames of a commit."""
    for trash in folder.glob(".trash-step-*"):
        target = folder / trash.name.removeprefix(".trash-")
        if not target.exists() and find_damage(trash) is None:
            rename_synced(trash, target)


def find_damage(path: Path, *, digests: bool = True) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None. ``digests`` False compares sizes only, without reading.

    Raises OSError if the disk refuses, which says nothing about the checkpoint.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "digest"}
        if _digest(body) != manifest["digest"]:
            return f"{MANIFEST}: its digest does not fit its content"
        if body["format"] != FORMAT:
            return f"{MANIFEST}: expected format {FORMAT}, got {body['format']}"
        for entry in body["files"]:
            file = path / entry["name"]
            if (size := file.stat().st_size) != entry["bytes"]:
                return f"{file.name}: expected {entry['bytes']} bytes, got {size}"
            if digests and file_digest(file) != entry["sha256"]:
                return f"{file.name}: its sha256 differs from the manifest's"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: not readable: {error!r}"
    return None


def load_checkpoint(folder: Path, step: int | None = None, *, world: World = ONE_PROCESS) -> Checkpoint | None:
    """The checkpoint of ``step``, or the newest one that is whole; None if none was ever committed. Collective.

    Without ``step`` a damaged one is renamed to ``*.corrupt`` and the one before is taken, with a warning. Rank 0
    verifies sizes and sha256; then every rank reads the files.

    Raises CheckpointError on every rank if the wanted one is absent or damaged, or if checkpoints exist and none is
    whole: a run must never start afresh over them.
    """
    name = _on_main(world, lambda: _choose(folder, step))
    if name is None:
        return None
    checkpoint, problem = None, None
    try:
        checkpoint = _read(folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        problem = error
    if max_flag(problem is not None) or checkpoint is None:
        where = problem or "see the other ranks"
        raise CheckpointError(f"{folder / name}: not readable on every rank: {where}") from problem
    return checkpoint


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_bytes())
    tensors: dict[str, Tensor] = {}
    for entry in manifest["files"]:
        tensors |= safetensors.torch.load_file(path / entry["name"])
    return Checkpoint(manifest["step"], tensors, manifest["meta"], path)


def _choose(folder: Path, step: int | None) -> str | None:
    _recover(folder)
    present = list_checkpoints(folder)
    if step is not None:
        path = checkpoint_path(folder, step)
        if path not in present:
            raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are {[p.name for p in present]}")
        if problem := find_damage(path):
            raise CheckpointError(f"{path}: {problem}; choose another of {[p.name for p in present]}")
        return path.name
    for path in reversed(present):
        if not (problem := find_damage(path)):
            return path.name
        _set_aside(path, problem)
    # also those that an earlier start found damaged: the run must not begin again in silence
    if present or (present := list(folder.glob("step-*.corrupt*"))):
        names = sorted(path.name for path in present)
        raise CheckpointError(f"{folder}: no checkpoint is whole, damaged: {names}; repair one or use a new folder")
    return None


def _set_aside(path: Path, problem: str) -> None:
    try:
        rename_synced(path, _free_name(path, "corrupt"))
    except OSError as error:
        problem = f"{problem} (and not renamed: {error})"
    warnings.warn(f"CHECKPOINT DAMAGED, going back to the one before: {path}: {problem}", RuntimeWarning, stacklevel=2)


def _free_name(path: Path, ending: str) -> Path:
    number = 0
    while (name := path.with_name(f"{path.name}.{ending}{number or ''}")).exists():
        number += 1
    return name


def _on_main(world: World, action: Callable[[], T]) -> T:
    """The result of ``action``, run on rank 0, on every rank; its failure is a CheckpointError on every rank."""
    result, problem = None, None
    if world.is_main:
        try:
            result = action()
        except Exception as error:  # of any kind: the other ranks wait for the verdict
            problem = error
    message = broadcast_object(world, None if problem is None else str(problem))
    if message is not None:
        raise CheckpointError(message) from problem
    return broadcast_object(world, result)
