"""A run leaves where it is asked to, and goes on as if it had never left."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from dydit_scale.checkpoint.folder import list_checkpoints
from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint
from dydit_scale.cli.main import main as dydit
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.monitoring.registry import CLOCK_KEYS
from dydit_scale.train.__main__ import main
from dydit_scale.train.attempt import ATTEMPT_FILE, Attempt, read_holder, take_folder
from dydit_scale.train.exits import Exit
from dydit_scale.train.stopping import SIGNALS, STOP_FILE, StopRequest
from tests.parallel.launch import ROOT
from tests.train.small_run import small_world


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.parent / "whole"
    assert main([str(recipe), f"run={run}"]) == Exit.DONE
    return run


def start(recipe: Path, run: Path, *words: str) -> int:
    return main([str(recipe), f"run={run}", *words], stop=StopRequest().catch_signals())


def newest(run: Path) -> Checkpoint:
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def curve(run: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCK_KEYS} for r in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("fault", "steps"),
    [("train.step=0", 1), ("train.step=2", 3), ("data.next=2", 3), ("train.evaluate=1", 2)],
)
def test_a_run_asked_to_stop_saves_leaves_and_continues_exactly(
    recipe: Path, whole: Path, tmp_path: Path, fault: str, steps: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    monkeypatch.setenv("DYDIT_FAULT", f"{fault}:term")
    assert start(recipe, run) == Exit.STOPPED
    assert f"stopped before step {steps} of 4 by SIGTERM on rank 0" in capsys.readouterr().out
    assert newest(run).step == steps
    holder = read_holder(run)
    assert holder is not None and holder.ended == "Stopped"
    assert start(recipe, run, "--resume") == Exit.DONE
    assert [r for r in curve(run) if "loss" in r] == [r for r in curve(whole) if "loss" in r]
    ours, theirs = newest(run).tensors, newest(whole).tensors
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_stop_between_micro_batches_leaves_the_step_undone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "train.step=2:term")
    assert start(recipe, tmp_path, "train.accumulation=2", "train.save_every=0") == Exit.STOPPED
    assert newest(tmp_path).step == 2 and newest(tmp_path).meta["consumed"] == 16


def test_a_stop_during_set_up_saves_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "train.start:term")
    assert start(recipe, tmp_path) == Exit.STOPPED
    assert "stopped during set-up by SIGTERM" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()
    early = StopRequest()
    early.reason = "SIGTERM"
    assert main([str(recipe), f"run={tmp_path / 'other'}"], stop=early) == Exit.STOPPED
    assert not (tmp_path / "other").exists()


def test_a_second_signal_during_the_save_changes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(point: str, step: int | None = None) -> None:
        if point == "checkpoint.staged":
            for number in SIGNALS:
                os.kill(os.getpid(), number)

    monkeypatch.setattr("dydit_scale.checkpoint.writer.fail_point", signalled)
    monkeypatch.setenv("DYDIT_FAULT", "train.step=2:term")
    assert start(recipe, tmp_path, "train.save_every=0") == Exit.STOPPED
    assert newest(tmp_path).step == 3


def test_the_readme_lists_the_exit_codes() -> None:
    table = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == sorted(set(Exit) - {Exit.FAILED})


def test_a_stop_in_the_last_step_is_a_run_that_is_done(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "train.step=3:term")
    assert start(recipe, tmp_path) == Exit.DONE
    assert "mse_eval" in curve(tmp_path)[-1]


def test_dydit_stop_ends_a_run_and_waits_for_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, answers = tmp_path / "run", []

    def ask() -> None:
        while not (run / "metrics.jsonl").is_file():
            time.sleep(0.1)
        answers.append(dydit(["stop", str(run), "--wait", "--timeout", "120"]))

    asking = threading.Thread(target=ask)
    asking.start()
    code = start(recipe, run, "train.steps=10000", "train.evaluate_every=0", "train.save_every=0")
    asking.join(120)
    assert code == Exit.STOPPED and answers == [0]
    said = capsys.readouterr().out
    assert "to stop after its step" in said and "it has left (Stopped)" in said and f"by the file {run}" in said
    assert newest(run).step == len([record for record in curve(run) if "loss" in record]) > 0
    assert not (run / STOP_FILE).exists()
    assert dydit(["stop", str(run), "--wait"]) == 0
    assert "nothing runs there; the last was process" in capsys.readouterr().out
    assert dydit(["stop", str(tmp_path / "nowhere")]) == 64
    assert "no such folder" in capsys.readouterr().err


def test_dydit_stop_says_when_a_run_does_not_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    take_folder(tmp_path, wait=0)
    assert dydit(["stop", str(tmp_path), "--wait", "--timeout", "0.1"]) == 1
    assert "still there after 0 s" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "the token of an earlier attempt"])
def test_a_stop_file_of_earlier_does_not_stop_the_next_run(tmp_path: Path, content: str) -> None:
    file = tmp_path / STOP_FILE
    file.write_text(content)
    request = StopRequest()
    request.watch(tmp_path, "ours")
    assert not request.asked() and not file.exists()
    file.write_text("another's")
    assert not request.asked()
    file.touch()
    file.write_text("")
    assert request.asked() and request.reason == f"the file {file}"


def steal(run: Path) -> None:
    """As if another process had taken the folder."""
    holder = read_holder(run)
    assert holder is not None
    file = run / ATTEMPT_FILE
    file.write_text(file.read_text().replace(holder.token, "thief"))


def test_a_run_that_lost_its_folder_commits_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unnoticed(attempt: Attempt) -> bool:
        steal(attempt.folder)
        return False

    monkeypatch.setattr(Attempt, "lost", unnoticed)
    assert start(recipe, tmp_path) == Exit.FAILED
    assert "taken over by process" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "checkpoints") == [] and len(curve(tmp_path)) == 2
    holder = read_holder(tmp_path)
    assert holder is not None and holder.token == "thief" and holder.ended is None


def test_a_run_that_lost_its_folder_leaves_in_the_same_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_point(point: str, step: int | None = None) -> None:
        if (point, step) == ("train.step", 1):
            steal(tmp_path)

    monkeypatch.setattr("dydit_scale.train.loop.fail_point", fail_point)
    assert start(recipe, tmp_path, "train.save_every=0") == Exit.FAILED
    assert "taken over by process" in capsys.readouterr().err
    assert len(curve(tmp_path)) == 1


def test_a_second_start_in_the_folder_of_a_living_run_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = take_folder(tmp_path, wait=0)
    assert start(recipe, tmp_path, "limits.takeover=0.2") == Exit.FAILED
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    ours.still_ours()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [ATTEMPT_FILE]


def test_a_stop_after_a_return_keeps_the_place_in_the_data(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the resumed run would read the bad window again, and return to this checkpoint once more."""
    monkeypatch.setenv("DYDIT_FAULT", "train.loss=2:nan,train.step=2:term")
    assert start(recipe, tmp_path, "guard.refused=1") == Exit.STOPPED
    left = newest(tmp_path)
    assert left.step == 2 and left.meta["consumed"] == 3 * 8
    assert len(left.meta["guard"]["rollbacks"]) == 1
