"""Gates under their names. Layers come first: the double blocks in order, then the single ones (or a model's own
order)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class GateNoise(NamedTuple):
    """Logistic noise that makes the gates random in training; an argument, so recomputation sees the same."""

    heads: Float[Tensor, "layers batch heads"]
    groups: Float[Tensor, "layers batch groups"]
    tokens: Float[Tensor, "layers batch tokens"]


@dataclass(frozen=True, eq=False)
class SharedUnits:
    """The routing units of one block that work for a whole batch; on the CPU, where they are known beforehand."""

    heads: Bool[Tensor, " heads"] | None
    """None where that width is not dynamic."""
    groups: Bool[Tensor, " groups"] | None
    _members: dict[tuple[str, torch.device], Int64[Tensor, " active"] | None] = field(default_factory=dict, repr=False)

    def members(self, kind: Literal["heads", "groups"], name: str, unit_of: Int64[Tensor, " members"]) -> Tensor | None:
        """The heads or channels whose unit works, ascending, where ``unit_of`` is; None: all. Found once for each
        ``name`` of such a table."""
        mask = self.heads if kind == "heads" else self.groups
        if mask is None or bool(mask.all()):
            return None
        key = (name, unit_of.device)
        if key not in self._members:
            self._members[key] = mask[unit_of.cpu()].nonzero().squeeze(1).to(unit_of.device)
        return self._members[key]


@dataclass(frozen=True, eq=False)
class SubNetwork:
    """The width that all samples of a batch share."""

    layers: tuple[SharedUnits, ...]

    def masks(self, device: torch.device) -> WidthMasks:
        """The same as masks, [layers, 1, units]."""
        kinds = zip(*((units.heads, units.groups) for units in self.layers), strict=True)
        found = (None if kind[0] is None else torch.stack(kind)[:, None].float().to(device) for kind in kinds)
        return WidthMasks(*found)


@dataclass(frozen=True, eq=False)
class FrozenGates:
    """Gates of a batch that runs one sub-network: forward and backward on its heads and channels alone."""

    network: SubNetwork
    tokens: Float[Tensor, "layers batch tokens"] | None = None
    """Noise, where token routers still learn: skipped tokens are then computed and masked. None: by threshold, and
    skipped tokens are not computed."""


GateMode = Literal["open", "threshold"] | GateNoise | FrozenGates
"""``open``: the complete model. ``threshold``: inference. Noise: training. Frozen: training once widths are settled."""


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
