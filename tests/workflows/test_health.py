from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dydit_scale.cli.main import main
from dydit_scale.monitoring.records import METRICS_FILE, RUN_FILE, rank_file
from dydit_scale.train.attempt import ATTEMPT_FILE, Attempt, take_folder
from dydit_scale.workflows.health import health_of


def attempt_in(run: Path, *, trains: bool = True, ranks: int = 2, first_step: int = 0) -> Attempt:
    attempt = take_folder(run, wait=0)
    if trains:
        (run / METRICS_FILE).write_text('{"step": 6, "loss": 1}\n')
        (run / RUN_FILE).write_text(json.dumps({"token": attempt.token, "ranks": ranks, "first_step": first_step}))
        for rank in range(ranks + 1):  # the last is of an earlier attempt, on more ranks
            rank_file(run, rank).parent.mkdir(exist_ok=True)
            rank_file(run, rank).write_text("")
    return attempt


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_run_that_trains_is_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt_in(tmp_path)
    commit = tmp_path / "checkpoints" / "step-0000000005"
    commit.mkdir(parents=True)
    age(commit, 500)
    age(rank_file(tmp_path, 2), 5000)
    assert main(["health", str(tmp_path), "--max-age", "100"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("healthy: training; step 6; heartbeat 0 s ago, step 0 s ago, commit 500 s ago")


STALE = {
    ATTEMPT_FILE: "no sign of life of process",
    METRICS_FILE: "no step, evaluation or save for more than 100 s",
    "ranks/rank-00001.jsonl": "no sign of life of rank 1 for more than 100 s",
}


@pytest.mark.parametrize("file", STALE)
def test_silence_is_not_healthy(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    attempt_in(tmp_path)
    age(tmp_path / RUN_FILE, 300)
    age(tmp_path / file, 90)
    assert main(["health", str(tmp_path), "--max-age", "100"]) == 0
    age(tmp_path / file, 200)
    capsys.readouterr()
    assert main(["health", str(tmp_path), "--max-age", "100"]) == 1
    assert f"not healthy: {STALE[file]}" in capsys.readouterr().out
    assert main(["health", str(tmp_path), "--max-age", "250"]) == 0


def test_set_up_needs_signs_of_life_alone(tmp_path: Path) -> None:
    attempt_in(tmp_path)
    for path in (tmp_path / METRICS_FILE, tmp_path / RUN_FILE, *(tmp_path / "ranks").iterdir()):
        age(path, 5000)
    (tmp_path / ATTEMPT_FILE).unlink()
    attempt_in(tmp_path, trains=False)  # the next attempt, which has not written yet
    assert health_of(tmp_path, max_age=100)[:2] == (True, "being set up")
    age(tmp_path / ATTEMPT_FILE, 200)
    assert not health_of(tmp_path, max_age=100).healthy


def test_the_first_step_belongs_to_the_set_up(tmp_path: Path) -> None:
    """It may compile for longer than any other; the watchdog has its own limit for it."""
    attempt_in(tmp_path, first_step=7)  # resumed: the newest record is of step 6
    for path in (tmp_path / METRICS_FILE, tmp_path / RUN_FILE):
        age(path, 300)
    assert health_of(tmp_path, max_age=100)[:2] == (True, "training")
    for step, healthy in ((7, False), (6, True)):
        (tmp_path / METRICS_FILE).write_text(f'{{"step": {step}, "loss": 1}}\n')
        age(tmp_path / METRICS_FILE, 300)
        assert health_of(tmp_path, max_age=100).healthy == healthy
    age(tmp_path / ATTEMPT_FILE, 200)
    assert not health_of(tmp_path, max_age=100).healthy


@pytest.mark.parametrize(("how", "healthy"), [("done", True), ("Stopped", True), ("CheckpointError", False)])
def test_how_a_run_ended_counts(tmp_path: Path, how: str, healthy: bool) -> None:
    attempt_in(tmp_path).end(how)
    age(tmp_path / ATTEMPT_FILE, 5000)
    assert health_of(tmp_path, max_age=100)[:2] == (healthy, f"ended ({how})")


def test_where_nothing_trained_nothing_is_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", str(tmp_path / "none"), "--max-age", "5"]) == 1
    assert "nothing has trained in" in capsys.readouterr().out
    assert main(["health", str(tmp_path), "--max-age", "0"]) == 64
    assert "--max-age: expected seconds, more than 0; got 0" in capsys.readouterr().err


def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['/bin/dydit', *sys.argv[1:]]; from dydit_scale.cli.main import main; code = main();"
        "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules]); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, "health", str(tmp_path), "--max-age", "9"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
