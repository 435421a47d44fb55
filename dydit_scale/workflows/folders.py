"""A folder that all ranks of one command fill, and another command must not."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dydit_scale.parallel.world import World, on_main


@contextmanager
def locked(folder: Path, world: World, name: str, doing: str) -> Iterator[None]:
    """Make ``folder``, and hold its lock on rank 0 inside the ``with``; ValueError on every rank if another process
    does.

    Args:
        name: of the lock's file.
        doing: what a holder does there, such as "encodes into it".
    """
    lock = on_main(world, lambda: _lock(folder, name, doing))
    try:
        yield
    finally:
        if world.is_main:
            os.close(lock)


def _lock(folder: Path, name: str, doing: str) -> int:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file is in the place of the folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ValueError(f"{folder}: another process {doing}; wait for it, or choose another folder") from error
    return handle


@contextmanager
def told_when_full(folder: Path, goes_on_with: str) -> Iterator[None]:
    """Turn a full disk's OSError into a ValueError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: the disk is full; free some space and run the command again, it goes on with {goes_on_with}"
        ) from error
