"""Checks of what a run folder holds; every failure is a ValueError that says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def arrays(path: Path, **dimensions: int) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file, never unpickled; ``dimensions`` says which must be there, each with how many axes."""
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("expected an .npz archive, got a single array")
        found = {key: file[key] for key in file.files}
    for key, axes in dimensions.items():
        if key not in found or found[key].ndim != axes:
            got = f"shape {found[key].shape}" if key in found else "none"
            raise ValueError(f"{key}: expected an array with {axes} axes, got {got}")
    return found


def pixels(key: str, array: NDArray[Any]) -> Pixels:
    """``array`` if it is uint8 RGB pictures [samples, height, width, 3]."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise ValueError(f"{key}: expected uint8 [samples, height, width, 3], got {array.dtype} {array.shape}")
    return array


def finite(key: str, array: NDArray[Any]) -> FloatArray:
    """``array`` as float64 if every number is finite."""
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{key}: expected finite numbers, got {int((~np.isfinite(values)).sum())} that are not")
    return values


def expect_shape(key: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Fail unless the shapes are equal."""
    if got != expected:
        raise ValueError(f"{key}: expected a shape that begins with {expected}, got {got}")


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """``value`` if it is a mapping."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(value).__name__}")
    return value


def maybe(entry: Mapping[str, Any], key: str, high: float = math.inf) -> float | None:
    """The number at ``key``; None where it is absent, null or not finite."""
    value = entry.get(key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return number(entry, key, high=high)


def number(entry: Mapping[str, Any], key: str, low: float = 0.0, high: float = math.inf) -> float:
    """The finite number at ``key``, from ``low`` to ``high``."""
    value = entry.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ValueError(f"{key}: expected a number from {low:g} to {high:g}, got {value!r}")
    return float(value)
