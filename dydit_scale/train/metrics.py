"""What a run says while it trains: JSON lines (the record), TensorBoard, and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dydit_scale.checkpoint.writer import SaveReport


class Metrics:
    """Writes one record per step. On other ranks than the first it is not made."""

    def __init__(self, run: Path, *, name: str, steps: int, first_step: int) -> None:
        self._path = run / "metrics.jsonl"
        last = _drop_from(self._path, first_step)
        self.evaluated = any("mse_eval" in record for record in last)
        """Whether the step before the first one was evaluated."""
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(total=steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, smoothing=0.1)
        self._shown: dict[str, str] = {}
        self._troubled = False

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
        self._append({"step": step, **record})
        self._bar.n = step
        self._bar.refresh()

    def checkpoint(self, report: SaveReport) -> None:
        """The record of a save, and a warning if it failed."""
        if report.problem and not report.fatal:
            self.say(f"warning: {report.problem}; training goes on, the checkpoint before it is intact")
        self._write(
            {
                "step": report.step - 1,
                "checkpoint_blocked_seconds": report.blocked_seconds,
                "checkpoint_seconds": report.total_seconds,
                "checkpoint_bytes": report.bytes,
                "checkpoint_failures": report.failures,
            }
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        for sink in (self._board, self._file):
            with self._survived():
                sink.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._append(record)
        with self._survived():
            for key, value in record.items():
                if key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def _append(self, record: dict[str, Any]) -> None:
        with self._survived():  # what a full disk refused stays in the file's buffer, and goes with the next record
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """No record is worth a run; the first failure is told."""
        try:
            yield
        except OSError as error:
            if not self._troubled:
                self.say(f"warning: {self._path.parent}: records cannot be written: {error}; training goes on")
            self._troubled = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a file."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a line cut short by a kill
    return records


def _drop_from(path: Path, step: int) -> list[dict[str, Any]]:
    """Forget the records that a resumed run will write again; returns those of the step before."""
    kept = [r for r in read_metrics(path) if r["step"] < step]
    draft = path.with_name(f".{path.name}")
    draft.write_text("".join(json.dumps(r) + "\n" for r in kept))
    draft.replace(path)
    return [r for r in kept if r["step"] == step - 1]
