"""The one cost model: MACs (multiply-accumulates; papers often call them FLOPs) from shapes, static and dynamic.

Counted are matrix products and attention, as ``torch.utils.flop_counter.FlopCounterMode`` does (its FLOPs are twice
these MACs) on the packed run: width routers are not in it, because packed sampling reads their answers from a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dydit_scale.dynamic.masks import DynamicMasks


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """MACs of one block for one sample: those that always run, and those that follow heads, groups and tokens."""

    fixed: int | float = 0
    """Runs always: modulation."""
    router: int | float = 0
    """The token router; absent from the static model."""
    heads: int | float = 0
    """In proportion to the active heads: projections and attention."""
    heads_tokens: int | float = 0
    """In proportion to active heads and kept tokens (attention that skipped tokens miss: query, scores, output)."""
    groups: int | float = 0
    """In proportion to the active MLP groups: tokens that never skip (text)."""
    groups_tokens: int | float = 0
    """In proportion to active MLP groups and kept image tokens."""
    token_share: float = 1.0
    """The share of image tokens that reach the block at all (pictures beside a clip do not reach temporal blocks).
    ``*_tokens`` are the MACs as if all did: masks have zeros for the others."""

    @property
    def static(self) -> int | float:
        """MACs with everything on and no router."""
        return self.fixed + self.heads + self.groups + self.token_share * (self.heads_tokens + self.groups_tokens)


class KeepRates(NamedTuple):
    """Shares of heads, MLP groups and image tokens that work."""

    heads: Float[Tensor, "layers batch"]
    groups: Float[Tensor, "layers batch"]
    tokens: Float[Tensor, "layers batch"]


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """MACs of one forward for one sample."""

    blocks: tuple[BlockCost, ...]
    outside: int | float
    """Embedders, final modulation and projection."""
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def static(self) -> int | float:
        """MACs of the static model."""
        return self.outside + sum(b.static for b in self.blocks)

    def dynamic(self, rates: KeepRates) -> Float[Tensor, " batch"]:
        """MACs of each sample, differentiable in the rates."""
        h, g, t = rates.heads.double(), rates.groups.double(), rates.tokens.double()
        always, heads, heads_tokens, groups, groups_tokens = self._columns(h.device)
        blocks = h * (heads + heads_tokens * t) + g * (groups + groups_tokens * t)
        return (blocks + always).sum(0) + self.outside

    def ratio(self, masks: DynamicMasks) -> Float[Tensor, " batch"]:
        """MACs dynamic / static of each sample, fp32, with gradient to the gates."""
        return (self.dynamic(KeepRates(*masks.keep_rates())) / self.static).float()

    def floor(self, heads: int, groups: int, *, tokens: bool = True) -> float:
        """The lowest ratio that gates can reach: the always-on unit of ``heads`` and ``groups``, and no image token."""
        ones = torch.ones(len(self.blocks), 1)
        kept = ones * 0.0 if tokens else ones.new_tensor([b.token_share for b in self.blocks])[:, None]
        return float(self.dynamic(KeepRates(ones / heads, ones / groups, kept)) / self.static)

    def _columns(self, device: torch.device) -> Float[Tensor, "kinds layers 1"]:
        """MACs that always run, and that follow heads, heads and tokens, groups, groups and tokens; brought to a device
        once."""
        if device not in self._on_device:
            rows = [(b.fixed + b.router, b.heads, b.heads_tokens, b.groups, b.groups_tokens) for b in self.blocks]
            table = torch.tensor(rows, dtype=torch.double).reshape(-1, 5)  # [layers, kinds], also without layers
            self._on_device[device] = table.T[..., None].to(device)
        return self._on_device[device]
