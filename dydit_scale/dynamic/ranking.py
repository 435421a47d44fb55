"""Which heads and channels matter most, so that the always-on unit holds the best of them.

The paper sorts heads and channels by magnitude before adaptation (DyDiT section 3.2); the release leaves it out. Here
the base weights stay where they are, and the order is a table from member to unit: the static model remains itself bit
for bit, and an adapter trained on it fits the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def path_importance(into: nn.Linear, out_weight: Float[Tensor, "dim channels"]) -> Float[Tensor, " channels"]:
    """What each hidden channel can carry: the norm of its incoming weights times that of its outgoing ones."""
    return into.weight.detach().float().norm(dim=1) * out_weight.detach().float().norm(dim=0)


def head_importance(
    paths: Sequence[tuple[nn.Linear, Float[Tensor, "dim channels"]]], heads: int
) -> Float[Tensor, " heads"]:
    """Root of the summed squared importance of each head's value channels, over all streams that share the head."""
    return sum(path_importance(v, out).square().reshape(heads, -1).sum(1) for v, out in paths).sqrt()  # type: ignore[union-attr]


def units_by_rank(importance: Float[Tensor, " members"], units: int) -> Int64[Tensor, " members"]:
    """The unit of each member: the most important ones form unit 0, the next unit 1, ...; equal sizes."""
    if importance.numel() % units:
        raise ValueError(
            f"{importance.numel()} channels cannot be cut into {units} equal groups; choose another mlp_groups"
        )
    order = importance.argsort(descending=True, stable=True)
    unit_of = torch.empty_like(order)
    unit_of[order] = units_in_place(importance.numel(), units).to(order.device)
    return unit_of


def units_in_place(members: int, units: int) -> Int64[Tensor, " members"]:
    """The unit of each member when units are contiguous runs, as in the released DyDiT."""
    return torch.arange(units).repeat_interleave(members // units)
