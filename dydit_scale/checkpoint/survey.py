"""What lies in the folder of a run's checkpoints, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dydit_scale.checkpoint.folder import checkpoint_path, has_checkpoints, list_checkpoints
from dydit_scale.checkpoint.manifest import Damaged, UnknownFormatError, find_damage, read_manifest


class Row(NamedTuple):
    """One folder, as far as it can be told without reading its tensors."""

    name: str
    written: str = ""
    """Date and time (UTC)."""
    bytes: int = 0
    world_size: int | None = None
    engine: str | None = None
    tensors: int = 0
    pieces: int = 0
    problem: str | None = None
    """None: the manifest and all sizes are right."""


class Verdict(NamedTuple):
    """What reading a checkpoint whole found."""

    path: Path
    bytes: int
    problem: str | None


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints of a run; ``path`` is either. ValueError if there are none."""
    for folder in (path / "checkpoints", path):
        if has_checkpoints(folder):
            return folder
    raise ValueError(f"{path}: expected the folder of a run with checkpoints, found none")


def survey(folder: Path) -> list[Row]:
    """Committed checkpoints, oldest first, then those that were set aside or never finished."""
    others = (path for pattern in ("step-*.*", ".tmp-step-*", ".trash-step-*") for path in folder.glob(pattern))
    return [_row(path) for path in (*list_checkpoints(folder), *sorted(others))]


def _row(path: Path) -> Row:
    unfinished = path.name.startswith(".")
    try:
        manifest = read_manifest(path)
    except (Damaged, UnknownFormatError) as error:
        return Row(path.name, problem="unfinished" if unfinished else str(error))
    return Row(
        path.name, manifest.written, manifest.bytes, manifest.world_size, manifest.engine, len(manifest.tensors),
        sum(len(tensor.pieces) for tensor in manifest.tensors.values()), "unfinished" if unfinished else None,
    )  # fmt: skip


def chosen(folder: Path, step: int | None) -> list[Path]:
    """All committed checkpoints, or the one of ``step``. ValueError if there is none."""
    present = list_checkpoints(folder)
    if step is None:
        return present
    if (path := checkpoint_path(folder, step)) not in present:
        raise ValueError(f"{folder}: no checkpoint of step {step}; there are {[p.name for p in present]}")
    return [path]


def size_of(path: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def verify(path: Path, tell: Callable[[int], object] = lambda done: None) -> Verdict:
    """Read all of a checkpoint and compare its sha256; ``tell`` hears the bytes of each read."""
    return Verdict(path, size_of(path), find_damage(path, tell=tell))
