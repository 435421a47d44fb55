"""Routers that do not learn: the controls that tell what learning where to save is worth.

Both are made before training and stand still; the weights adapt to them. ``uniform``: the same heads and channels of
every layer at every timestep, the most important ones by magnitude, and no token is skipped; what structured pruning
does. ``random``: learned by nobody, but as free as the method's own: each unit works at a random part of the timesteps,
tokens are chosen by a random projection of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inference_masks import equal_keep, shifted
from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.data.loader import make_loader, open_data
from dydit_scale.dynamic.cost import KeepRates, ModelCost
from dydit_scale.dynamic.width import UnitRouter
from dydit_scale.models.registry import family_of
from dydit_scale.train.build import Parts, build_parts
from dydit_scale.train.frozen import even_numbers
from dydit_scale.train.objective import Objective, sample_size
from dydit_scale.train.recipe import Recipe

Build = Callable[..., Parts]
SURE = 1e3
"""Size of a logit that no noise overrules."""
NEAR = 0.03
"""How far from the target ratio uniform width may be."""
CALIBRATION = 64
"""Samples from which the thresholds of random token routers are found."""


def uniform(recipe: Recipe, *, text_encoders: bool = True) -> Parts:
    """The recipe's network with the same width everywhere, at its target ratio."""
    parts = build_parts(recipe, text_encoders=text_encoders)
    units = parts.network.config["num_attention_heads"]
    heads, groups = nearest_widths(_cost(recipe, parts), units, recipe.cost.target)
    router = parts.network.dy_width
    with torch.no_grad():
        for which, kept in ((router.heads, heads), (router.groups, groups)):
            works = torch.arange(1, which.bias.shape[1] + 1) < kept  # unit 0 always does and has no logit
            which.weight.zero_()
            which.bias.copy_(torch.where(works, SURE, -SURE).expand_as(which.bias))
    return _held(parts)


def nearest_widths(cost: ModelCost, units: int, target: float) -> tuple[int, int]:
    """Numbers of heads and of channel groups: the most equal pair that costs the target ratio but for ``NEAR``, and of
    those the nearest to it; the nearest of all where none does."""

    def rank(pair: tuple[int, int]) -> tuple[float, ...]:
        rates = (torch.full((len(cost.blocks), 1), n / units) for n in pair)
        off = abs(float(cost.dynamic(KeepRates(*rates, torch.ones(len(cost.blocks), 1))) / cost.static) - target)
        return (0, abs(pair[0] - pair[1]), off) if off <= NEAR else (1, off)

    return min(product(range(1, units + 1), repeat=2), key=rank)


def random(recipe: Recipe, *, text_encoders: bool = True) -> Parts:
    """The recipe's network with random routers that cost about its target ratio."""
    parts = build_parts(recipe, text_encoders=True)
    network, cost = parts.network, _cost(recipe, parts)
    keep = equal_keep(cost, recipe.cost.target)
    generator = torch.Generator().manual_seed(recipe.seed)
    objective = Objective(recipe, network, parts.pipeline, None, torch.device("cpu"))
    timesteps = objective.process.timestep(objective.process.even_levels(even_numbers()))
    t_emb = network.routing_embedding(timesteps.float())
    with torch.no_grad():
        for router in (network.dy_width.heads, network.dy_width.groups):
            _randomise_width(router, t_emb, keep, generator)
        _randomise_tokens(recipe, objective, keep, generator)
    return _held(parts)


def _randomise_width(router: UnitRouter, t_emb: Tensor, keep: float, generator: torch.Generator) -> None:
    """Every unit works at a random share of the timesteps, ``keep`` of them on average; unit 0 at all, so the others
    make up for it."""
    units = router.bias.shape[1] + 1
    share = min(1.0, max(0.0, (keep * units - 1) / (units - 1)))
    centred = t_emb - t_emb.mean(0)
    router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    logits = torch.einsum("bd,lud->lub", centred, router.weight)
    threshold = logits.quantile(1 - share, dim=-1)
    router.bias.copy_(-threshold - torch.einsum("d,lud->lu", t_emb.mean(0), router.weight))
    router.weight.mul_(SURE)
    router.bias.mul_(SURE)


def _randomise_tokens(recipe: Recipe, objective: Objective, keep: float, generator: torch.Generator) -> None:
    """A random projection scores the tokens; the share ``keep`` of highest score works, over a batch of training
    data."""
    routers = [block.dy_token for block in objective.network.dynamic_blocks()]
    for router in routers:
        for linear in (m for m in router.modules() if isinstance(m, nn.Linear)):
            bound = linear.in_features**-0.5
            linear.weight.copy_(bound * torch.randn(linear.weight.shape, generator=generator))
        router.up.bias.zero_()
    loader = make_loader(
        recipe.data, open_data(recipe.data), seed=recipe.seed, rank=0, world_size=1, global_batch=CALIBRATION,
        micro_batch=CALIBRATION, consumed=0,
    )  # fmt: skip
    batch = next(iter(loader))
    levels = objective.process.even_levels((torch.arange(CALIBRATION) + 0.5) / CALIBRATION)
    inputs = objective.prepare(batch, levels, recipe.seed)
    with shifted(routers, [keep] * len(routers)) as shifts:
        objective.forward_dynamic(objective.network, inputs, "threshold")
    for router, shift in zip(routers, shifts, strict=True):
        router.up.weight.mul_(SURE)
        router.up.bias.fill_(SURE * float(shift))


def _cost(recipe: Recipe, parts: Parts) -> ModelCost:
    return family_of(parts.pipeline).cost(parts.network, parts.pipeline, sample_size(recipe), recipe.model.text_tokens)


def _held(parts: Parts) -> Parts:
    """The routers learn nothing."""
    for name, parameter in parts.network.named_parameters():
        if is_dynamic_name(name):
            parameter.requires_grad_(False)
    return parts


BUILDS: dict[str, Any] = {"uniform": uniform, "random": random}
