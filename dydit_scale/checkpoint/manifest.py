"""The manifest of a checkpoint: what it holds, in which files and pieces, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from dydit_scale.checkpoint.errors import CheckpointError
from dydit_scale.checkpoint.files import file_digest
from dydit_scale.checkpoint.tensor_file import DTYPES, Kind, TensorFile

FORMAT, OLDER_FORMAT = "canon-v2", "canon-v1"
MANIFEST = "manifest.json"
PACKAGES = ("dydit_scale", "torch", "deepspeed", "diffusers", "peft")


class Damaged(ValueError):
    """What is wrong with a checkpoint."""


class UnknownFormatError(CheckpointError):
    """A checkpoint of another version: not damaged, and nothing that this version may touch."""


class StoredFile(NamedTuple):
    """One file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


class StoredPiece(NamedTuple):
    """Where some elements of a flattened tensor lie: in a file, under the tensor's name."""

    file: str
    start: int
    numel: int


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint."""

    kind: Kind
    pieces: tuple[StoredPiece, ...]


Tensors = dict[str, StoredTensor]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a checkpoint without reading its tensors."""

    step: int
    written: str
    """Date and time (UTC)."""
    packages: dict[str, str | None]
    """Versions."""
    world_size: int | None
    """Number of ranks that wrote it; None if it is too old to say."""
    engine: str | None
    """Of the run that wrote it."""
    meta: dict[str, Any]
    files: tuple[StoredFile, ...]
    tensors: Tensors

    @property
    def bytes(self) -> int:
        """Size of all files of tensors."""
        return sum(file.bytes for file in self.files)


def merge_tensors(parts: Iterable[Tensors]) -> Tensors:
    """The tensors of which each rank wrote some pieces. Damaged unless they are alike and complete."""
    merged: Tensors = {}
    for part in parts:
        for name, tensor in part.items():
            before = merged.get(name, StoredTensor(tensor.kind, ()))
            if before.kind != tensor.kind:
                raise Damaged(f"{name}: one rank has {before.kind}, another {tensor.kind}")
            pieces = sorted((*before.pieces, *tensor.pieces), key=lambda piece: piece.start)
            merged[name] = StoredTensor(tensor.kind, tuple(pieces))
    check_cover(merged)
    return merged


def check_cover(tensors: Tensors) -> None:
    """Damaged, naming the first tensor whose pieces do not cover it exactly once."""
    for name, (kind, pieces) in tensors.items():
        end = 0
        for piece in pieces:
            if piece.start != end:
                what = "missing" if piece.start > end else "there twice"
                first, last = sorted((end, piece.start))
                raise Damaged(f"{name}: elements {first} to {last - 1} of {kind.numel} are {what}")
            end += piece.numel
        if end != kind.numel:
            raise Damaged(f"{name}: expected pieces of {kind.numel} elements, got {end}")


def write_text(manifest: Manifest) -> bytes:
    """The manifest as JSON, with one file or tensor a line. ValueError or TypeError if its meta is not JSON."""
    body = {
        "format": FORMAT,
        **{key: getattr(manifest, key) for key in ("step", "written", "packages", "world_size", "engine", "meta")},
        "files": _plain_files(manifest.files),
        "tensors": _plain_tensors(manifest.tensors),
    }
    body = json.loads(json.dumps(body, allow_nan=False))  # as it will be read: tuples become lists, keys strings
    files = ",\n".join(f"  {json.dumps(file)}" for file in body["files"])
    tensors = ",\n".join(f"  {json.dumps(name)}: {json.dumps(tensor)}" for name, tensor in body["tensors"].items())
    rest = {key: value for key, value in body.items() if key not in ("files", "tensors")} | {"digest": digest(body)}
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    return f'{head},\n "files": [\n{files}\n ],\n "tensors": {{\n{tensors}\n }}\n}}\n'.encode()


