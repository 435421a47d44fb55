"""Safetensors files that are refused when they cannot be right, both when written and when read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class TensorFile(NamedTuple):
    """What one file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError if there is no tensor, or the first that is sharded, without elements, quantised, or not finite."""
    if not tensors:
        raise ValueError(f"{where}: expected tensors, got none")
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{where}: {name} is a shard of a distributed tensor; gather the full tensors first")
        if tensor.numel() == 0:
            raise ValueError(f"{where}: {name} has no elements {list(tensor.shape)}; was a sharded model not gathered?")
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise ValueError(f"{where}: {name} is {tensor.dtype}; expected unquantised weights, such as bf16")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} has values that are NaN or infinite")


def check_names_and_shapes(
    found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]], where: str, belongs_to: str
) -> None:
    """ValueError naming the first missing name, unexpected name, or shape that differs from ``expected``."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{where} does not fit {belongs_to}: {len(missing)} names missing (first: {next(iter(missing), None)}), "
            f"{len(unexpected)} unexpected (first: {next(iter(unexpected), None)})"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != tuple(shape):
            raise ValueError(
                f"{where} does not fit {belongs_to}: {name}: expected shape {list(shape)}, "
                f"got {list(found[name].shape)}"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, in one move: a reader sees the old file or the whole new one. Raises ValueError (see above)."""
    check_tensors(tensors, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Copies, because safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(copies, temporary, metadata={"format": "pt", **metadata})
    _sort_metadata(temporary)
    os.replace(temporary, path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, which safetensors leaves to chance: equal content gives equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, f"{path}: the header grew from {length} to {len(text)} bytes"
        file.seek(8)
        file.write(text.ljust(length))  # padded, as safetensors itself pads


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of one file; nothing else of it is read. Raises ValueError if its header is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from error


def read_tensors(path: Path) -> TensorFile:
    """Read one file whole. Raises ValueError if it is missing, damaged, empty, or has values that are not finite."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from error
    check_tensors(tensors, str(path))
    return TensorFile(tensors, metadata)
