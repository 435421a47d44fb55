"""Safetensors files written and read in parts, so that no more than one part is ever in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dydit_scale.checkpoint.files import CHUNK, explain_full_disk

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The format's names of what it can hold."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Kind(NamedTuple):
    """Type and shape of a tensor."""

    dtype: str
    """One of DTYPES."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return self.numel * DTYPES[self.dtype].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of ``dtype``. ValueError if it has none."""
    if dtype not in _NAMES:
        raise ValueError(f"safetensors: {dtype} is none of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


class Written(NamedTuple):
    """A file as it was meant to be written."""

    bytes: int
    sha256: str


def write_tensor_file(
    path: Path,
    kinds: Mapping[str, Kind],
    read: Callable[[str], Tensor],
    *,
    began: Callable[[], object] = lambda: None,
) -> Written:
    """Write the tensors of ``kinds``, which ``read`` gives by name, and force the file to the disk.

    ``began`` is called when the first part is written. The digest is of the bytes that were meant, not of what lies
    on the disk.
    """
    # the widest elements first: then every tensor starts at a multiple of its element's size
    names = sorted(kinds, key=lambda name: -DTYPES[kinds[name].dtype].itemsize)
    head, size = _header(kinds, names)
    digest, total = hashlib.sha256(), len(head) + size
    with explain_full_disk(path, total), path.open("wb") as file:
        file.write(head)
        digest.update(head)
        for name in names:
            data = _bytes_of(read(name))
            assert len(data) == kinds[name].bytes, f"{path}: {name}: {len(data)} bytes for {kinds[name]}"
            for start in range(0, len(data), CHUNK):
                part = data[start : start + CHUNK]
                file.write(part)
                digest.update(part)
                began()
                began = _nothing
        file.flush()
        os.fsync(file.fileno())
    return Written(total, digest.hexdigest())


def _nothing() -> None:
    pass


def _header(kinds: Mapping[str, Kind], names: list[str]) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        kind, start = kinds[name], end
        end += kind.bytes
        entries[name] = {"dtype": kind.dtype, "shape": list(kind.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _bytes_of(tensor: Tensor) -> memoryview:
    """The elements in order, as bytes; a copy only if the tensor is elsewhere or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """One file, opened to read parts of its tensors. Raises ValueError if it is no safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path.name}: not a safetensors file")
        entries = json.loads(self._file.read(length))
        self._offset = 8 + length
        try:
            entries.pop("__metadata__", None)
            self.kinds = {name: Kind(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
            self._starts = {name: int(entry["data_offsets"][0]) for name, entry in entries.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: not a safetensors file: {error!r}") from error

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-d, CPU, contiguous) with elements of a tensor, from element ``start``.

        ValueError if the tensor is not there, or another one than the caller expects.
        """
        kind = self.kinds.get(name)
        if kind is None or DTYPES.get(kind.dtype) != out.dtype or start + len(out) > kind.numel:
            raise ValueError(f"{self.path}: {name}: expected {start + len(out)} elements of {out.dtype}, got {kind}")
        if not len(out):
            return
        data = out.view(torch.uint8).numpy().data
        offset, done = self._offset + self._starts[name] + start * out.itemsize, 0
        while done < len(data):
            got = os.preadv(self._file.fileno(), [data[done : done + CHUNK]], offset + done)
            if not got:
                raise ValueError(f"{self.path}: ends within {name}")
            done += got

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