def digest(body: Mapping[str, Any]) -> str:
    """The sha256 of a manifest's content (all but the key digest)."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def part_to_json(files: Iterable[StoredFile], tensors: Tensors) -> str:
    """What one rank wrote; :func:`part_from_json` is the way back."""
    return json.dumps({"files": _plain_files(files), "tensors": _plain_tensors(tensors)})


def part_from_json(text: bytes) -> tuple[tuple[StoredFile, ...], Tensors]:
    """The way back from :func:`part_to_json`."""
    values = json.loads(text)
    return _files(values["files"]), _tensors(values["tensors"])


def _plain_files(files: Iterable[StoredFile]) -> list[dict[str, Any]]:
    return [file._asdict() for file in files]


def _files(values: Any) -> tuple[StoredFile, ...]:
    return tuple(StoredFile(**value) for value in values)


def _plain_tensors(tensors: Tensors) -> dict[str, Any]:
    return {
        name: {"dtype": kind.dtype, "shape": list(kind.shape), "pieces": [list(piece) for piece in pieces]}
        for name, (kind, pieces) in tensors.items()
    }


def _tensors(values: Any) -> Tensors:
    return {
        name: StoredTensor(Kind(v["dtype"], tuple(v["shape"])), tuple(StoredPiece(*piece) for piece in v["pieces"]))
        for name, v in values.items()
    }


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``; sizes of files and pieces are compared, contents are not read.

    Raises Damaged, saying what is wrong; UnknownFormatError if another version wrote it; and OSError if the disk
    refuses, which says nothing about the checkpoint.
    """
    try:
        values = json.loads((path / MANIFEST).read_bytes())
        body = {key: value for key, value in values.items() if key != "digest"}
        _check_format(path, body["format"])
        if digest(body) != values["digest"]:
            raise Damaged(f"{MANIFEST}: its digest does not fit its content")
        files = _files(body["files"])
        _check_sizes(path, files)
        tensors = _tensors(body["tensors"]) if body["format"] == FORMAT else _of_whole_files(path, files)
        if unknown := [kind.dtype for kind, _ in tensors.values() if kind.dtype not in DTYPES]:
            raise Damaged(f"{MANIFEST}: unknown type {unknown[0]}")
        check_cover(tensors)
        kept = {key: body.get(key) for key in ("world_size", "engine")}
        return Manifest(
            step=body["step"], written=body["written"], packages=body["packages"], meta=body["meta"],
            files=files, tensors=tensors, **kept,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from error
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST}: not readable: {error!r}") from error


def _check_format(path: Path, found: str) -> None:
    """Before the digest, which another version may compute otherwise."""
    if found in (FORMAT, OLDER_FORMAT):
        return
    if re.fullmatch(r"canon-v\d+", found):
        reads = f"this version reads {FORMAT} and {OLDER_FORMAT}"
        raise UnknownFormatError(f"{path}: format {found}, {reads}; update dydit_scale")
    raise Damaged(f"{MANIFEST}: {found!r} is no format")


def _check_sizes(path: Path, files: Iterable[StoredFile]) -> None:
    for file in files:
        if (size := (path / file.name).stat().st_size) != file.bytes:
            raise Damaged(f"{file.name}: expected {file.bytes} bytes, got {size}")


def _of_whole_files(path: Path, files: Iterable[StoredFile]) -> Tensors:
    """The tensors of a canon-v1 checkpoint, whose files hold whole tensors and whose manifest does not list them."""
    tensors = {}
    for stored in files:
        file = TensorFile(path / stored.name)
        for name, kind in file.kinds.items():
            tensors[name] = StoredTensor(kind, (StoredPiece(stored.name, 0, kind.numel),))
        file.close()
    return tensors


def check_content(path: Path, file: StoredFile, tell: Callable[[int], object] = lambda done: None) -> None:
    """Damaged if the sha256 of a file of the checkpoint at ``path`` differs; ``tell`` hears the bytes of each read."""
    if file_digest(path / file.name, tell) != file.sha256:
        raise Damaged(f"{file.name}: its sha256 differs from the manifest's")


def find_damage(path: Path, *, digests: bool = True, tell: Callable[[int], object] = lambda done: None) -> str | None:
    """What is wrong with the checkpoint at ``path``, also an unknown format, or None.

    ``digests`` False compares sizes only, without reading. Raises OSError if the disk refuses, which says nothing about
    the checkpoint.
    """
    try:
        manifest = read_manifest(path)
        for file in manifest.files if digests else ():
            check_content(path, file, tell)
    except (Damaged, UnknownFormatError) as error:
        return str(error)
    return None


def package_versions() -> dict[str, str | None]:
    """Of the packages that a checkpoint depends on; None where one is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
