"""What a rank holds of each tensor, and its copy aside, so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dydit_scale.checkpoint.tensor_file import Kind, dtype_name


class Part(NamedTuple):
    """A run of elements of a tensor."""

    values: Tensor
    """The elements in order, in any shape, on any device."""
    shape: torch.Size
    """Of the whole tensor."""
    start: int = 0
    """Number of the first element in the flattened tensor."""

    @property
    def kind(self) -> Kind:
        """Type and shape of the whole tensor."""
        return Kind(dtype_name(self.values.dtype), tuple(self.shape))

    @property
    def stored(self) -> Kind:
        """Type and shape in the file: the tensor's own shape if all of it is here, else flat."""
        numel = self.values.numel()
        return Kind(self.kind.dtype, tuple(self.shape) if numel == self.shape.numel() else (numel,))

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return self.values.numel() * self.values.element_size()


Parts = dict[str, Part]


def whole(tensors: Mapping[str, Tensor]) -> Parts:
    """The parts of a rank that holds all of ``tensors``."""
    return {name: Part(tensor.detach(), tensor.shape) for name, tensor in tensors.items()}


class Stage:
    """Copies parts into CPU memory, the same at every save (pinned where they come from CUDA)."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, parts: Parts) -> Parts:
        """The parts as they are now, on the CPU; valid until the next ``copy``."""
        copies = {}
        for name, part in parts.items():
            buffer = self._buffer(name, part.values)
            buffer.copy_(part.values, non_blocking=True)
            copies[name] = part._replace(values=buffer)
        if any(part.values.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return buffer
