"""Full tensors that may lie on a disk: their shapes are known, and only what is asked for is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """A mapping that reads a tensor (CPU) each time it is asked for it, and keeps none."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, without reading it. KeyError if there is no such tensor."""

    @abstractmethod
    def flat(self, name: str, start: int, numel: int) -> Tensor:
        """``numel`` elements of the flattened tensor from ``start``, as a 1-d tensor; nothing else is read."""

    def __contains__(self, name: object) -> bool:
        try:
            self.shape(str(name))
        except KeyError:
            return False
        return True

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.flat(name, 0, shape.numel()).view(shape)


class Renamed(LazyTensors):
    """Some of ``tensors``, lazy or not: ``names`` maps a name here to the name there."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> torch.Size:
        return shape_of(self._tensors, self._names[name])

    def flat(self, name: str, start: int, numel: int) -> Tensor:
        return flat_of(self._tensors, self._names[name], start, numel)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of one of ``tensors``; a lazy one is not read."""
    return tensors.shape(name) if isinstance(tensors, LazyTensors) else tensors[name].shape


def flat_of(tensors: Mapping[str, Tensor], name: str, start: int, numel: int) -> Tensor:
    """``numel`` elements from ``start`` of one of ``tensors``, flattened; of a lazy one only these are read."""
    if isinstance(tensors, LazyTensors):
        return tensors.flat(name, start, numel)
    return tensors[name].reshape(-1).narrow(0, start, numel)
