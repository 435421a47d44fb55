"""Sets of pictures as ADM's evaluation suite reads them: ``arr_0`` the pixels, ``arr_1`` the classes, uncompressed."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy


def write_npz(path: Path, blocks: Iterable[np.ndarray], num: int, labels: np.ndarray | None = None) -> tuple[int, ...]:
    """Write ``num`` pictures to ``path`` block by block; no more than one block is in memory. The shape of ``arr_0``.

    The bytes are a function of the pixels and labels alone: members carry no time.

    Args:
        blocks: uint8 [pictures, height, width, 3], or of clips [clips, frames, height, width, 3]; together ``num``.
        labels: int64 [num].
    """
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with _member(archive, "arr_0") as member:
                shape = _write_pixels(member, blocks, num)
            if labels is not None:
                with _member(archive, "arr_1") as member:
                    npy.write_array(member, labels, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return shape


def _write_pixels(member: IO[bytes], blocks: Iterable[np.ndarray], num: int) -> tuple[int, ...]:
    written, shape = 0, (0,)
    for block in blocks:
        if not written:
            shape = (num, *block.shape[1:])
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        assert block.dtype == np.uint8 and block.shape[1:] == shape[1:], f"npz: {block.dtype} {block.shape} in {shape}"
        member.write(np.ascontiguousarray(block).data)
        written += len(block)
    assert written == num, f"npz: {written} pictures came, {num} were announced"
    return shape


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
