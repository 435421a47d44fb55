"""A LoRA in the layer names of an original checkpoint, where several of diffusers' layers are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dydit_scale.models.keys.rules import Rule

WEIGHT = ".weight"


class LowRank(NamedTuple):
    """The update ``up @ down`` of one linear layer."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]


def fused_loras(
    loras: Mapping[str, LowRank], rules: Sequence[Rule], shapes: Mapping[str, Sequence[int]]
) -> dict[str, LowRank]:
    """The same updates by the original's layers; exact.

    Layers that the original fuses keep their own rank inside a common one: ``down`` stacks theirs, and ``up`` is zero
    outside each one's rows and columns.

    Args:
        loras: By diffusers' layer.
        rules: Of the layout (``Layout.rules``).
        shapes: Of diffusers' weights, by their names; those of fused layers without a LoRA are needed too.

    Raises ValueError for a layer that has no place in the original layout.
    """
    found: dict[str, LowRank] = {}
    placed: set[str] = set()
    for rule in rules:
        layers = [name.removesuffix(WEIGHT) for name in rule.ours if name.endswith(WEIGHT)]
        adapted = [name for name in layers if name in loras]
        if not adapted or len(rule.originals) != 1:
            continue
        rank, column, ups = sum(len(loras[name].down) for name in adapted), 0, []
        for name in layers:
            up = torch.zeros(shapes[name + WEIGHT][0], rank)
            if name in loras:
                end = column + len(loras[name].down)
                up[:, column:end] = loras[name].up
                column = end
            ups.append(up)
        (fused,) = rule.back(ups)
        found[rule.originals[0].removesuffix(WEIGHT)] = LowRank(torch.cat([loras[n].down for n in adapted]), fused)
        placed.update(adapted)
    if homeless := sorted(set(loras) - placed):
        raise ValueError(f"{homeless[0]} has no place in the original layout ({len(homeless)} such layers in all)")
    return found


def with_fused_loras(
    weights: Mapping[str, Tensor], loras: Mapping[str, LowRank], rules: Sequence[Rule]
) -> dict[str, Tensor]:
    """Diffusers' weights after the original ones they come from have taken the updates; only those that changed.

    Raises ValueError for an update of a layer that the original layout does not have.
    """
    changed: dict[str, Tensor] = {}
    used = set()
    for rule in rules:
        layer = rule.originals[0].removesuffix(WEIGHT) if len(rule.originals) == 1 else ""
        if layer not in loras or not rule.originals[0].endswith(WEIGHT):
            continue
        (original,) = rule.back([weights[name].float() for name in rule.ours])
        updated = original + loras[layer].up.float() @ loras[layer].down.float()
        changed.update(zip(rule.ours, rule.forward([updated]), strict=True))
        used.add(layer)
    if unknown := sorted(set(loras) - used):
        raise ValueError(f"{unknown[0]} is no layer of the original layout ({len(unknown)} such in all)")
    return changed
