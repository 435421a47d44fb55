"""``python -m dydit_scale.cluster.supervise --grace SECONDS -- LAUNCHER ...``: a launcher, made well behaved.

torchrun and deepspeed answer 1 for every failed rank, and the deepspeed runner keeps signals to itself. This program
passes SIGTERM and SIGUSR1 on to the ranks, whatever their launcher does; it leaves when the last of them has left, and
with the exit code that they noted (dydit_scale/train/exits.py), so that whoever restarts jobs can tell them apart.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from dydit_scale.train.exits import NOTES, Exit, verdict
from dydit_scale.train.stopping import SIGNALS

TICK = 0.5
_PR_SET_CHILD_SUBREAPER = 36


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher to its end; the exit code of its ranks."""
    parser = argparse.ArgumentParser(
        prog="python -m dydit_scale.cluster.supervise", description="Supervise a launcher."
    )
    parser.add_argument("--grace", type=float, required=True, help="seconds that ranks have after a request to stop")
    parser.add_argument("command", nargs="+", help="after --: torchrun or deepspeed with its words")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dydit-exits-") as folder:
        return Supervisor(Path(folder), grace=args.grace).run(args.command)


class Supervisor:
    """A launcher and all that it started."""

    def __init__(self, notes: Path, *, grace: float) -> None:
        self.notes, self.grace = notes, grace
        self._asked = False

    def run(self, command: Sequence[str]) -> int:
        """Start ``command`` and return when nothing of it is left."""
        _adopt_orphans()
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        launcher = subprocess.Popen(command, env=os.environ | {NOTES: str(self.notes)})
        told, deadline = False, None
        while left := self._rest(launcher):
            if self._asked and not told:  # the ranks agree, so that one request is enough
                told = self._tell_ranks(left)
            if deadline is None and (self._asked or launcher.returncode is not None):
                deadline = time.monotonic() + self.grace
            if deadline is not None and time.monotonic() > deadline:
                self._kill(left)
            time.sleep(TICK)
        return self._answer(launcher.wait())

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._asked = True

    def _rest(self, launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """What is alive of the launcher and its descendants; orphans are ours by now, and are reaped."""
        launcher.poll()
        left = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
                elif process.ppid() == os.getpid() and process.pid != launcher.pid:
                    os.waitpid(process.pid, os.WNOHANG)
            except (psutil.NoSuchProcess, ChildProcessError):
                continue
        return left

    def _tell_ranks(self, processes: list[psutil.Process]) -> bool:
        """Ask the ranks to stop; False while there are none that would understand."""
        ranks = [process for process in processes if _is_rank(process) and _listens(process)]
        for process in ranks:
            try:
                process.send_signal(signal.SIGUSR1)
            except psutil.NoSuchProcess:
                continue
        return bool(ranks)

    def _kill(self, processes: list[psutil.Process]) -> None:
        print(f"supervise: {len(processes)} processes still there after {self.grace:.0f} s; killed", file=sys.stderr)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _answer(self, code: int) -> int:
        noted = verdict(self.notes)
        if noted is None:
            return code if 0 < code < 128 else (Exit.FAILED if code else Exit.DONE)
        if noted == Exit.DONE and code:
            return Exit.FAILED  # a rank of this node died without a word
        return noted


def _is_rank(process: psutil.Process) -> bool:
    """Whether a launcher started it to train; what it started itself inherits as much."""
    try:
        return "RANK" in process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _listens(process: psutil.Process) -> bool:
    """Whether it catches the signal; a rank that is still importing would die of it (elsewhere than on Linux: True)."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return not sys.platform.startswith("linux")
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def _adopt_orphans() -> None:
    """Become the parent of what the launcher leaves behind, so that none is overlooked (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
