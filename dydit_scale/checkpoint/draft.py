"""A checkpoint while it is written: each rank its own files, then rank 0 the manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dydit_scale.checkpoint.files import file_digest, sync_folder, write_synced
from dydit_scale.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredFile,
    StoredPiece,
    StoredTensor,
    Tensors,
    merge_tensors,
    package_versions,
    part_from_json,
    part_to_json,
    write_text,
)
from dydit_scale.checkpoint.parts import Parts
from dydit_scale.checkpoint.tensor_file import write_tensor_file
from dydit_scale.parallel.faults import fail_point

MAX_FILE_BYTES = 1 << 30
"""A file gets no further tensor beyond this size."""


class Origin(NamedTuple):
    """Who writes a checkpoint, for its manifest."""

    step: int
    meta: Mapping[str, Any]
    world_size: int
    engine: str


def write_parts(draft: Path, rank: int, step: int, parts: Parts) -> None:
    """Write this rank's files, read them back, and say that they are there (``rank-NNNNN.ok.json``).

    Raises OSError if the disk refuses or gives back other bytes than were written.
    """
    if not draft.is_dir():
        raise FileNotFoundError(f"{draft} is not there; the folder of a run must be shared by all ranks")
    files, tensors = [], {}
    for number, names in enumerate(_split(parts), start=1):
        path = draft / f"rank-{rank:05d}-{number:05d}.safetensors"
        written = write_tensor_file(
            path,
            {name: parts[name].stored for name in names},
            lambda name: parts[name].values,
            began=lambda: fail_point("checkpoint.writing", step),
        )
        files.append(StoredFile(path.name, *written))
        for name in names:
            part = parts[name]
            piece = StoredPiece(path.name, part.start, part.values.numel())
            tensors[name] = StoredTensor(part.kind, (piece,))
    for file in files:
        if file_digest(draft / file.name) != file.sha256:
            raise OSError(f"{draft / file.name}: read back differently from what was written: its sha256 differs")
    fail_point("checkpoint.written", step)
    _say_ok(draft, rank, files, tensors)


def _split(parts: Parts) -> list[list[str]]:
    """Names in files of at most MAX_FILE_BYTES (a larger tensor has its own), in order."""
    files: list[list[str]] = []
    room = 0
    for name, part in parts.items():
        if not files or (part.bytes > room and files[-1]):
            files.append([])
            room = MAX_FILE_BYTES
        files[-1].append(name)
        room -= part.bytes
    return files


def _say_ok(draft: Path, rank: int, files: list[StoredFile], tensors: Tensors) -> None:
    path = draft / f".rank-{rank:05d}.ok.json"
    write_synced(path, part_to_json(files, tensors).encode())
    sync_folder(draft)
    os.replace(path, _ok_path(draft, rank))  # nothing may fail after it: rank 0 takes it for this rank's word


def _ok_path(draft: Path, rank: int) -> Path:
    return draft / f"rank-{rank:05d}.ok.json"


def missing_ranks(draft: Path, world_size: int) -> list[int]:
    """The ranks that have not said yet that their files are there."""
    present = set(os.listdir(draft))
    return [rank for rank in range(world_size) if _ok_path(draft, rank).name not in present]


def write_manifest(draft: Path, origin: Origin) -> None:
    """Put together what the ranks wrote, and check it. Raises Damaged if pieces are missing or there twice."""
    files: list[StoredFile] = []
    parts: list[Tensors] = []
    for rank in range(origin.world_size):
        written, tensors = part_from_json(_ok_path(draft, rank).read_bytes())
        files += written
        parts.append(tensors)
    manifest = Manifest(
        step=origin.step, written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), packages=package_versions(),
        world_size=origin.world_size, engine=origin.engine, meta=dict(origin.meta), files=tuple(files),
        tensors=merge_tensors(parts),
    )  # fmt: skip
    for file in files:
        if (size := (draft / file.name).stat().st_size) != file.bytes:
            raise OSError(f"{draft / file.name}: expected {file.bytes} bytes, got {size}")
    write_synced(draft / MANIFEST, write_text(manifest))
    for rank in range(origin.world_size):
        _ok_path(draft, rank).unlink()
