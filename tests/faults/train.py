"""``python -m dydit_scale.train`` for tests of faults, set by the environment.

DYDIT_TEST_TIMEOUT=6        seconds after which a collective without answer is an error
DYDIT_TEST_HOLD=5:FOLDER    in step 5, between forward and backward, each rank writes FOLDER/held-RANK, and goes on
                            when FOLDER/go is there
DYDIT_TEST_LIMITS=FOLDER    at the end each rank writes FOLDER/limits-RANK.json: the time-outs of its groups
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from dydit_scale.parallel.world import World, close, init_world
from dydit_scale.train import __main__ as program
from dydit_scale.train import loop
from tests.faults.processes import wait_until

TIMEOUT, HOLD, LIMITS = "DYDIT_TEST_TIMEOUT", "DYDIT_TEST_HOLD", "DYDIT_TEST_LIMITS"


def impatient() -> World:
    return init_world(timedelta(seconds=float(os.environ[TIMEOUT])))


def held(train_step: Callable[..., dict[str, Any]], step: int, folder: Path) -> Callable[..., dict[str, Any]]:
    def held_step(run: loop.Run, *args: Any) -> dict[str, Any]:
        if run.step == step:
            backward = run.engine.backward

            def held_backward(*args: Any, **options: Any) -> None:
                run.engine.backward = backward
                (folder / f"held-{run.world.rank}").touch()
                wait_until((folder / "go").exists, "released")
                backward(*args, **options)

            run.engine.backward = held_backward
        return train_step(run, *args)

    return held_step


def close_and_tell(world: World) -> None:
    groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    limits = [group.options._timeout.total_seconds() for group in groups]
    (Path(os.environ[LIMITS]) / f"limits-{world.rank}.json").write_text(json.dumps(limits))
    close(world)


if __name__ == "__main__":
    if TIMEOUT in os.environ:
        program.init_world = impatient
    if HOLD in os.environ:
        number, _, where = os.environ[HOLD].partition(":")
        loop.train_step = held(loop.train_step, int(number), Path(where))
    if LIMITS in os.environ:
        program.close = close_and_tell
    sys.exit(program.main())
