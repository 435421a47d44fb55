"""Run by torchrun: adapts every family under the folder that is given, with both engines in turn.

Then every rank loads what it made, packs it and draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dydit_scale.parallel.world import close, init_world
from dydit_scale.sampling.generate import generate, sampler_timesteps
from dydit_scale.train.loop import train
from dydit_scale.workflows.runs import load_run, sample_config
from tests.families.journey import ADAPTERS, FAMILIES, family_recipe, prompt

ENGINES = ("zero", "fsdp")


def main(folder: Path) -> None:
    world = init_world(device="cpu")
    for n, family in enumerate(FAMILIES):
        for m, adapter in enumerate(ADAPTERS):
            engine = ENGINES[(n + m) % 2]  # each family meets both
            run = folder / family / f"two-{adapter}"
            train(family_recipe(folder / family, family, adapter, run=str(run), engine={"name": engine}), world)
            draw(run, family, world.rank)
    close(world)


def draw(folder: Path, family: str, rank: int) -> None:
    run = load_run(folder, device="cpu")
    config = sample_config(run, steps=2, cfg=2.0)
    masked = generate(run.pipeline, [prompt(family)], config, first=rank)
    run.network.pack(sampler_timesteps(run.pipeline, config))
    packed = generate(run.pipeline, [prompt(family)], config, first=rank)
    assert np.abs(packed.astype(int) - masked.astype(int)).max() <= 1, (family, folder)  # rounding to bytes
    assert masked.std() > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
