"""A reader of sample files, from the description of ADM's evaluation suite alone: a zip whose member ``arr_0.npy`` is
an NPY file of uint8 pictures in NHWC. Nothing of numpy's readers is used."""

from __future__ import annotations

import ast
import math
import struct
import zipfile
from pathlib import Path

import numpy as np


def read_member(path: Path, name: str) -> np.ndarray:
    """The array ``name``; AssertionError where the file is not as described."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED
        data = archive.read(f"{name}.npy")
    assert data[:6] == b"\x93NUMPY" and data[6:8] == b"\x01\x00"
    (length,) = struct.unpack("<H", data[8:10])
    assert (10 + length) % 64 == 0 and data[10 + length - 1 : 10 + length] == b"\n"
    header = ast.literal_eval(data[10 : 10 + length].decode("latin1"))
    assert header.keys() == {"descr", "fortran_order", "shape"} and header["fortran_order"] is False
    kind = {"|u1": np.uint8, "<i8": np.int64}[header["descr"]]
    pixels = data[10 + length :]
    assert len(pixels) == math.prod(header["shape"]) * np.dtype(kind).itemsize
    return np.frombuffer(pixels, kind).reshape(header["shape"])
