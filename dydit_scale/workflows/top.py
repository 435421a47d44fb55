"""A run in the terminal, read from its folder alone."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from dydit_scale.monitoring.records import METRICS_FILE, Follow, last_record, rank_file, read_about
from dydit_scale.monitoring.view import Rank, Snapshot, frame
from dydit_scale.train.attempt import read_holder
from dydit_scale.workflows.health import ages_of

SHOWN_RANKS = 64
"""Processes whose files are read at each look."""
_SVG_WIDTH = 110


class Watched:
    """A run that is looked at again and again."""

    def __init__(self, run: Path) -> None:
        """Raises ValueError if nothing has trained in the folder."""
        if read_holder(run) is None:
            raise ValueError(f"run {run}: nothing has trained there; give the folder of a training run")
        self._run, self._follow = run, Follow(run / METRICS_FILE)
        self._steps: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}

    def look(self) -> Snapshot:
        """What is there now."""
        for record in self._new():
            if "loss" in record:
                while self._steps and self._steps[-1]["step"] >= record["step"]:
                    self._steps.pop()  # the run went back
                self._steps.append(record)
            self._last |= record
        if self._steps:
            self._last["step"] = self._steps[-1]["step"]
        about, holder = read_about(self._run), read_holder(self._run)
        alive = holder is not None and holder.lives(self._run)
        ended = "killed" if holder is None or holder.ended is None else holder.ended
        ages = ages_of(self._run)
        ranks = [
            Rank(number, ages.now - path.stat().st_mtime, last_record(path) or {})
            for number in range(min(SHOWN_RANKS, about.get("ranks", 0)))
            if (path := rank_file(self._run, number)).is_file()
        ]
        state = "training" if alive else f"ended ({ended})"
        return Snapshot(about, state, alive, ages.ages, self._steps, self._last, ranks)

    def _new(self) -> list[dict[str, Any]]:
        records = self._follow.new()
        if self._follow.restarted:
            self._steps, self._last = [], {}
        return records


def draw_once(run: Path, svg: Path | None = None) -> None:
    """Print one frame; or draw it into the file ``svg``.

    Raises ValueError if nothing has trained in the folder.
    """
    shot = frame(Watched(run).look())
    if svg is None:
        return Console().print(shot)
    console = Console(record=True, width=_SVG_WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(shot)
    picture = console.export_svg(title=f"dydit top {run}")
    fonts_from_the_network = re.compile(r"@font-face {.*?}\s*", re.DOTALL)
    svg.write_text(fonts_from_the_network.sub("", picture))
    print(f"frame: {svg}")


def watch(run: Path, *, every: float) -> None:
    """Show the run until interrupted, looking at it every so many seconds.

    Raises ValueError as ``draw_once``, and unless ``every`` is positive.
    """
    if not every > 0:
        raise ValueError(f"--every: expected seconds, more than 0; got {every:g}")
    watched = Watched(run)
    try:
        with Live(frame(watched.look()), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(frame(watched.look()), refresh=True)
    except KeyboardInterrupt:
        return
