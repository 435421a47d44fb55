"""``python -m dydit_scale.train RECIPE [--resume] [key=value ...]``, also under torchrun and the deepspeed launcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dydit_scale.checkpoint.store import CheckpointError
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.parallel.world import close, init_world
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import load_recipe

EXIT_BAD_CONFIG = 64
EXIT_CHECKPOINT = 74


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 64 for a mistake in the recipe, the data or the base, which a restart would not mend; 74 if no
    checkpoint could be written or read."""
    parser = argparse.ArgumentParser(prog="python -m dydit_scale.train", description="Train as a recipe says.")
    parser.add_argument("recipe", help="YAML file, e.g. recipes/shapes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=1e-4")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest good checkpoint")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        world = init_world()
        train(recipe, world, resume=args.resume)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CHECKPOINT
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    close(world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
