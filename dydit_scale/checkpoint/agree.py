"""What all ranks have to know alike: a result of one of them, or the failures of any."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dydit_scale.checkpoint.errors import CheckpointError
from dydit_scale.parallel.world import World, gather_objects
from dydit_scale.parallel.world import on_main as run_on_main

T = TypeVar("T")


def on_main(world: World, action: Callable[[], T]) -> T:
    """The result of ``action``, run on rank 0, on every rank; its failure is a CheckpointError on every rank."""
    try:
        return run_on_main(world, action)
    except Exception as error:
        raise CheckpointError(str(error)) from error


def first_problem(world: World, problem: str | None) -> str | None:
    """The problem of the first rank that has one, with its number; None if all is well. Collective."""
    for rank, text in enumerate(gather_objects(world, problem)):
        if text is not None:
            return text if world.world_size == 1 else f"rank {rank}: {text}"
    return None
