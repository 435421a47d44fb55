from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_scale.cli.main import main
from dydit_scale.workflows.demo import data_share, missed_goals


def test_goals_are_the_ratio_and_the_share_of_the_control() -> None:
    assert missed_goals(0.529, 0.5, 0.86, 1.0, 0.85) == []
    assert "0.531, not within 0.03 of 0.5" in missed_goals(0.531, 0.5, 0.86, 1.0, 0.85)[0]
    assert "less than 85% of its control's" in missed_goals(0.5, 0.5, 0.84, 1.0, 0.85)[0]
    assert len(missed_goals(0.4, 0.5, 0.0, 1.0, 0.85)) == 2


def test_the_share_of_time_that_data_took_is_that_of_all_steps(tmp_path: Path) -> None:
    records = [
        {"step": 0, "seconds": 3.0, "data_seconds": 0.5},
        {"step": 1, "seconds": 1.0, "data_seconds": 0.0},
        {"step": 2, "ratio_eval": 0.5, "mse_eval": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert data_share(tmp_path) == 0.125


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    recipes = Path(__file__).parents[2] / "recipes" / "shapes"
    assert main(["demo", "--out", str(tmp_path), "--recipes", str(recipes)]) == 64
    assert "was not made by a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
