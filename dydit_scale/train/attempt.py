"""One writer per run folder: whoever trains there holds the token in ``attempt.json`` and gives signs of life.

The file is written when a process takes the folder and when it leaves; in between only its time is touched, so that a
process which lost the folder cannot overwrite its successor. Ages are read from the file system's own clock, since
the clocks of two machines differ.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ATTEMPT_FILE = "attempt.json"
STALE = 60.0
"""Seconds without a sign of life after which a process of another machine counts as gone."""


class FolderInUseError(RuntimeError):
    """Another process trains in the folder, or has taken it over."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who trains, or trained, in a folder."""

    token: str
    host: str
    pid: int
    pid_started: str
    """In the kernel's ticks, since numbers of processes are used again; "" where the kernel does not tell."""
    space: str
    """Within which numbers of processes can be compared: boot and namespace; "" where the kernel does not tell."""
    began: float
    """Seconds since 1970."""
    ended: str | None = None
    """How it left; None while it trains, or if it was killed."""

    def lives(self, folder: Path) -> bool:
        """False once it has left, its process is dead, or its signs of life have stopped."""
        if self.ended is not None:
            return False
        if self.space and self.space == _space():
            return _pid_started(self.pid) == self.pid_started
        return _silence(folder) < STALE

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.began))
        return f"process {self.pid} on {self.host}, since {since}"


@dataclass(frozen=True)
class Attempt:
    """This run's hold on its folder."""

    folder: Path
    token: str
    before: Holder | None = None
    """Who held it before."""

    def still_ours(self) -> None:
        """Raise FolderInUseError if another process has taken the folder since. Call it before anything is committed
        there."""
        holder = read_holder(self.folder)
        if holder is None or holder.token != self.token:
            raise FolderInUseError(
                f"run {self.folder}: taken over by {holder or 'someone who removed ' + ATTEMPT_FILE}; "
                "this process writes nothing more there. Let one of the two go on"
            )

    def lost(self) -> bool:
        """True if another process has taken the folder."""
        holder = read_holder(self.folder)
        return holder is not None and holder.token != self.token

    def beat(self) -> None:
        """Give a sign of life. An error of the disk is not told here: whoever writes will meet it."""
        with suppress(OSError):
            os.utime(self.folder / ATTEMPT_FILE)

    def end(self, how: str) -> None:
        """Leave the folder to others."""
        with _locked(self.folder):
            holder = read_holder(self.folder)
            if holder is not None and holder.token == self.token:
                _write(self.folder, replace(holder, ended=how))


def take_folder(folder: Path, *, wait: float, say: Callable[[str], None] = print) -> Attempt:
    """Take ``folder`` for this process, after waiting up to ``wait`` seconds for its holder to leave.

    A holder that left, whose process is dead (same machine) or that has been silent for a minute (another machine)
    is replaced at once. Raises FolderInUseError if the holder stays, OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_started=_pid_started(os.getpid()),
        space=_space(),
        began=time.time(),
    )
    deadline, told = time.monotonic() + wait, False
    while True:
        with _locked(folder):
            holder = read_holder(folder)
            if holder is None or not holder.lives(folder):
                _write(folder, ours)
                return Attempt(folder, ours.token, holder)
        if time.monotonic() >= deadline:
            raise FolderInUseError(
                f"run {folder}: in use by {holder}; waited {wait:.0f} s for it to leave (limits.takeover). "
                f"Stop it with `dydit stop {folder} --wait`, or choose another run=FOLDER"
            )
        if not told:
            say(f"run {folder}: in use by {holder}; waiting up to {wait:.0f} s for it to leave")
            told = True
        time.sleep(min(0.5, wait))


def read_holder(folder: Path) -> Holder | None:
    """Who holds the folder, or held it last; None if nobody ever did, or the file is not ours to read."""
    try:
        return Holder(**json.loads((folder / ATTEMPT_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(folder: Path, holder: Holder) -> None:
    draft = folder / f".{ATTEMPT_FILE}-{holder.token}"
    draft.write_text(json.dumps(asdict(holder), indent=1) + "\n")
    draft.replace(folder / ATTEMPT_FILE)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two starts at the same moment, one after the other; where the file system knows no locks, without."""
    with (folder / f".{ATTEMPT_FILE}-lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _silence(folder: Path) -> float:
    """Seconds since the last sign of life, on the clock of the file system."""
    try:
        return file_clock(folder) - (folder / ATTEMPT_FILE).stat().st_mtime
    except OSError:
        return 0.0


def file_clock(folder: Path) -> float:
    """The time by the folder's file system, in seconds since 1970; OSError if nothing can be written there."""
    probe = folder / f".{ATTEMPT_FILE}-now-{os.getpid()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def _pid_started(pid: int) -> str:
    """When the kernel started a process, in its ticks; "" for one that is dead or unknown."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] in "ZX" else after_name[19]


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
