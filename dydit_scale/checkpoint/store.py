"""Checkpoints on disk: written aside, committed by a rename, verified before use; safetensors and JSON, never pickle.

Format canon-v2, the same for every engine and number of ranks:

    checkpoints/step-0000001000/rank-00000-00001.safetensors   what rank 0 held of each tensor, in one or more files
    checkpoints/step-0000001000/rank-00001-00001.safetensors   what rank 1 held ...
    checkpoints/step-0000001000/manifest.json                  step, meta, type, shape and pieces of every tensor, size
                                                               and sha256 of every file

A piece is a run of elements of the flattened tensor, under the tensor's name. A rank that held all of a tensor wrote it
in its own shape, so one process writes ordinary safetensors. canon-v1 (whole tensors, written by rank 0) is read too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dydit_scale.checkpoint.agree import first_problem, on_main
from dydit_scale.checkpoint.errors import CheckpointError
from dydit_scale.checkpoint.folder import checkpoint_path, list_checkpoints, recover, remember_whole, set_aside
from dydit_scale.checkpoint.manifest import MANIFEST, Damaged, Manifest, check_content, read_manifest
from dydit_scale.checkpoint.stored import StoredTensors
from dydit_scale.parallel.world import ONE_PROCESS, World


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    step: int
    tensors: Mapping[str, Tensor]
    """On the CPU; read from the disk each time that one is asked for."""
    meta: dict[str, Any]
    path: Path


def load_checkpoint(
    folder: Path, step: int | None = None, *, world: World = ONE_PROCESS, repair: bool = False
) -> Checkpoint | None:
    """The checkpoint of ``step``, or the newest one that is whole; None if none was ever committed. Collective.

    Without ``step`` the one before a damaged one is taken, with a warning. Sizes are compared on every rank; the sha256
    of the files are shared out over the ranks. The tensors are read when they are asked for, by each rank for itself.

    Args:
        repair: Rename what is damaged to ``*.corrupt`` and finish what a killed process began. Only for the process
            that holds the run; without it nothing in the folder changes, and what another process deletes meanwhile is
            passed over.

    Raises CheckpointError on every rank if the wanted one is absent or damaged, if another version of dydit_scale
    wrote the newest one, or if checkpoints exist and none is whole: a run must never start afresh over them.
    """
    if repair:
        on_main(world, lambda: recover(folder))
    if step is not None:
        return _wanted(folder, step, world)
    tried: set[str] = set()
    # listed anew each time, for a run may go on committing and deleting meanwhile
    while names := on_main(world, lambda: [p.name for p in list_checkpoints(folder) if p.name not in tried]):
        path = folder / names[-1]
        checkpoint, problem = _verify(path, world)
        if checkpoint is not None:
            return checkpoint
        on_main(world, partial(set_aside if repair else _pass_over, path, problem))
        tried.add(path.name)
    # also those that an earlier start found damaged: the run must not begin again in silence
    damaged = on_main(world, lambda: sorted(tried | {p.name for at in _REMAINS for p in folder.glob(at)}))
    if damaged:
        raise CheckpointError(f"{folder}: no checkpoint is whole, damaged: {damaged}; repair one or use a new folder")
    return None


_REMAINS = ("step-*.corrupt*", ".trash-step-*")


def _pass_over(path: Path, problem: str) -> None:
    if path.exists():
        warnings.warn(f"CHECKPOINT DAMAGED, taking the one before: {path}: {problem}", RuntimeWarning, stacklevel=2)


def _wanted(folder: Path, step: int, world: World) -> Checkpoint:
    path = checkpoint_path(folder, step)
    present = on_main(world, lambda: [found.name for found in list_checkpoints(folder)])
    if path.name not in present:
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are {present}")
    checkpoint, problem = _verify(path, world)
    if checkpoint is None:
        raise CheckpointError(f"{path}: {problem}; choose another of {present}")
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that ``path`` itself is, under any name. CheckpointError if it is damaged."""
    checkpoint, problem = _verify(path, ONE_PROCESS)
    if checkpoint is None:
        raise CheckpointError(f"{path}: {problem}")
    return checkpoint


def _verify(path: Path, world: World) -> tuple[Checkpoint | None, str]:
    """A checkpoint, or what is wrong with it, alike on all ranks; rank 0's manifest holds for all. Collective.

    CheckpointError on every rank if a disk refuses, which says nothing about the checkpoint.
    """
    manifest, problem = on_main(world, lambda: _read(path))
    if manifest is None:
        return None, problem
    unreadable, damage = None, None
    try:
        (path / MANIFEST).stat()  # a folder that this rank does not share is no damage
        # the largest first, so that every rank gets about as much
        for file in sorted(manifest.files, key=lambda file: -file.bytes)[world.rank :: world.world_size]:
            check_content(path, file)
    except Damaged as error:
        damage = str(error)
    except OSError as error:
        unreadable = str(error)
    if refused := first_problem(world, unreadable):
        if not on_main(world, path.exists):
            return None, "it was deleted meanwhile"
        raise CheckpointError(f"{path}: not readable on every rank: {refused}")
    if found := first_problem(world, damage):
        return None, found
    on_main(world, partial(remember_whole, path))
    return Checkpoint(manifest.step, StoredTensors(path, manifest.tensors), manifest.meta, path), ""


def _read(path: Path) -> tuple[Manifest | None, str]:
    try:
        return read_manifest(path), ""
    except Damaged as error:
        return None, str(error)
