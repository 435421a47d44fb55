"""Is a run alive and making progress? Read from its folder alone, without torch, so that a probe may ask often."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dydit_scale.monitoring.records import METRICS_FILE, RANKS, RUN_FILE, last_record, read_about
from dydit_scale.train.attempt import ATTEMPT_FILE, file_clock, read_holder

WELL_ENDED = ("done", "Stopped")


class Health(NamedTuple):
    """The verdict, and what it is made of."""

    healthy: bool
    reason: str
    """Why not; or that it is."""
    ages: dict[str, float]
    """Seconds since the newest ``heartbeat``, ``step`` (or evaluation, or save) and ``commit``, of those there were."""
    step: int | None
    """The newest one trained, from 0."""

    def __str__(self) -> str:
        ages = ", ".join(f"{what} {age:.0f} s ago" for what, age in self.ages.items())
        step = "" if self.step is None else f"; step {self.step}"
        return f"{'healthy' if self.healthy else 'not healthy'}: {self.reason}{step}" + (f"; {ages}" if ages else "")


def health_of(run: Path, *, max_age: float) -> Health:
    """Whether the run in a folder is alive and makes progress.

    It is not if nothing trains there, its last attempt ended in an error, or ``max_age`` seconds passed without a sign
    of life of one of its processes or, after the first step of its attempt, without a step, an evaluation or a save. A
    run that is done, or was stopped as asked, is healthy. Set ``max_age`` above the recipe's ``limits`` but ``setup``,
    which the first step belongs to: what hangs is the watchdog's.

    Raises ValueError unless ``max_age`` is positive.
    """
    if not max_age > 0:
        raise ValueError(f"--max-age: expected seconds, more than 0; got {max_age:g}")
    holder = read_holder(run)
    if holder is None:
        return Health(False, f"nothing has trained in {run} yet", {}, None)
    about = read_about(run)
    trains = about.get("token") == holder.token
    now, ages = ages_of(run)
    newest = last_record(run / METRICS_FILE)
    step = None if newest is None else newest.get("step")
    stepped = trains and step is not None and step >= about.get("first_step", 0)
    if holder.ended is not None:
        return Health(holder.ended in WELL_ENDED, f"ended ({holder.ended})", ages, step)
    if ages["heartbeat"] > max_age:
        return Health(False, f"no sign of life of {holder} for more than {max_age:g} s", ages, step)
    if stepped and ages["step"] > max_age:
        return Health(False, f"no step, evaluation or save for more than {max_age:g} s", ages, step)
    if trains and (silent := sorted(_silent_ranks(run, now - max_age, about["ranks"]))):
        return Health(False, f"no sign of life of rank {silent[0]} for more than {max_age:g} s", ages, step)
    return Health(True, "training" if trains else "being set up", ages, step)


class Ages(NamedTuple):
    """How long ago the newest signs of a run are."""

    now: float
    """By the clock that the files' times are from."""
    ages: dict[str, float]
    """Seconds since the newest ``heartbeat``, ``step`` (or evaluation, or save) and ``commit``, of those there were."""


def ages_of(run: Path) -> Ages:
    """From the times of the run's files."""
    times = {
        "heartbeat": _changed(run / ATTEMPT_FILE),
        "step": max(_changed(run / METRICS_FILE), _changed(run / RUN_FILE)),
        "commit": max((_changed(p) for p in (run / "checkpoints").glob("step-*") if p.suffix != ".corrupt"), default=0),
    }
    now = _now(run)
    return Ages(now, {what: max(0.0, now - when) for what, when in times.items() if when})


def _silent_ranks(run: Path, since: float, ranks: int) -> Iterator[int]:
    """Of those that have written at all; an earlier attempt may have left more."""
    for entry in os.scandir(run / RANKS) if (run / RANKS).is_dir() else ():
        number = entry.name.removeprefix("rank-").removesuffix(".jsonl")
        if number.isdecimal() and int(number) < ranks and entry.stat().st_mtime < since:
            yield int(number)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _now(run: Path) -> float:
    """By the clock that the files' times are from, where it can be asked."""
    try:
        return file_clock(run)
    except OSError:
        return time.time()
