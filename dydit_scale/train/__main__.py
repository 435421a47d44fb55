"""``python -m dydit_scale.train RECIPE [--resume] [key=value ...]``, also under torchrun and the deepspeed launcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta

from dydit_scale.checkpoint.store import CheckpointError
from dydit_scale.data.loader import BadDataError
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.parallel.world import ONE_PROCESS, close, init_world
from dydit_scale.train.attempt import FolderInUseError
from dydit_scale.train.exits import Exit, note
from dydit_scale.train.guard import NotFiniteError
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import load_recipe
from dydit_scale.train.stopping import Stopped, StopRequest

CODES: dict[type[Exception], Exit] = {
    CheckpointError: Exit.STUCK,
    NotFiniteError: Exit.NOT_FINITE,
    FolderInUseError: Exit.FAILED,
    BadDataError: Exit.BAD_DATA,
    ValueError: Exit.BAD_CONFIG,
}
"""The first that fits counts. What is not among them is raised, and Python exits with 1."""


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Train, and return one of :class:`~dydit_scale.train.exits.Exit`."""
    parser = argparse.ArgumentParser(prog="python -m dydit_scale.train", description="Train as a recipe says.")
    parser.add_argument("recipe", help="YAML file, e.g. recipes/shapes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=1e-4")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest good checkpoint")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    world = ONE_PROCESS
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        world = init_world(timedelta(seconds=recipe.limits.collective))
        train(recipe, world, resume=args.resume, stop=stop)
    except Stopped as stopped:
        if world.is_main:
            print(stopped, flush=True)
        close(world)
        return Exit.STOPPED
    except tuple(CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        return next(code for kind, code in CODES.items() if isinstance(error, kind))
    close(world)
    return Exit.DONE


if __name__ == "__main__":
    request = StopRequest().catch_signals()
    note(Exit.FAILED)  # until it is known better
    code = main(stop=request)
    note(code)
    sys.exit(code)
