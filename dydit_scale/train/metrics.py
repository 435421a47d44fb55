"""What a run says while it trains: JSON lines (the record), and whoever else listens; a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from dydit_scale.checkpoint.writer import SaveReport
from dydit_scale.monitoring.records import METRICS_FILE, parse_record, rank_file

ASKED_FOR = ("seconds", "grad_norm", "mse_eval")
"""What a resumed run asks for of its earlier records: times of steps, whether they counted, and evaluations."""


class Listener(Protocol):
    """Gets records; never raises, never waits. The sinks and the endpoint of ``monitoring`` are such."""

    def write(self, record: Mapping[str, Any]) -> None:
        """A record."""

    def close(self) -> None:
        """The last one is written."""


class Lines:
    """A file of JSON lines. No record is worth a run: the first failure is told, and what a full disk refused goes
    with the next record."""

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self._say, self._troubled = path, say, False
        self._file: IO[str] | None = None
        with self._survived():
            self._open().flush()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        with self._survived():
            file = self._open()
            file.write(json.dumps(record) + "\n")
            file.flush()

    def close(self) -> None:
        """Flush everything."""
        with self._survived():
            if self._file is not None:
                self._file.close()

    def _open(self) -> IO[str]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
        return self._file

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._troubled:
                self._say(f"warning: {self.path.parent}: records cannot be written: {error}; training goes on")
            self._troubled = True
            with suppress(OSError):
                os.utime(self.path)  # its time of change tells that the run goes on


class Metrics:
    """Writes one record per step. On other ranks than the first it is not made."""

    def __init__(
        self,
        run: Path,
        *,
        name: str,
        steps: int,
        first_step: int,
        kept: Sequence[Mapping[str, Any]],
        listeners: Callable[[Callable[[str], object]], Sequence[Listener]] = lambda say: (),
    ) -> None:
        """
        Args:
            kept: of the records of the steps before ``first_step``, as ``records_before`` returns them.
            listeners: makes them, given what tells people.
        """
        self.evaluated = any("mse_eval" in record for record in kept if record["step"] == first_step - 1)
        """Whether the step before the first one was evaluated."""
        self._bar = tqdm(total=steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, smoothing=0.1)
        self._shown: dict[str, str] = {}
        self._lines = Lines(run / METRICS_FILE, self.say)
        self._listeners = listeners(self.say)

    def step(self, record: dict[str, Any]) -> None:
        """The record of a training step; ``record["step"]`` counts from 0."""
        self._write(record)
        shown = {"loss": record["loss_flow"], "ratio": record["ratio"], "target": record["target"]}
        self._shown |= {k: f"{v:.3f}" for k, v in shown.items()}
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def evaluation(self, record: dict[str, Any]) -> None:
        """The record of an evaluation."""
        self._write(record)
        self._shown |= {"eval ratio": f"{record['ratio_eval']:.3f}", "eval mse": f"{record['mse_eval']:.4f}"}

    def back_to(self, step: int, record: dict[str, Any]) -> None:
        """The run went back and trains ``step`` again; ``record`` says why. The records in between stay."""
        self._write({"step": step, **record})
        self._bar.n = step
        self._bar.refresh()

    def checkpoint(self, report: SaveReport, failures: int) -> None:
        """The record of a save, and a warning if it failed; ``failures`` counts those of this process."""
        if report.problem and not report.fatal:
            self.say(f"warning: {report.problem}; training goes on, the checkpoint before it is intact")
        record = {
            "step": report.step - 1,
            "checkpoint_blocked_seconds": report.blocked_seconds,
            "checkpoint_seconds": report.total_seconds,
            "checkpoint_bytes": report.bytes,
            "checkpoint_failures": report.failures,
            "checkpoint_failures_total": failures,
        }
        if report.path is not None:
            record["checkpoint_step"] = report.step
        self._write(record)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        self._lines.close()
        for listener in self._listeners:
            listener.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._lines.write(record)
        for listener in self._listeners:
            listener.write(record)


class RankLog:
    """What one process says about itself alone: a line a step. Its file's time of change is a sign of life."""

    def __init__(self, run: Path, rank: int, listeners: Sequence[Listener] = ()) -> None:
        self._lines, self._listeners = Lines(rank_file(run, rank), print), listeners

    def step(self, record: Mapping[str, Any]) -> None:
        """The record of a training step."""
        self._lines.write(record)
        for listener in self._listeners:
            listener.write(record)

    def beat(self) -> None:
        """Give a sign of life, without a record."""
        with suppress(OSError):
            os.utime(self._lines.path)

    def close(self) -> None:
        """Flush everything."""
        self._lines.close()
        for listener in self._listeners:
            listener.close()


def records_before(run: Path, step: int, say: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Of the records of the steps before ``step`` what a resumed run asks for (``ASKED_FOR``).

    The others, which it will write again, are removed from the file, as is a line that a kill cut short. If the disk
    refuses, that is told, and they stay.
    """
    path, all_stay = run / METRICS_FILE, True
    draft = path.with_name(f".{path.name}")
    kept: list[dict[str, Any]] = []
    try:
        for _, record in _stay(path, step):
            if record is None:
                all_stay = False
            elif found := {key: record[key] for key in ASKED_FOR if key in record}:
                kept.append({"step": record["step"], **found})
        if not all_stay:
            with draft.open("wb") as file:
                file.writelines(line for line, record in _stay(path, step) if record is not None)
            draft.replace(path)
    except FileNotFoundError:
        pass  # nothing was written yet
    except OSError as error:
        say(f"warning: {path}: records of steps from {step} on cannot be removed: {error}; training goes on")
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return kept


def _stay(path: Path, step: int) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file with its record; None for those that do not count any more."""
    with path.open("rb") as file:
        for line in file:
            record = parse_record(line) if line.endswith(b"\n") else None
            yield line, record if record is not None and record["step"] < step else None
