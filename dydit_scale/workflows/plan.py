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
from dydit_scale.planning.search import Choice, search
from dydit_scale.planning.speed import GPUS, Cluster
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
    choices = _choices(planner, plan, progress=sys.stderr.isatty()) if find_others or not plan.fits else []
    if as_json:
        found = plan.as_dict()
        found["fitting"] = [{"overrides": c.overrides, **c.plan.as_dict()} for c in choices[:_SHOWN]]
        print(json.dumps(found, indent=1))
    else:
        for line in (*describe(plan), *(_advice(plan, choices) if find_others or not plan.fits else ())):
            print(line)
    return 0 if plan.fits else 1


def make_cluster(
    *,
    gpus: int,
    nodes: int,
    gpu: str,
    gpu_memory: str | None,
    tflops: float | None,
    watts: float | None,
    link: float | None,
    bandwidth: float,
) -> Cluster:
    """A cluster of a known GPU, with what was given in its place.

    Raises ValueError for an unknown one, or numbers that do not fit.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: expected one of {', '.join(GPUS)}; for another give the nearest of them and "
                         "--gpu-memory, --tflops, --watts, --link")  # fmt: skip
    known = GPUS[gpu]
    return Cluster(
        gpus=gpus,
        nodes=nodes,
        memory=int(known.memory * GIB) if gpu_memory is None else parse_memory(gpu_memory),
        tflops=known.tflops if tflops is None else tflops,
        watts=known.watts if watts is None else watts,
        link=known.link if link is None else link,
        bandwidth=bandwidth,
    )


def _choices(planner: Planner, plan: Plan, *, progress: bool) -> list[Choice]:
    return search(planner, plan.recipe, plan.cluster, progress=progress)


def _advice(plan: Plan, choices: Sequence[Choice]) -> list[str]:
    if not choices:
        return [
            "",
            "Nothing that was tried fits: add GPUs, encode the data beforehand (--encoded), or learn an adapter",
        ]
    lines = ["", "Settings that fit, the fastest first (the batch of a step is kept)"]
    for overrides, other in choices[:_SHOWN]:
        lines += [
            f"  {other.needed / GIB:6.1f} GiB, {other.speed.seconds[0]:.2f} to {other.speed.seconds[1]:.2f} s a step, "
            f"{setting(other)}",
            f"      {' '.join(overrides) or 'the recipe as it is'}",
        ]
    return lines
