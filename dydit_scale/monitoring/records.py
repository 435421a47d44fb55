"""Reading what a run wrote about itself, while it goes on writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "monitor.json"
"""What does not change within an attempt; also for those who look at the run."""
RANKS = "ranks"
"""Folder of one file for each process, its time of change a sign of life."""


def rank_file(run: Path, rank: int) -> Path:
    """Where a process writes about itself."""
    return run / RANKS / f"rank-{rank:05d}.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a file; none if there is no file."""
    return Follow(path).new()


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest whole record of a file, without reading the rest; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 20)))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    return next((record for line in reversed(lines) if (record := parse_record(line)) is not None), None)


def read_about(run: Path) -> dict[str, Any]:
    """What ``RUN/monitor.json`` says; empty if there is none."""
    try:
        found = json.loads((run / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Follow:
    """A file of records that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._inode = path, 0, -1

    def new(self) -> list[dict[str, Any]]:
        """The whole records since the last call; from the beginning again where the file was replaced, as a resume
        does (see ``restarted``)."""
        self.restarted = False
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._at:
                    self._inode, self._at, self.restarted = found.st_ino, 0, True
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._at += len(whole) + len(newline)
        return [record for line in whole.split(b"\n") if (record := parse_record(line)) is not None]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None for an empty line, and one cut short by a kill."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
