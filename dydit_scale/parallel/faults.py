"""Named points at which a process can be made to fail, so that every fault can be provoked.

    DYDIT_FAULT=checkpoint.written@rank1:kill            rank 1 dies by SIGKILL after its first checkpoint's files
    DYDIT_FAULT=train.step=7@rank0:hang                  rank 0 stops answering in step 7
    DYDIT_FAULT=train.loss=5@rank1:nan,train.step=9:term   several, separated by commas

A fault is POINT[=N][@rankR][@attemptA]:ACTION. N is the training step at which it strikes (else: the first time),
A the number of restarts by the launcher. Each strikes once in a process.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from functools import lru_cache
from typing import NamedTuple

VARIABLE = "DYDIT_FAULT"
POINTS = (
    "train.start",  # the run is built, nothing is trained yet
    "train.step",  # before the first micro-batch of a step
    "train.loss",  # action nan, inf or spike (a thousandfold): the loss of this rank's first micro-batch
    "train.evaluate",
    "data.next",  # before the data of a step are asked for
    "checkpoint.staged",  # copied aside, nothing is written yet
    "checkpoint.writing",  # the first part of a rank's bytes is written
    "checkpoint.written",  # a rank's files are on the disk, which it has not said yet
    "checkpoint.before_commit",  # rank 0 has all it needs
    "checkpoint.after_rename",  # committed; the hint and old checkpoints are as they were
    "checkpoint.pruning",  # an old checkpoint is renamed, not yet deleted
)
ACTIONS = ("kill", "stop", "term", "hang", "raise", "enospc", "nan", "inf", "spike")
_FAULT = re.compile(
    r"(?P<point>[a-z_.]+)(=(?P<step>\d+))?(@rank(?P<rank>\d+))?(@attempt(?P<attempt>\d+))?:(?P<action>\w+)"
)


class Fault(NamedTuple):
    """One entry of DYDIT_FAULT; None stands for any."""

    point: str
    step: int | None
    rank: int | None
    attempt: int | None
    action: str


_struck: set[Fault] = set()


def fail_point(point: str, step: int | None = None) -> None:
    """Fail here if DYDIT_FAULT says so: kill or stop this process, hang it, raise RuntimeError or OSError (disk full).

    Raises ValueError if DYDIT_FAULT cannot be read.
    """
    action = strike(point, step)
    if action in ("kill", "stop", "term"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[action])
    elif action == "hang":
        time.sleep(10**6)
    elif action == "raise":
        raise RuntimeError(f"{VARIABLE}: raised at {point}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, f"{VARIABLE}: disk full at {point}")


def strike(point: str, step: int | None = None) -> str | None:
    """The action of the fault that strikes here and now, which the caller carries out; None for no fault."""
    assert point in POINTS, point
    rank, attempt = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    for fault in read_faults(os.environ.get(VARIABLE, "")):
        meets = ((fault.step, step), (fault.rank, rank), (fault.attempt, attempt))
        if fault.point == point and fault not in _struck and all(want in (None, have) for want, have in meets):
            _struck.add(fault)
            return fault.action
    return None


@lru_cache
def read_faults(text: str) -> tuple[Fault, ...]:
    """The faults of a DYDIT_FAULT. Raises ValueError naming the entry that is no fault."""
    faults = []
    for entry in filter(None, text.split(",")):
        found = _FAULT.fullmatch(entry)
        if found is None:
            raise ValueError(f"{VARIABLE}: {entry!r}: expected POINT[=STEP][@rankN][@attemptN]:ACTION")
        for key, known in (("point", POINTS), ("action", ACTIONS)):
            if found[key] not in known:
                raise ValueError(f"{VARIABLE}: {entry!r}: no {key} {found[key]!r}; there are {', '.join(known)}")
        step, rank, attempt = (None if found[key] is None else int(found[key]) for key in ("step", "rank", "attempt"))
        faults.append(Fault(found["point"], step, rank, attempt, found["action"]))
    return tuple(faults)
