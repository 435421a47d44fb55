"""Run by torchrun, or alone: the first steps of families, of what may learn and of engines, all against each other.

python -m tests.multiprocess.matrix WORLDS OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import ONE_PROCESS, World, close, init_world
from dydit_scale.train.loop import train
from tests.families.journey import family_recipe

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "zero1": {"name": "zero", "zero_stage": 1},
    "zero2": {"name": "zero", "zero_stage": 2},
    "zero3": {"name": "zero", "zero_stage": 3},
    "fsdp": {"name": "fsdp"},
    "hybrid": {"name": "fsdp", "shard_ranks": 2, "reshard": False},
}
LEARN = {"flux": ("routers", "td_lora", "none"), "dit": ("none",), "latte-classes": ("td_lora",)}
KINDS = [f"{family}/{learn}" for family, learns in LEARN.items() for learn in learns]
AT = {1: ("single",), 2: ("ddp", "zero1", "zero2", "zero3", "fsdp"), 4: ("ddp", "zero3", "hybrid")}
RECOMPUTED = ("ddp", "zero3", "fsdp")


def run_folder(out: Path, kind: str, engine: str, ranks: int) -> Path:
    return out / kind / f"{engine}@{ranks}"


def first_steps(worlds: Path, out: Path, kind: str, engine: str, world: World) -> None:
    """Three steps of two micro-batches each; some engines recompute their blocks."""
    family, learn = kind.split("/")
    recipe = family_recipe(worlds / family, family, learn, run=str(run_folder(out, kind, engine, world.world_size)))
    changes: dict[str, Any] = {"steps": 3, "batch_size": 8, "accumulation": 2, "sample_every": 0}
    if engine in RECOMPUTED:
        changes["gradient_checkpointing"] = "full"
    config = EngineConfig(**ENGINES[engine])
    train(replace(recipe, engine=config, train=replace(recipe.train, **changes)), world)


def main(worlds: Path, out: Path) -> None:
    world = init_world(device="cpu")
    for kind in KINDS if world.world_size < 4 else KINDS[1:4]:
        for engine in AT[world.world_size]:
            first_steps(worlds, out, kind, engine, world)
    close(world)


def alone(worlds: Path, out: Path) -> None:
    """The runs of one process, to compare with."""
    for kind in KINDS:
        first_steps(worlds, out, kind, "single", ONE_PROCESS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
