"""Run by torchrun, or alone: runs that enter the phase of frozen routers.

python -m tests.multiprocess.frozen WORLDS OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dydit_scale.dynamic.width import UnitRouter
from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import World, close, init_world
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import FrozenRoutersConfig
from tests.families.journey import family_recipe
from tests.multiprocess.matrix import ENGINES, run_folder

ENGINES_OF = {
    "flux/td_lora": ("zero2", "fsdp"),
    "flux/lora": ("ddp", "fsdp"),
    "flux/none": ("zero2", "fsdp"),
    "dit/none": ("zero2", "fsdp"),
    "latte-classes/td_lora": ("fsdp",),
}
RECOMPUTED = (("flux/td_lora", "fsdp"), ("dit/none", "fsdp"))
TOKENS_LEARN = ("flux/none",)


def divide_routers(put: Callable[[type, str, Any], None] = setattr) -> None:
    """Let width routers start with answers that differ over the timesteps, as they otherwise come to by training."""

    def reset(self: UnitRouter, generator: torch.Generator | None = None) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=2.0, generator=generator)
            nn.init.zeros_(self.bias)

    put(UnitRouter, "reset_parameters", reset)


def enter(worlds: Path, out: Path, kind: str, engine: str, world: World) -> None:
    """Two steps, then two of the phase, of four micro-batches each over all ranks."""
    family, learn = kind.split("/")
    recipe = family_recipe(worlds / family, family, learn, run=str(run_folder(out, kind, engine, world.world_size)))
    recompute = "full" if (kind, engine) in RECOMPUTED else "none"
    accumulation = 4 // world.world_size
    config = replace(recipe.train, steps=4, batch_size=8, accumulation=accumulation, sample_every=0, save_every=4)
    train(
        replace(
            recipe,
            cost=replace(recipe.cost, weight=0.0),  # its square is of a micro-batch over all ranks
            engine=EngineConfig(**ENGINES[engine]),
            train=replace(config, gradient_checkpointing=recompute),
            frozen_routers=FrozenRoutersConfig(from_step=2, tokens=kind not in TOKENS_LEARN),
        ),
        world,
    )


def main(worlds: Path, out: Path) -> None:
    divide_routers()
    world = init_world(device="cpu")
    for kind, engines in ENGINES_OF.items():
        for engine in engines:
            enter(worlds, out, kind, engine, world)
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
