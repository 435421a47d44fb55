"""The network that a recipe trains, without contents, and what stands around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn

from dydit_scale.planning.bases import Base
from dydit_scale.train.build import frozen_dtype, has_teacher, shard_units, trainable_network
from dydit_scale.train.recipe import Recipe


class Place(NamedTuple):
    """Which block of the whole network a block of the shallow one stands for."""

    number: int
    part: int
    """Number of the list of blocks that it is in."""
    is_middle: bool
    """It stands for ``times`` blocks, one behind the other (with those beside it that are repeated with it)."""
    times: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A network and its teacher on the meta device; routers on the CPU."""

    base: Base
    network: Any
    teacher: Any
    places: tuple[Place, ...]
    """Of each shard unit."""

    @classmethod
    def build(cls, recipe: Recipe, base: Base, *, shallow: bool = False) -> Planned:
        """The whole network, or one of fewer blocks to trace."""
        family, config = base.family, dict(base.config)
        period = math.lcm(recipe.train.checkpointed_blocks, _PERIOD)
        with init_empty_weights():
            static = base.network_class.from_config(config)
            whole = _lengths(static)
            if shallow:
                for name in _DEPTHS & config.keys():
                    config[name] = _depth(config[name], period)
                static = base.network_class.from_config(config)
        places = tuple(_places(_lengths(static), whole, period))
        teacher = None
        if has_teacher(recipe):
            with init_empty_weights():
                teacher = base.network_class.from_config(config).requires_grad_(False).eval()
            teacher = family.trainable(teacher)
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(frozen_dtype(recipe))
        network = trainable_network(recipe, family, family.trainable(static))
        assert len(places) == len(shard_units(network)), "blocks of the dynamic network are those of the static one"
        return cls(base=base, network=network, teacher=teacher, places=places)


_PERIOD = 2
"""Blocks repeat after so many: Latte's are spatial and temporal in turn."""
_DEPTHS = {"num_layers", "num_single_layers"}
"""Numbers of blocks in the config.json of a transformer."""


def _lengths(network: nn.Module) -> list[int]:
    return [len(part) for part in network.children() if isinstance(part, nn.ModuleList)]


def _depth(layers: int, period: int) -> int:
    """The fewest blocks with a period at the start, one in the middle and a part of one at the end."""
    return layers - period * max(0, (layers - 2 * period - 1) // period)


def _places(lengths: list[int], whole: list[int], period: int) -> Iterator[Place]:
    first = 0
    for part, (length, deep) in enumerate(zip(lengths, whole, strict=True)):
        skipped = deep - length
        for n in range(length):
            middle = bool(skipped) and period <= n < 2 * period
            yield Place(first + n + skipped * (n >= 2 * period), part, middle, 1 + skipped // period)
        first += deep


def stand_in(base: Base, network: Any) -> Any:
    """A pipeline of the family's class with what the family asks of it, around ``network``, and nothing else."""
    pipeline = object.__new__(base.family.pipeline_class)
    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    vars(pipeline).update(transformer=network, vae_scale_factor=base.vae_scale_factor, vae=vae)
    return pipeline
