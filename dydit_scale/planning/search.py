"""Which settings of a recipe fit, and which of those cost least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dydit_scale.planning.plan import Plan, Planner, with_changes
from dydit_scale.planning.speed import Cluster
from dydit_scale.train.recipe import Recipe


class Choice(NamedTuple):
    """Settings and what they lead to."""

    overrides: tuple[str, ...]
    """What to add to the command line."""
    plan: Plan


class Found(NamedTuple):
    """What a search came to."""

    fitting: list[Choice]
    """Those that fit, the fastest first."""
    least: Choice
    """Of all that were tried the one that needs least of a GPU's memory."""


class _Kind(NamedTuple):
    """Of an engine."""

    name: str
    zero_stage: int = 0
    offload: str = "none"


_ALONE = (_Kind("single"),)
_SEVERAL = (_Kind("ddp"), _Kind("zero", 1), _Kind("zero", 2), _Kind("fsdp"), _Kind("zero", 3))
_OFFLOADED = (
    _Kind("zero", 2, "optimizer"),
    _Kind("zero", 3, "optimizer"),
    _Kind("zero", 3, "parameters"),
    _Kind("fsdp", 0, "parameters"),
)


def search(planner: Planner, recipe: Recipe, cluster: Cluster, *, progress: bool = True) -> Found:
    """The settings that fit; the batch of a step stays as it is. Offloading is tried only where nothing else fits.

    Of equally fast ones the first is the one that needs least of the cluster's memory. Micro-batches that are larger
    than one that does not fit are not tried.
    """
    tried: list[Choice] = []
    for kinds in (_SEVERAL if cluster.gpus > 1 else _ALONE, _OFFLOADED):
        tried += _try(planner, recipe, cluster, kinds, progress=progress)
        if any(choice.plan.fits for choice in tried):
            break
    fitting = [choice for choice in tried if choice.plan.fits]
    fitting.sort(key=lambda c: (float(f"{sum(c.plan.speed.seconds):.3g}"), c.plan.needed))
    return Found(fitting, min(tried, key=lambda c: c.plan.needed))


def _try(
    planner: Planner, recipe: Recipe, cluster: Cluster, kinds: Sequence[_Kind], *, progress: bool
) -> Iterator[Choice]:
    recomputed = ("none", "selective", "full")
    sizes = list(_micro_batches(recipe, cluster))
    with tqdm(
        total=len(recomputed) * len(sizes), desc="settings", unit="trace", disable=not progress, leave=False
    ) as bar:
        for blocks in recomputed:
            for micro in sizes:
                accumulation = recipe.train.batch_size // cluster.gpus // micro
                changed = with_changes(recipe, train__gradient_checkpointing=blocks, train__accumulation=accumulation)
                plans = [planner.plan(_with_engine(changed, kind), cluster) for kind in kinds]
                yield from (Choice(_overrides(plan, recipe), plan) for plan in plans)
                bar.update()
                if not any(plan.fits for plan in plans):
                    break


def _micro_batches(recipe: Recipe, cluster: Cluster) -> Iterator[int]:
    of_rank = recipe.train.batch_size // cluster.gpus
    for micro in range(1, of_rank + 1):
        if of_rank % micro == 0 and not (recipe.data.unit and recipe.data.unit % micro):
            yield micro


def _with_engine(recipe: Recipe, kind: _Kind) -> Recipe:
    changes: dict[str, Any] = {"engine__name": kind.name, "engine__offload": kind.offload, "engine__shard_ranks": None}
    changes |= {"engine__zero_stage": kind.zero_stage or recipe.engine.zero_stage}
    if kind.name != "zero":
        changes["engine__deepspeed"] = None
    return with_changes(recipe, **changes)


def _overrides(plan: Plan, recipe: Recipe) -> tuple[str, ...]:
    """What differs from the recipe."""
    new, parts = plan.recipe, []
    for part, keys in (("engine", ("name", "zero_stage", "offload", "shard_ranks", "deepspeed")),
                       ("train", ("accumulation", "gradient_checkpointing"))):  # fmt: skip
        for key in keys:
            value = getattr(getattr(new, part), key)
            skip = key == "zero_stage" and new.engine.name != "zero"
            if value != getattr(getattr(recipe, part), key) and not skip:
                parts.append(f"{part}.{key}={'null' if value is None else value}")
    return tuple(parts)
