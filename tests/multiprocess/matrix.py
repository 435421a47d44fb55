"""Run by torchrun, or alone: the first steps of families, of what may learn and of engines, all against each other.

python -m tests.multiprocess.matrix WORLDS OUT
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import World, barrier, close, init_world
from dydit_scale.train.loop import train
from tests.families.journey import family_recipe

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "zero1": {"name": "zero", "zero_stage": 1},
    "zero2": {"name": "zero", "zero_stage": 2},
    "zero3": {"name": "zero", "zero_stage": 3},
    "fsdp": {"name": "fsdp"},
    "elastic": {"name": "fsdp"},
    "hybrid": {"name": "fsdp", "shard_ranks": 2, "reshard": False},
}
KINDS = ("flux/routers", "flux/td_lora", "flux/none", "dit/none", "latte-classes/td_lora")
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        kind: ("single",) for kind in ("flux/routers", "flux/td_lora", "flux/none", "dit/none", "latte-classes/td_lora")
    },
    2: {
        "flux/routers": ("zero1", "fsdp"),
        "flux/td_lora": ("ddp", "zero2", "zero3", "fsdp"),
        "flux/none": ("zero2", "zero3", "fsdp"),
        "dit/none": ("zero3",),
        "latte-classes/td_lora": ("fsdp",),
    },
    4: {"flux/td_lora": ("ddp", "zero3"), "flux/none": ("zero3", "hybrid")},
}
"""Numbers of ranks, families and what learns there, engines."""
RECOMPUTED = ("ddp", "zero3", "fsdp")


ELASTIC = "flux/td_lora"
"""Saved amid a run by ZeRO-3 on two ranks and finished by FSDP2 on four."""


def run_folder(out: Path, kind: str, engine: str, ranks: int) -> Path:
    return out / kind / f"{engine}@{ranks}"


def first_steps(worlds: Path, out: Path, kind: str, engine: str, world: World, *, resume: bool = False) -> None:
    """Three steps of two micro-batches each; some engines recompute their blocks."""
    family, learn = kind.split("/")
    recipe = family_recipe(worlds / family, family, learn, run=str(run_folder(out, kind, engine, world.world_size)))
    changes: dict[str, Any] = {"steps": 3, "batch_size": 8, "accumulation": 2, "sample_every": 0, "save_every": 2}
    if engine in RECOMPUTED:
        changes["gradient_checkpointing"] = "full"
    config = EngineConfig(**ENGINES[engine])
    train(replace(recipe, engine=config, train=replace(recipe.train, **changes)), world, resume=resume)


def main(worlds: Path, out: Path) -> None:
    world = init_world(device="cpu")
    train_all(worlds, out, world)
    if world.world_size == 4:
        go_on(worlds, out, world)
    close(world)


def go_on(worlds: Path, out: Path, world: World) -> None:
    """Finish what two ranks had done before the last step."""
    folder = run_folder(out, ELASTIC, "elastic", 4)
    if world.is_main:
        shutil.copytree(run_folder(out, ELASTIC, "zero3", 2), folder)
        shutil.rmtree(sorted((folder / "checkpoints").glob("step-*"))[-1])
    barrier(world)
    first_steps(worlds, out, ELASTIC, "elastic", world, resume=True)


def train_all(worlds: Path, out: Path, world: World) -> None:
    for kind, engines in CASES[world.world_size].items():
        for engine in engines:
            first_steps(worlds, out, kind, engine, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
