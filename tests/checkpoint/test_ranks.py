"""Two ranks save together: deaths at every point, failures of one rank, a lost run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.checkpoint.ranks import POINTS
from tests.parallel.launch import ROOT, child_environment

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.checkpoint.ranks", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("point,rank", POINTS)
def test_killed_at_every_point(results: dict[str, Any], point: str, rank: int) -> None:
    got = results[f"{point}@{rank}"]
    assert len(POINTS) == 9
    assert got["codes"][rank] == -9, "it was to be killed"
    assert got["found"] == (3 if point in ("after_rename", "pruning") else 2)
    assert got["again"] == got["found"] and got["stale"] == []
    assert got["codes"][2:] == [0, 0] and got["end"] == 4 and got["names"] == ["latest", "step-0000000004"]


def test_a_failure_of_one_rank_is_told_to_all_and_survived(results: dict[str, Any]) -> None:
    got = results["failing"]
    assert got["codes"] == [0, 0] and got["present"] == ["3", "5"]
    for rank in got["told"]:
        assert [(step, good, failures) for step, good, _, failures in rank["told"]] == [
            (1, True, 0), (2, False, 1), (3, True, 0), (4, False, 1), (5, True, 0), (6, False, 1), (7, False, 2),
        ]  # fmt: skip
        texts = {step: text for step, _, text, _ in rank["told"]}
        assert texts[1] == "" and "step 2 was not written" in texts[2] and "rank 1: [Errno 28]" in texts[2]
        assert "rank 0: DYDIT_FAULT: raised at checkpoint.staged" in texts[4]
        assert "rank 1: DYDIT_FAULT: raised at checkpoint.writing" in texts[6]
        assert rank["ends"][0] == "" and "raised at checkpoint.before_commit" in rank["ends"][1]
    assert got["told"][0] == got["told"][1]


def test_a_process_that_lost_the_run_changes_nothing_and_ends(results: dict[str, Any]) -> None:
    got = results["lost"]
    assert got["codes"] == [0, 0] and got["names"] == ["latest", "step-0000000001"]
    assert all("another process took over the run" in text for text in got["told"])


def test_digests_are_shared_out_and_the_verdict_is_agreed_on(results: dict[str, Any]) -> None:
    got = results["shared"]
    assert got["codes"] == [0, 0]
    (step0, read0, seen0), (step1, read1, seen1) = got["ranks"]
    assert step0 == step1 == 1
    assert len(read0) == len(read1) == 2 and not set(read0) & set(read1)
    assert len(seen0) == 1 and "rank 1: " in seen0[0] and "sha256 differs" in seen0[0] and seen1 == []
