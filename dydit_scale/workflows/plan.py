"""From a recipe and a description of the cluster to a plan on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dydit_scale.planning.bases import find_base
from dydit_scale.planning.memory import GIB
from dydit_scale.planning.plan import Plan, Planner, parse_memory
from dydit_scale.planning.search import Choice, Found, search
from dydit_scale.planning.speed import GPUS, Cluster, even_nodes
from dydit_scale.planning.table import describe, setting
from dydit_scale.train.recipe import load_recipe

_SHOWN = 3
"""Settings that a search prints."""


def plan_recipe(
    path: Path,
    overrides: Sequence[str],
    cluster: Mapping[str, Any],
    *,
    encoded: bool | None,
    find_others: bool,
    as_json: bool,
) -> int:
    """Print the plan; 0 if it fits, 1 if not.

    Args:
        cluster: values of the command line, None where none was given.

    Raises ValueError for a recipe or a cluster that cannot be.
    """
    recipe = load_recipe(path, overrides)
    place = make_cluster(**cluster)
    planner = Planner(find_base(recipe.model.base), encoded=encoded)
    plan = planner.plan(recipe, place)
    found = search(planner, recipe, place, progress=sys.stderr.isatty()) if find_others or not plan.fits else None
    if as_json:
        print(json.dumps(_as_dict(plan, found), indent=1))
    else:
        for line in (*describe(plan), *(_advice(found, place) if found is not None else ())):
            print(line)
    return 0 if plan.fits else 1


def make_cluster(
    *,
    gpus: int,
    nodes: int | None,
    gpu: str,
    gpu_memory: str | None,
    tflops: float | None,
    watts: float | None,
    link: float | None,
    bandwidth: float,
) -> Cluster:
    """A cluster of a known GPU, with what was given in its place; nodes of at most eight GPUs.

    Raises ValueError for an unknown one, or numbers that do not fit.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: expected one of {', '.join(GPUS)}; for another give the nearest of them and "
                         "--gpu-memory, --tflops, --watts, --link")  # fmt: skip
    known = GPUS[gpu]
    return Cluster(
        gpus=gpus,
        nodes=even_nodes(gpus) if nodes is None else nodes,
        memory=int(known.memory * GIB) if gpu_memory is None else parse_memory(gpu_memory),
        tflops=known.tflops if tflops is None else tflops,
        watts=known.watts if watts is None else watts,
        link=known.link if link is None else link,
        bandwidth=bandwidth,
    )


def _as_dict(plan: Plan, found: Found | None) -> dict[str, Any]:
    values = plan.as_dict() | {"fitting": [], "least": None}
    if found is not None:
        values["fitting"] = [_choice_as_dict(choice) for choice in found.fitting[:_SHOWN]]
        values["least"] = _choice_as_dict(found.least)
    return values


def _choice_as_dict(choice: Choice) -> dict[str, Any]:
    return {"overrides": choice.overrides, **choice.plan.as_dict()}


def _advice(found: Found, cluster: Cluster) -> list[str]:
    if not found.fitting:
        missing = found.least.plan.needed - cluster.memory
        return [
            "",
            f"Nothing that was tried fits, offloading included. {missing / GIB:.1f} GiB are missing for the least:",
            *_lines(found.least),
            "Add GPUs, encode the data beforehand (--encoded), or learn an adapter",
        ]
    lines = [line for choice in found.fitting[:_SHOWN] for line in _lines(choice)]
    return ["", "Settings that fit, the fastest first (the batch of a step is kept)", *lines]


def _lines(choice: Choice) -> list[str]:
    plan = choice.plan
    fast, slow = plan.speed.seconds
    return [
        f"  {plan.needed / GIB:6.1f} GiB, {fast:.2f} to {slow:.2f} s a step, {setting(plan)}",
        f"      {' '.join(choice.overrides) or 'the recipe as it is'}",
    ]
