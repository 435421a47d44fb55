"""The processes of a job, wherever its launchers have put them: all inherit one word in their environment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

VARIABLE = "DYDIT_TEST_JOB"


class Process(NamedTuple):
    """A living process of a job."""

    pid: int
    rank: int | None
    """Its rank; None for a launcher."""


def processes(job: str) -> list[Process]:
    """The launchers and ranks of ``job`` that are alive, and every process that they started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (environment := _environment(folder)).get(VARIABLE) == job:
            rank = environment.get("RANK")
            found.append(Process(int(folder.name), None if rank is None else int(rank)))
    return sorted(found)


def _environment(folder: Path) -> dict[str, str]:
    """Of a process; empty for one that is gone, is a zombie or belongs to another user."""
    try:
        words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL; processes that are gone already do not matter."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(true: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Return when ``true()``. Raises TimeoutError naming ``what`` did not happen."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:g} s: not {what}")
        time.sleep(0.02)
