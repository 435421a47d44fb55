"""The tensors of a checkpoint, put together from the pieces that its ranks wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dydit_scale.checkpoint.manifest import Tensors
from dydit_scale.checkpoint.tensor_file import DTYPES, TensorFile
from dydit_scale.parallel.lazy import LazyTensors


class StoredTensors(LazyTensors):
    """Reads from the files in ``path`` what is asked for, when it is asked for; the files stay open meanwhile.

    Reading raises OSError if the disk refuses, and ValueError if a file is not what the manifest says.
    """

    def __init__(self, path: Path, tensors: Tensors) -> None:
        self._path, self._tensors = path, tensors
        self._files: dict[str, TensorFile] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._tensors[name].kind.shape)

    def flat(self, name: str, start: int, numel: int) -> Tensor:
        kind, pieces = self._tensors[name]
        out = torch.empty(numel, dtype=DTYPES[kind.dtype])
        for piece in pieces:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                self._file(piece.file).read_into(name, first - piece.start, out[first - start : last - start])
        return out

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self._path / name)
        return self._files[name]
