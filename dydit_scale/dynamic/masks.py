"""Gates under their names. Layers come first: the double blocks in order, then the single ones (or a model's own
order)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor


class GateNoise(NamedTuple):
    """Logistic noise that makes the gates random in training; an argument, so recomputation sees the same."""

    heads: Float[Tensor, "layers batch heads"]
    groups: Float[Tensor, "layers batch groups"]
    tokens: Float[Tensor, "layers batch tokens"]


GateMode = Literal["open", "threshold"] | GateNoise
"""``open``: the complete model. ``threshold``: inference. Noise: training."""


class WidthMasks(NamedTuple):
    """Which routing units of each layer work, for each sample; None where that width is not dynamic."""

    heads: Float[Tensor, "layers batch heads"] | None
    groups: Float[Tensor, "layers batch groups"] | None

    def layer(self, i: int) -> WidthMasks:
        """The masks of one layer, [batch, units]."""
        return WidthMasks(
            None if self.heads is None else self.heads[i], None if self.groups is None else self.groups[i]
        )


class DynamicMasks(NamedTuple):
    """All gates of one forward, ones where nothing is dynamic."""

    heads: Float[Tensor, "layers batch heads"]
    groups: Float[Tensor, "layers batch groups"]
    tokens: Float[Tensor, "layers batch tokens"]

    def keep_rates(self) -> DynamicMasks:
        """The shares that work, [layers, batch] each."""
        return DynamicMasks(self.heads.mean(-1), self.groups.mean(-1), self.tokens.mean(-1))
