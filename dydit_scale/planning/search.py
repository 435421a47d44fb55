"""Which settings of a recipe fit, and which of those cost least."""

from __future__ import annotations

from collections.abc import Iterator
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


_ENGINES = (("ddp", 0), ("zero", 1), ("zero", 2), ("fsdp", 0), ("zero", 3))


def search(planner: Planner, recipe: Recipe, cluster: Cluster, *, progress: bool = True) -> list[Choice]:
    """The settings that fit, the fastest first; the batch of a step stays as it is.

    Of equally fast ones the first is the one that needs least of the cluster's memory. Micro-batches that are larger
    than one that does not fit are not tried.
    """
    found = []
    kinds = ("none", "selective", "full")
    sizes = list(_micro_batches(recipe, cluster))
    bar = tqdm(total=len(kinds) * len(sizes), desc="settings", unit="trace", disable=not progress, leave=False)
    for kind in kinds:
        for micro in sizes:
            accumulation = recipe.train.batch_size // cluster.gpus // micro
            changed = with_changes(recipe, train__gradient_checkpointing=kind, train__accumulation=accumulation)
            fitting = [p for p in _plans(planner, changed, cluster) if p.fits]
            found += [Choice(_overrides(plan, recipe), plan) for plan in fitting]
            bar.update()
            if not fitting:
                break
    bar.close()
    return sorted(found, key=lambda c: (float(f"{sum(c.plan.speed.seconds):.3g}"), c.plan.needed))


def _micro_batches(recipe: Recipe, cluster: Cluster) -> Iterator[int]:
    of_rank = recipe.train.batch_size // cluster.gpus
    for micro in range(1, of_rank + 1):
        if of_rank % micro == 0 and not (recipe.data.unit and recipe.data.unit % micro):
            yield micro


def _plans(planner: Planner, recipe: Recipe, cluster: Cluster) -> Iterator[Plan]:
    engines = _ENGINES if cluster.gpus > 1 else (("single", 0),)
    for name, stage in engines:
        changes: dict[str, Any] = {"engine__name": name, "engine__offload": "none", "engine__shard_ranks": None}
        changes |= {"engine__zero_stage": stage or recipe.engine.zero_stage}
        if name != "zero":
            changes["engine__deepspeed"] = None
        yield planner.plan(with_changes(recipe, **changes), cluster)


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
