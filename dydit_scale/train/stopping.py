"""How a run is asked to stop: by SIGTERM or SIGUSR1 to any of its processes, by a file in its folder, or by the end of
its launcher, which would start another in its place."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""What torchrun and the deepspeed launcher set for the processes that they start."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run left because it was asked to; its state is saved."""


class StopRequest:
    """Whether this process was asked to stop. The ranks agree on it in the reduction of each step, so that asking one
    of them is enough and all leave at the same step."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._file: Path | None = None
        self._token = ""

    def catch_signals(self) -> StopRequest:
        """Take SIGTERM and SIGUSR1 for a request from now on; a second one changes nothing. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._caught)
        return self

    def watch(self, folder: Path, token: str) -> None:
        """Take the folder's stop file for a request, if it is empty or holds ``token``; one that lies there already
        was meant for an earlier attempt and goes."""
        self._file, self._token = folder / STOP_FILE, token
        if _read(self._file) not in (None, token):
            self._file.unlink(missing_ok=True)

    def asked(self) -> bool:
        """True once somebody has asked."""
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the end of its launcher"
        if self.reason is None and self._file is not None and _read(self._file) in ("", self._token):
            self.reason = f"the file {self._file}"
        return self.reason is not None

    def clear(self) -> None:
        """Remove the stop file; the request was met."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _caught(self, number: int, _: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
