"""Run by torchrun: adapts every family under the folder that is given, with both engines in turn."""

from __future__ import annotations

import sys
from pathlib import Path

from dydit_scale.parallel.world import close, init_world
from dydit_scale.train.loop import train
from tests.families.journey import ADAPTERS, FAMILIES, family_recipe

ENGINES = ("zero", "fsdp")


def main(folder: Path) -> None:
    world = init_world(device="cpu")
    for n, family in enumerate(FAMILIES):
        for m, adapter in enumerate(ADAPTERS):
            engine = ENGINES[(n + m) % 2]  # each family meets both
            run = folder / family / f"two-{adapter}"
            train(family_recipe(folder / family, family, adapter, run=str(run), engine={"name": engine}), world)
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
