"""Whatever a sink does, nothing of it reaches the run."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dydit_scale.monitoring import sinks
from dydit_scale.monitoring.sinks import Background, Sink, open_sinks

RECORD = {"step": 1, "loss": 0.5, "mfu": {"dense": 0.25}}


class Kept:
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def forever(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """What hangs until the test is over; sinks are waited for shortly."""
    monkeypatch.setattr(sinks, "OPENING", 0.1)
    monkeypatch.setattr(sinks, "CLOSING", 0.1)
    over = threading.Event()
    yield lambda *_: over.wait(60) and None
    over.set()


def opened(make: Callable[[], Sink]) -> tuple[Background, list[str]]:
    said: list[str] = []
    return Background("kept", make, said.append), said


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_records_arrive_in_order_and_the_end_is_waited_for() -> None:
    kept = Kept()
    sink, said = opened(lambda: kept)
    for step in range(50):
        sink.write({"step": step})
    sink.close()
    assert [record["step"] for record in kept.records] == [*range(50)] and kept.closed
    assert (sink.dropped, sink.failures, said) == (0, 0, [])


@pytest.mark.parametrize("error", [ImportError("No module named 'kept'"), SystemExit(1), RuntimeError("no login")])
def test_one_that_cannot_be_opened_is_told_once(error: BaseException) -> None:
    def make() -> Sink:
        raise error

    sink, said = opened(make)
    wait_for(lambda: not sink._thread.is_alive())
    for _ in range(3):
        sink.write(RECORD)
    sink.close()
    assert said == [f"warning: kept cannot be used: {type(error).__name__}: {error}; training goes on"]
    assert (sink.dropped, sink.failures) == (3, 1)


def test_one_that_fails_again_and_again_is_left_alone() -> None:
    class Failing(Kept):
        def write(self, record: Mapping[str, Any]) -> None:
            super().write(record)
            raise OSError("connection refused")

    failing = Failing()
    sink, said = opened(lambda: failing)
    for _ in range(2 * sinks.FAILURES):
        sink.write(RECORD)
    wait_for(lambda: not sink._thread.is_alive())
    sink.write(RECORD)
    assert len(failing.records) == sinks.FAILURES == sink.failures
    assert sink.dropped > sinks.FAILURES and len(said) == 1 and "connection refused" in said[0]


def test_a_failure_now_and_then_costs_one_record() -> None:
    class Moody(Kept):
        def write(self, record: Mapping[str, Any]) -> None:
            if record["step"] % 2:
                raise OSError("try again")
            super().write(record)

    moody = Moody()
    sink, _ = opened(lambda: moody)
    for step in range(4 * sinks.FAILURES):
        sink.write({"step": step})
    sink.close()
    assert len(moody.records) == 2 * sinks.FAILURES == sink.dropped and moody.closed


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_one_that_hangs_keeps_nobody(where: str, forever: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "QUEUE", 5)
    kept = Kept()
    if where != "open":
        monkeypatch.setattr(kept, where, forever)
    sink, said = opened((lambda: forever() or kept) if where == "open" else lambda: kept)
    began = time.monotonic()
    for _ in range(20):
        sink.write(RECORD)
        if where == "close":
            wait_for(sink._queue.empty)
    sink.close()
    assert time.monotonic() - began < 20
    assert sink.dropped >= (0 if where == "close" else 14)
    assert len(said) == (0 if where == "close" else 1)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    (sink,) = open_sinks(("tensorboard",), tmp_path, name="a", first_step=0, config={}, say=print)
    sink.write(RECORD)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "mfu/dense"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]


def stub_wandb(kept: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType("wandb")

    def init(**options: Any) -> types.SimpleNamespace:
        kept.setdefault("init", []).append(options)
        return types.SimpleNamespace(
            id="abc",
            log=kept.setdefault("log", []).append,
            define_metric=lambda *_, **__: None,
            finish=lambda: kept.update(finished=True),
        )

    module.init = init  # type: ignore[attr-defined]
    return module


def stub_mlflow(kept: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType("mlflow")

    def start_run(**options: Any) -> types.SimpleNamespace:
        kept.setdefault("init", []).append(options)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    module.start_run = start_run  # type: ignore[attr-defined]
    module.log_param = lambda key, value: kept.setdefault("params", {}).update({key: value})  # type: ignore[attr-defined]
    module.log_metrics = lambda values, step: kept.setdefault("log", []).append((step, values))  # type: ignore[attr-defined]
    module.end_run = lambda: kept.update(finished=True)  # type: ignore[attr-defined]
    return module


def test_wandb_goes_on_with_its_run_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", stub_wandb(kept))
    for _ in range(2):
        (sink,) = open_sinks(("wandb",), tmp_path, name="a", first_step=0, config={"train.lr": 1}, say=print)
        sink.write(RECORD)
        sink.close()
    assert [options["id"] for options in kept["init"]] == [None, "abc"]
    assert kept["init"][0]["config"] == {"train.lr": 1} and kept["init"][0]["name"] == "a"
    assert kept["log"] == [{"step": 1.0, "loss": 0.5, "mfu/dense": 0.25}] * 2 and kept["finished"]


def test_mlflow_goes_on_with_its_run_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "mlflow", stub_mlflow(kept))
    for _ in range(2):
        (sink,) = open_sinks(("mlflow",), tmp_path, name="a", first_step=0, config={"train.lr": 1}, say=print)
        sink.write(RECORD)
        sink.close()
    assert kept["init"] == [{"run_id": None, "run_name": "a"}, {"run_id": "abc", "run_name": None}]
    assert kept["params"] == {"train.lr": "1"} and kept["finished"]
    assert kept["log"] == [(1, {"loss": 0.5, "mfu/dense": 0.25})] * 2


def test_one_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    opened = open_sinks(("wandb", "mlflow"), tmp_path, name="a", first_step=0, config={}, say=said.append)
    assert [sink.failures for sink in opened] == [1, 1] and len(said) == 2
    assert "wandb cannot be used: ModuleNotFoundError" in said[0] and "training goes on" in said[1]
