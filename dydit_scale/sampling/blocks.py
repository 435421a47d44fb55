"""Pictures in numbered blocks: what is drawn at a time, written as one file, and drawn again if that is damaged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

NAME = "pictures"
"""Of the tensor in a block's file."""


class DamagedBlockError(ValueError):
    """A file that is no whole block."""


@dataclass(frozen=True)
class Blocks:
    """The files of ``num`` pictures, ``size`` in each but the last."""

    folder: Path
    size: int
    num: int

    def __len__(self) -> int:
        return -(-self.num // self.size)

    def numbers(self, block: int) -> range:
        """Of the pictures in a block."""
        return range(block * self.size, min(self.num, (block + 1) * self.size))

    def path(self, block: int) -> Path:
        """Of a block's file."""
        return self.folder / f"block-{block:06d}.safetensors"

    def read(self, block: int) -> np.ndarray:
        """A block's pictures, uint8; the first of them where a larger set was drawn before.

        Raises DamagedBlockError if the file is cut short, changed, no block, or holds fewer pictures; OSError if there
        is none.
        """
        path, count = self.path(block), len(self.numbers(block))
        try:
            with safe_open(path, "np") as file:
                pictures, sha256 = file.get_tensor(NAME), (file.metadata() or {}).get("sha256")
        except SafetensorError as error:
            raise DamagedBlockError(f"{path}: damaged or cut short: {error}") from error
        if pictures.dtype != np.uint8 or _digest(pictures) != sha256:
            raise DamagedBlockError(f"{path}: damaged: its pixels do not have the SHA-256 that was written beside them")
        if not count <= len(pictures) <= self.size:
            raise DamagedBlockError(f"{path}: holds {len(pictures)} pictures, expected {count}")
        return pictures[:count]


def block_bytes(pictures: np.ndarray) -> bytes:
    """The file of a block: safetensors with a SHA-256 of the pixels, uint8 [pictures, ..., height, width, 3]."""
    assert pictures.dtype == np.uint8, f"block: expected uint8, got {pictures.dtype}"
    pictures = np.ascontiguousarray(pictures)
    return save({NAME: pictures}, {"sha256": _digest(pictures)})


def _digest(pictures: np.ndarray) -> str:
    return hashlib.sha256(pictures.data).hexdigest()
