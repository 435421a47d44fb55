"""The processes of one run: who this one is, and how all of them meet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all of them; the default is one process alone on the CPU."""

    rank: int = 0
    """Number of this process, 0 to world_size - 1."""
    world_size: int = 1
    """Number of processes of the run, over all machines."""
    local_rank: int = 0
    """Number of this process on its machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"World: expected 0 <= rank < world_size, got rank {self.rank} of {self.world_size}")

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


ONE_PROCESS = World()


def init_world(timeout: timedelta = timedelta(minutes=10), *, device: str = "auto") -> World:
    """Join the processes that torchrun or the deepspeed launcher started; without their environment, be one process.

    ``timeout`` bounds every collective, so that a lost peer is an error and not a hang. ``device`` is "auto" (CUDA if
    there is any), "cpu" or "cuda". NCCL is used on CUDA, gloo on the CPU. One process joins nothing. From here on
    this thread, and every thread it starts, takes subnormal numbers for zero.

    Raises ValueError if the launcher's environment is incomplete.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and (missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]):
        raise ValueError(
            f"environment: WORLD_SIZE={world_size}, but {', '.join(missing)} not set; start with torchrun or deepspeed"
        )
    # The CPU's GELU (tanh) takes three times as long where it meets subnormals, a small FLUX's step a fifth longer.
    torch.set_flush_denormal(True)
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world = World(rank, world_size, local_rank, _pick_device(device, local_rank))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            _backend(world.device), store=_attempt_store(timeout), rank=rank, world_size=world_size, timeout=timeout
        )
    return world


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    raise ValueError(f"init_world: device: expected auto, cpu or cuda, got {device!r}")


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _attempt_store(timeout: timedelta) -> dist.Store:
    """A store of this attempt's own: torchrun restarts in one TCP store, where a new attempt reads stale addresses."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def ensure_group(world: World) -> None:
    """Give one process alone the process group that the sharding engines ask for; no port is opened."""
    if dist.is_initialized():
        return
    assert world.world_size == 1, "several processes meet in init_world"
    dist.init_process_group(_backend(world.device), store=dist.HashStore(), rank=0, world_size=1)


def same_timeout() -> None:
    """Give every process group of this process, whoever made it, the timeout of the first."""
    assert dist.group.WORLD is not None
    backend = dist.group.WORLD._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(backend.options._timeout, group)


def broadcast_object(world: World, value: Any) -> Any:
    """Rank 0's ``value`` on every rank. It travels pickled between the processes of one run, never through a file."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def gather_objects(world: World, value: T) -> list[T]:
    """Every rank's ``value``, in the order of ranks, on every rank; pickled on the way as in ``broadcast_object``."""
    if world.world_size == 1:
        return [value]
    found: list[Any] = [None] * world.world_size
    dist.all_gather_object(found, value)
    return found


def on_main(world: World, action: Callable[[], T]) -> T:
    """The result of ``action``, run on rank 0, on every rank; what it raises is raised on every rank. Collective."""
    result, problem = None, None
    if world.is_main:
        try:
            result = action()
        except Exception as error:  # of any kind: the other ranks wait for the verdict
            problem = error
    result, problem = broadcast_object(world, (result, problem))
    if problem is not None:
        raise problem
    return result


def barrier(world: World) -> None:
    """Return when every rank has come here."""
    if world.world_size > 1:
        dist.barrier()


def close(world: World) -> None:
    """Leave the others. Call it once, at the end of a run that went well; no engine works in this process afterwards.

    One process alone keeps its group, so that it may make another engine: DeepSpeed never forgets its first group.
    """
    if world.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
