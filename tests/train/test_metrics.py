from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dydit_scale.monitoring.records import read_metrics
from dydit_scale.train.metrics import Metrics, records_before

STEP = {"loss": 1.0, "loss_flow": 1.0, "ratio": 0.5, "target": 0.5}


def started(run: Path, first_step: int = 0) -> Metrics:
    return Metrics(run, name="small", steps=4, first_step=first_step, kept=records_before(run, first_step))


def test_a_full_disk_costs_no_run_and_its_records_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = started(tmp_path)

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        file = metrics._lines._open()
        patch.setattr(metrics._lines, "_file", type("Full", (), {"write": file.write, "flush": staticmethod(refuse)}))
        for step in range(2):
            metrics.step({"step": step, **STEP})
    metrics.step({"step": 2, **STEP})
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert "".join(capsys.readouterr()).count("records cannot be written: [Errno 28] No space left") == 1


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path: Path) -> None:
    first = started(tmp_path)
    for step in range(3):
        first.step({"step": step, **STEP})
    first.evaluation({"step": 1, "ratio_eval": 0.5, "mse_eval": 0.1})
    first.close()
    for begins, evaluated in ((2, True), (1, False)):
        again = started(tmp_path, begins)
        assert again.evaluated is evaluated
        again.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
