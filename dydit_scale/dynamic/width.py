"""Routers for width: which heads and channel groups work at a timestep (DyDiT section 3.2, TDW)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.gates import gumbel_gate, threshold_gate
from dydit_scale.dynamic.masks import GateMode, GateNoise, WidthMasks


class Router(nn.Module):
    """A module whose parameters are made by ``reset_parameters`` alone, so that it can be built without storage.

    A cast of the model to half precision leaves them in fp32: a rounded logit may fall on the other side of 0.
    """

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        raise TypeError(f"{type(self).__name__} must define reset_parameters")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(x: Tensor) -> Tensor:
            out = fn(x)
            halved = out.dtype != x.dtype and out.is_floating_point() and out.itemsize < 4
            return x.to(out.device) if halved else out

        return super()._apply(moved, recurse)


class UnitRouter(Router):
    """One logit per layer and routed unit from the timestep embedding."""

    def __init__(self, layers: int, dim: int, units: int, bias: float) -> None:
        super().__init__()
        self.start = bias
        self.weight = nn.Parameter(torch.empty(layers, units, dim))
        self.bias = nn.Parameter(torch.empty(layers, units))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Small weights under a positive bias: every unit starts on at every timestep."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.01, generator=generator)
            nn.init.constant_(self.bias, self.start)

    def forward(self, t_emb: Float[Tensor, "batch dim"]) -> Float[Tensor, "layers batch routed"]:
        """Logits in fp32; autocast must be off."""
        return torch.einsum("bd,lud->lbu", t_emb, self.weight.float()) + self.bias.float()[:, None]


class WidthRouter(nn.Module):
    """All width routers of a model in one place, evaluated once per forward on the pure fp32 timestep embedding.

    They belong to the root: a router inside block k would still be sharded when the root asks for it. With
    ``always_on``, unit 0 has no logit and works at every timestep.
    """

    def __init__(
        self,
        *,
        layers: int,
        dim: int,
        heads: int | None,
        groups: int | None,
        bias: float,
        temperature: float,
        always_on: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.fixed = int(always_on)
        self.heads = UnitRouter(layers, dim, heads - self.fixed, bias) if heads else None
        self.groups = UnitRouter(layers, dim, groups - self.fixed, bias) if groups else None

    def forward(self, t_emb: Float[Tensor, "batch dim"], mode: GateMode) -> WidthMasks:
        """Masks for every layer; where ``mode`` is "open" or frozen, no router is asked."""
        with torch.autocast(t_emb.device.type, enabled=False):
            heads, groups = (None if r is None else r(t_emb.float()) for r in (self.heads, self.groups))
        if mode == "threshold":
            return WidthMasks(*(None if x is None else self._with_fixed(threshold_gate(x)) for x in (heads, groups)))
        if not isinstance(mode, GateNoise):
            raise ValueError(f"gate mode {mode!r}: expected 'threshold' or noise")
        noisy = ((heads, mode.heads), (groups, mode.groups))
        gates = (None if x is None else gumbel_gate(x, n[..., self.fixed :], self.temperature) for x, n in noisy)
        return WidthMasks(*(None if g is None else self._with_fixed(g) for g in gates))

    def _with_fixed(self, gates: Float[Tensor, "layers batch routed"]) -> Float[Tensor, "layers batch units"]:
        return torch.cat([gates.new_ones(*gates.shape[:-1], self.fixed), gates], dim=-1)
