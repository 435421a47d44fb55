"""benchmarks/training.py at a tiny size: every kind of step is measured, on the masks that were asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import training


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict:
    words = ["training", *options, "--batch", "2", "--repetitions", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    training.main()
    (result,) = out.glob("training-*-fp32.json")
    assert result.with_suffix(".svg").stat().st_size > 1000
    return json.loads(result.read_text())


def test_every_kind_of_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(monkeypatch, tmp_path, "--models", "dit-s", "--layers", "2", "--side", "4")
    rows = {row["step"]: row for row in found["rows"]}
    frozen = [f"frozen routers, {ratio}" for ratio in training.RATIOS]
    assert list(rows) == [training.STATIC, training.DYNAMIC, training.TEACHER, training.COMPLETE, *frozen]
    assert rows[training.STATIC]["against_static"] == 1
    for ratio, kind in zip(training.RATIOS, frozen, strict=True):
        assert rows[kind]["ratio"] == pytest.approx(ratio, abs=0.06), "whole heads and tokens"
        assert rows[kind]["saved_bytes"] < rows[training.DYNAMIC]["saved_bytes"], "what is cut away keeps nothing"
    kept = rows[training.DYNAMIC]["saved_bytes"] / rows[training.STATIC]["saved_bytes"]
    assert kept < 1.2, "gates and masks keep next to nothing of their own"
    assert rows[training.COMPLETE]["saved_bytes"] > rows[training.DYNAMIC]["saved_bytes"]


def test_what_was_measured_stays_when_the_next_model_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = training.measure

    def fail(name: str, *others: object) -> list:
        if name == "dit-b":
            raise MemoryError
        return measure(name, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "measure", fail)
    with pytest.raises(MemoryError):
        run(monkeypatch, tmp_path, "--models", "dit-s", "dit-b", "--layers", "1", "--side", "4")
    (result,) = tmp_path.glob("training-*-fp32.json")
    assert {row["model"] for row in json.loads(result.read_text())["rows"]} == {"dit-s"}
