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


def test_what_stays_stays_byte_for_byte_and_little_is_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "seconds": 2.0, "grad_norm": 1.0, "routers":  {"heads": [1]}}\n{"step": 0, "mse_eval": 0.1}\n'
    whole += '{"step": 0, "checkpoint_step": 1}\n'
    path.write_text(whole)
    unchanged = path.stat().st_ino
    kept = [{"step": 0, "seconds": 2.0, "grad_norm": 1.0}, {"step": 0, "mse_eval": 0.1}]
    assert records_before(tmp_path, 1) == kept and path.stat().st_ino == unchanged
    path.write_text(whole + '{"step": 1, "seconds": 1.0}\n{"step": 0, "seco')
    assert records_before(tmp_path, 1) == kept and path.read_text() == whole
    path.write_text(whole + '{"step": 0, "mse_eval": 0.2}')  # its end may be missing
    assert records_before(tmp_path, 1) == kept and path.read_text() == whole


def test_a_disk_that_refuses_to_forget_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, said = started(tmp_path), []
    for step in range(3):
        first.step({"step": step, "seconds": 1.0, "grad_norm": 1.0, **STEP})
    first.close()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        assert [record["step"] for record in records_before(tmp_path, 2, said.append)] == [0, 1]
    assert len(said) == 1 and "records of steps from 2 on cannot be removed: [Errno 28]" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert records_before(tmp_path / "none", 2, said.append) == [] and len(said) == 1
