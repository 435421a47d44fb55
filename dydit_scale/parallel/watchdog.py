"""Ends a process that no longer makes progress, after it has said where it stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Literal

from dydit_scale.parallel.world import World

Phase = Literal["setup", "step", "evaluation", "checkpoint"]
TICK = 0.5
"""Seconds between two looks."""
HEARTBEAT = 10.0
"""Seconds between two calls of ``beat``."""
LAST_WORDS = 10.0
"""Seconds in which the stacks must be written; the disk may be what hangs."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Seconds without progress after which a process ends itself, and its peers give it up."""

    setup: float = 3600.0
    """From the start to the end of the first step: downloads, loading, compiling."""
    step: float = 600.0
    """One training step, or the wait for its data."""
    evaluation: float = 1800.0
    """One evaluation with its pictures."""
    checkpoint: float = 1800.0
    """Writing or reading one checkpoint."""
    takeover: float = 120.0
    """How long a start waits for another process to leave the run's folder, half of ``setup`` at most; no limit of the
    watchdog."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least, seconds = 0 if field.name == "takeover" else 1, getattr(self, field.name)
            if not seconds >= least:
                raise ValueError(f"limits.{field.name}: expected seconds, {least} or more; got {seconds}")

    @property
    def collective(self) -> float:
        """Timeout of the process group. Ranks wait in one collective while rank 0 saves; the watchdog is sharper."""
        return max(self.setup, self.step, self.evaluation, self.checkpoint)


class Watchdog:
    """A thread that watches the main thread go from phase to phase. Use it in a ``with``.

    When a phase lasts longer than its limit, the stacks of all threads go to stderr and to ``stacks-rank-N.txt`` in
    ``folder``, and the process exits with ``code`` at once. Time is counted in looks of the thread itself, so that a
    process which was suspended is not blamed for it. Should a thread keep the interpreter from running at all,
    faulthandler's own timer, which needs no interpreter, prints the stacks and exits with 1.
    """

    def __init__(self, world: World, folder: Path, limits: LimitsConfig, *, code: int) -> None:
        self.limits, self.code = limits, code
        self.stacks = folder / f"stacks-rank-{world.rank}.txt"
        self.beat: Callable[[], None] | None = None
        """Called now and then from a thread, as a sign of life."""
        self._phase: Phase = "setup"
        self._looks = 0
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._watch, "watchdog"), (self._beat, "heartbeat"))
        ]

    def enter(self, phase: Phase) -> None:
        """A phase begins, or the same goes on: its time counts from now."""
        self._phase, self._looks = phase, 0
        limit = getattr(self.limits, phase)
        faulthandler.dump_traceback_later(1.5 * limit + 60, exit=True, file=_stderr())

    def __enter__(self) -> Watchdog:
        self.enter("setup")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._done.set()
        for thread in self._threads:
            thread.join(HEARTBEAT)

    def _watch(self) -> None:
        while not self._done.wait(TICK):
            self._looks += 1
            phase = self._phase
            if self._looks * TICK > getattr(self.limits, phase):
                self._give_up(phase)

    def _beat(self) -> None:
        """In a thread of its own, for the disk may be what hangs."""
        ticks = 0
        while not self._done.wait(TICK):
            if self.beat is not None and ticks % round(HEARTBEAT / TICK) == 0:
                self.beat()
            ticks += self.beat is not None

    def _give_up(self, phase: Phase) -> None:
        timer = threading.Timer(LAST_WORDS, os._exit, (self.code,))
        timer.daemon = True
        timer.start()
        limit = getattr(self.limits, phase)
        text = f"no progress in phase {phase} for {limit:.0f} s (limits.{phase}); the stacks of all threads follow"
        _dump(_stderr(), text)
        with suppress(OSError):  # they are on stderr already
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("w") as file:
                _dump(file, text)
        os._exit(self.code)


def _stderr() -> IO[str]:
    """The process's own, whatever took the place of sys.stderr."""
    assert sys.__stderr__ is not None
    return sys.__stderr__


def _dump(file: IO[str], text: str) -> None:
    print(f"watchdog: {text}", file=file, flush=True)
    faulthandler.dump_traceback(file, all_threads=True)
    file.flush()
