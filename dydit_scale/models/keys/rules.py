"""The invertible steps that a conversion is made of: which tensors of one side become which of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Tensors keep their values under another name. Subclasses change what ``forward`` and ``back`` do."""

    originals: tuple[str, ...]
    """Names in the original file."""
    ours: tuple[str, ...]
    """Names in diffusers' (or our) model."""

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors of ``ours`` from those of ``originals``."""
        return tensors

    def back(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors of ``originals`` from those of ``ours``."""
        return tensors


@dataclass(frozen=True)
class Split(Rule):
    """One tensor whose rows are several: fused projections."""

    parts: tuple[int, ...]
    """The rows of each, in proportion."""

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        unit = tensors[0].shape[0] // sum(self.parts)
        return tensors[0].split([unit * n for n in self.parts])

    def back(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.cat(list(tensors))]


@dataclass(frozen=True)
class SwapHalves(Rule):
    """The two halves of the rows change places: (shift, scale) against (scale, shift)."""

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        first, second = tensors[0].chunk(2)
        return [torch.cat([second, first])]

    back = forward


@dataclass(frozen=True)
class Replicate(Rule):
    """One tensor that diffusers keeps a copy of in several places."""

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0]] * len(self.ours)

    def back(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """ValueError if the copies differ: the original layout has room for one."""
        for name, tensor in zip(self.ours, tensors, strict=True):
            if not tensor.is_meta and not torch.equal(tensor, tensors[0]):
                raise ValueError(
                    f"{name} differs from {self.ours[0]}; the original has one {self.originals[0]} for all blocks"
                )
        return tensors[:1]


@dataclass(frozen=True)
class Stack(Rule):
    """One tensor per layer, kept as one for all layers [layers, ...]."""

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.stack(list(tensors))]

    def back(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].unbind()


@dataclass(frozen=True)
class Computed(Rule):
    """A tensor that only one side has, because the other knows how to compute it."""

    make: Callable[[], Tensor]
    because: str
    """Why another value cannot be kept; ends the error."""

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """ValueError if the file holds another value than the computed one."""
        return self._dropped(tensors) if self.originals else [self.make()]

    def back(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._dropped(tensors) if self.ours else [self.make()]

    def _dropped(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        (found,), expected = tensors, self.make()
        if not found.is_meta:
            # sines differ in the last place between libraries; 16-bit files hold them rounded
            tolerance = 1e-5 if found.dtype in (torch.float32, torch.float64) else 1e-2
            if not torch.allclose(found.double(), expected.double(), rtol=0.0, atol=tolerance):
                raise ValueError(f"{(self.originals + self.ours)[0]} differs from its formula; {self.because}")
        return []


def rename(original: str, ours: str, *suffixes: str) -> list[Rule]:
    """The same tensors under another stem: ``weight`` and ``bias``, or the given ones."""
    return [Rule((f"{original}.{s}",), (f"{ours}.{s}",)) for s in suffixes or ("weight", "bias")]


def split(original: str, ours: Sequence[str], parts: tuple[int, ...]) -> list[Rule]:
    """A fused layer's weight and bias."""
    return [Split((f"{original}.{s}",), tuple(f"{name}.{s}" for name in ours), parts) for s in ("weight", "bias")]
