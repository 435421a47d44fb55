"""Programs that draw curves: TensorBoard, Weights & Biases, MLflow. None of them can stop or slow a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dydit_scale.monitoring.registry import scalars

QUEUE = 1000
"""Records that wait for a sink; when it is full, newer ones are dropped."""
OPENING = 20.0
"""Seconds that a start waits for a sink to open, so that its imports are over before the first step."""
CLOSING = 10.0
"""Seconds that an end waits for what is in the queue."""
FAILURES = 5
"""Errors in a row after which a sink is left alone."""


class Sink(Protocol):
    """Takes records; may fail or hang as it likes."""

    def write(self, record: Mapping[str, Any]) -> None:
        """A record, whole."""

    def close(self) -> None:
        """No more follow."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        for tag, value in scalars(record).items():
            if tag != "step":
                self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one after a restart."""

    def __init__(self, run: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        identity = run / "wandb-id.txt"
        known = identity.read_text().strip() if identity.is_file() else None
        self._run = wandb.init(dir=str(run), name=name, id=known, resume="allow", config=dict(config))
        self._run.define_metric("*", step_metric="step")  # a run that goes back has a step twice
        identity.write_text(f"{self._run.id}\n")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(scalars(record))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, the same one after a restart."""

    def __init__(self, run: Path, name: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow, identity = mlflow, run / "mlflow-id.txt"
        known = identity.read_text().strip() if identity.is_file() else None
        started = mlflow.start_run(run_id=known, run_name=None if known else name)
        identity.write_text(f"{started.info.run_id}\n")
        for key, value in config.items() if known is None else ():
            mlflow.log_param(key, str(value)[:500])

    def write(self, record: Mapping[str, Any]) -> None:
        step, flat = record["step"], scalars(record)
        self._mlflow.log_metrics({key: value for key, value in flat.items() if key != "step"}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Background:
    """A sink in a thread of its own: it is opened, fed and closed there.

    Its failures are told once and counted; after some in a row it is left alone. What it is too slow for is dropped
    and counted. The thread dies with the process.

    Args:
        name: for messages.
        make: opens the sink; it may fail or hang as well.
        say: tells people something, once at most.
    """

    def __init__(self, name: str, make: Callable[[], Sink], say: Callable[[str], object]) -> None:
        self.name, self.dropped, self.failures = name, 0, 0
        self._say, self._in_a_row, self._told = say, 0, False
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(QUEUE)
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"sink {name}", daemon=True)
        self._thread.start()
        if not self._opened.wait(OPENING):
            self._tell(f"has not opened after {OPENING:.0f} s")

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand a record over; returns at once."""
        if self._thread.is_alive():
            try:
                return self._queue.put_nowait(record)
            except queue.Full:
                self._tell(f"is too slow: more than {QUEUE} records wait")
        self.dropped += 1

    def close(self) -> None:
        """Wait for what is in the queue, but not for long."""
        try:
            self._queue.put(None, timeout=CLOSING)
        except queue.Full:
            return
        self._thread.join(CLOSING)

    def _run(self, make: Callable[[], Sink]) -> None:
        try:
            sink = make()
        except BaseException as error:  # of any kind, a SystemExit too: nothing of a sink may reach the run
            self._failed(error, "cannot be used")
            return
        finally:
            self._opened.set()
        while (record := self._queue.get()) is not None:
            try:
                sink.write(record)
                self._in_a_row = 0
            except BaseException as error:
                self._failed(error, "failed")
                self._in_a_row += 1
                self.dropped += 1
                if self._in_a_row >= FAILURES:
                    return
        try:
            sink.close()
        except BaseException as error:
            self._failed(error, "failed at its end")

    def _failed(self, error: BaseException, how: str) -> None:
        self.failures += 1
        self._tell(f"{how}: {type(error).__name__}: {error}")

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"warning: {self.name} {text}; training goes on")


def open_sinks(
    names: tuple[str, ...],
    run: Path,
    *,
    name: str,
    first_step: int,
    config: Mapping[str, Any],
    say: Callable[[str], object],
) -> list[Background]:
    """The sinks of ``monitor.sinks`` for the run in folder ``run``; ``config`` is the recipe under dotted keys."""
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(run, first_step),
        "wandb": lambda: WandB(run, name, config),
        "mlflow": lambda: MLflow(run, name, config),
    }
    return [Background(sink, makers[sink], say) for sink in names]
