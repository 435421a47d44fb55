"""Run by torchrun, or alone: three steps whose micro-batches have several sizes, also from rank to rank.

python -m tests.multiprocess.sizes WORLDS OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import World, close, init_world
from dydit_scale.train import loop
from tests.families.journey import family_recipe
from tests.train.sizes import SizedLoader

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "zero2": {"name": "zero", "zero_stage": 2},
    "zero3": {"name": "zero", "zero_stage": 3},
    "fsdp": {"name": "fsdp"},
}
BATCH, MICRO = 8, 2
RUNS: dict[int, tuple[tuple[str, str, bool], ...]] = {
    1: (("flux", "single", False), ("latte", "single", False)),
    2: (
        *(("flux", engine, False) for engine in ("zero2", "zero3", "fsdp")),
        ("latte", "fsdp", False),
        ("flux", "zero2", True),
        ("flux", "fsdp", True),
    ),
}
"""Numbers of ranks, families, engines, and whether the cost loss acts."""


def run_folder(out: Path, family: str, engine: str, *, cost: bool) -> Path:
    return out / f"{family}-{engine}-{'cost' if cost else 'free'}"


def train_sizes(worlds: Path, out: Path, family: str, engine: str, world: World, *, cost: bool) -> None:
    """Micro-batches of two samples, whoever takes them.

    Without ``cost`` the loss is a sum over samples, and the ranks make no difference; the cost loss looks at the
    micro-batches that run at the same time.
    """
    recipe = family_recipe(worlds / family, family, "none", run=str(run_folder(out, family, engine, cost=cost)))
    changes: dict[str, Any] = {
        "steps": 3, "batch_size": BATCH, "accumulation": BATCH // MICRO // world.world_size, "evaluate_every": 0,
        "sample_every": 0, "gradient_checkpointing": "full" if engine == "fsdp" else "none",
    }  # fmt: skip
    recipe = replace(
        recipe, engine=EngineConfig(**ENGINES[engine]), train=replace(recipe.train, **changes),
        cost=replace(recipe.cost, weight=recipe.cost.weight * cost),
    )  # fmt: skip
    loop.train(recipe, world)


def main(worlds: Path, out: Path) -> None:
    loop.make_loader = SizedLoader  # type: ignore[assignment]
    world = init_world(device="cpu")
    for family, engine, cost in RUNS[world.world_size]:
        train_sizes(worlds, out, family, engine, world, cost=cost)
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
