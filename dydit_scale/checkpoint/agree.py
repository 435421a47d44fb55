"""What all ranks have to know alike: a result of one of them, or the failures of any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dydit_scale.parallel.world import World, broadcast_object

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank alike."""


def on_main(world: World, action: Callable[[], T]) -> T:
    """The result of ``action``, run on rank 0, on every rank; its failure is a CheckpointError on every rank."""
    result, problem = None, None
    if world.is_main:
        try:
            result = action()
        except Exception as error:  # of any kind: the other ranks wait for the verdict
            problem = error
    message, result = broadcast_object(world, (None if problem is None else str(problem), result))
    if message is not None:
        raise CheckpointError(message) from problem
    return result


def gather(world: World, value: Any) -> list[Any]:
    """Every rank's small ``value``, by rank. It travels pickled between the processes of one run. Collective."""
    if world.world_size == 1:
        return [value]
    values = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def first_problem(world: World, problem: str | None) -> str | None:
    """The problem of the first rank that has one, with its number; None if all is well. Collective."""
    for rank, text in enumerate(gather(world, problem)):
        if text is not None:
            return text if world.world_size == 1 else f"rank {rank}: {text}"
    return None
