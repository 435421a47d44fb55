"""What a rank holds of each tensor, and its copy aside, so that training goes on while it is written."""

from __future__ import annotations

import warnings
import weakref
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


class _Block(NamedTuple):
    """What one block of memory holds."""

    dtype: torch.dtype
    pinned: bool


def whole(tensors: Mapping[str, Tensor]) -> Parts:
    """The parts of a rank that holds all of ``tensors``."""
    return {name: Part(tensor.detach(), tensor.shape) for name, tensor in tensors.items()}


class Stage:
    """Copies parts into CPU memory, the same at every save: one block per type (pinned for those from CUDA)."""

    def __init__(self) -> None:
        self._layout: dict[str, tuple[torch.Size, _Block]] = {}
        self._views: dict[str, Tensor] = {}
        self._pinned: list[int] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    def copy(self, parts: Parts) -> Parts:
        """The parts as they are now, on the CPU; valid until the next ``copy``."""
        layout = {n: (part.values.shape, _Block(part.values.dtype, part.values.is_cuda)) for n, part in parts.items()}
        if layout != self._layout:
            self._arrange(layout)
        copies = {}
        for name, part in parts.items():
            copies[name] = part._replace(values=self._views[name].copy_(part.values, non_blocking=True))
        if any(part.values.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _arrange(self, layout: dict[str, tuple[torch.Size, _Block]]) -> None:
        """New memory for each name, one behind the other in one block of each kind."""
        _unpin(self._pinned)
        self._views, self._layout = {}, {}  # the old memory goes before the new one is taken
        sizes: dict[_Block, int] = {}
        for shape, block in layout.values():
            sizes[block] = sizes.get(block, 0) + shape.numel()
        rest = {block: torch.empty(numel, dtype=block.dtype) for block, numel in sizes.items()}
        for block, memory in rest.items():
            if block.pinned and memory.nbytes and _pin(memory):
                self._pinned.append(memory.data_ptr())
        views = {}
        for name, (shape, block) in layout.items():
            numel = shape.numel()
            views[name], rest[block] = rest[block][:numel].view(shape), rest[block][numel:]
        self._views, self._layout = views, layout


def _pin(memory: Tensor) -> bool:
    """Lock memory that torch did not lock itself, for it would round the size up to a power of two.

    False, and a warning, if CUDA refuses: copies to ordinary memory are right, but slower.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code != 0:
        warnings.warn(f"{memory.nbytes / 2**20:.1f} MiB cannot be pinned: CUDA error {code}", stacklevel=2)
    return code == 0


def _unpin(addresses: list[int]) -> None:
    while addresses:
        torch.cuda.cudart().cudaHostUnregister(addresses.pop())
