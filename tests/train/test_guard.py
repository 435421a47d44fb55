"""Steps that go wrong are left out; too many of them in a row send the run back, and in the end away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.train.__main__ import main
from dydit_scale.train.exits import Exit
from dydit_scale.train.guard import ENOUGH, Guard, GuardConfig
from tests.train.small_run import small_world

TWO_BAD_STEPS = "train.loss=2:nan,train.loss=3:nan"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("small"))


def start(recipe: Path, run: Path, *words: str) -> int:
    return main([str(recipe), f"run={run}", "train.evaluate_every=0", *words])


def newest(run: Path) -> Checkpoint:
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def steps(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def test_a_step_that_is_not_finite_is_left_out(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "train.loss=1:inf")
    assert start(recipe, tmp_path, "train.save_every=0") == Exit.DONE
    said = capsys.readouterr().out
    assert "step 1: the gradients are not finite, the step is left out (1 in a row, limit 10)" in said
    checkpoint = newest(tmp_path)
    assert int(checkpoint.tensors["count.optimizer"]) == int(checkpoint.tensors["count.ema"]) == 3
    assert checkpoint.meta["consumed"] == 32
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())


def test_several_in_a_row_send_the_run_back_and_the_data_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.steps=6", "train.keep=9", "guard.refused=2"]
    monkeypatch.setenv("DYDIT_FAULT", TWO_BAD_STEPS)
    assert start(recipe, tmp_path, *words) == Exit.DONE
    assert steps(tmp_path) == [0, 1, 2, 3, 2, 3, 4, 5]
    checkpoint, rollbacks = newest(tmp_path), [{"at": 4, "to": 2, "consumed": 32}]
    assert checkpoint.meta["consumed"] == 64 and checkpoint.meta["guard"]["rollbacks"] == rollbacks
    assert int(checkpoint.tensors["count.optimizer"]) == 6
    (event,) = (r for r in read_metrics(tmp_path / "metrics.jsonl") if "event" in r)
    assert event == {"step": 2, "event": "rollback", "at": 4, "consumed": 32}
    (bad,) = tmp_path.glob("bad-batch-*.json")
    rows = json.loads(bad.read_text())
    assert [row["step"] for row in rows] == [2, 3] and all(len(row["keys"]) == 8 for row in rows)
    assert [row["positions"] for row in rows] == [list(range(16, 24)), list(range(24, 32))]
    # killed after the return, and resumed from the checkpoint that followed it
    shutil.rmtree(checkpoint.path)
    assert start(recipe, tmp_path, *words, "--resume") == Exit.DONE
    again = newest(tmp_path)
    assert again.meta["consumed"] == 64 and again.meta["guard"]["rollbacks"] == rollbacks
    assert all(torch.equal(again.tensors[k], checkpoint.tensors[k]) for k in checkpoint.tensors)


def test_a_run_that_comes_to_grief_twice_at_one_place_gives_up(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", f"{TWO_BAD_STEPS},train.loss=2:inf,train.loss=3:inf")
    assert start(recipe, tmp_path, "guard.refused=2", "train.save_every=1") == Exit.NOT_FINITE
    assert "went wrong again after the return to step 2, which is intact" in capsys.readouterr().err
    assert [p.name for p in sorted(tmp_path.glob("bad-batch-*"))] == [
        "bad-batch-0000003-1.json",
        "bad-batch-0000003-2.json",
    ]
    assert newest(tmp_path).step == 2


def test_without_a_checkpoint_there_is_no_way_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "train.loss=0:nan")
    assert start(recipe, tmp_path, "guard.refused=1") == Exit.NOT_FINITE
    assert "there is no checkpoint yet" in capsys.readouterr().err
    assert (tmp_path / "bad-batch-0000000-1.json").is_file()


def test_a_spike_of_the_loss_sends_the_run_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"train.steps={ENOUGH + 4}", f"train.save_every={ENOUGH}", "guard.spike=30"]
    monkeypatch.setenv("DYDIT_FAULT", f"train.loss={ENOUGH + 1}:spike")
    assert start(recipe, tmp_path, *words) == Exit.DONE
    assert "a spike (guard.spike)" in capsys.readouterr().out
    assert steps(tmp_path)[ENOUGH:] == [ENOUGH, ENOUGH + 1, ENOUGH, ENOUGH + 1, ENOUGH + 2, ENOUGH + 3]
    assert int(newest(tmp_path).tensors["count.optimizer"]) == ENOUGH + 4
    assert len(newest(tmp_path).meta["guard"]["losses"]) == ENOUGH + 4


def test_the_median_needs_losses_and_survives_a_checkpoint() -> None:
    guard = Guard(GuardConfig(spike=10.0))
    for _ in range(ENOUGH - 1):
        guard.went_well(1.0)
    assert not guard.is_spike(100.0)
    guard.went_well(1.0)
    assert guard.is_spike(10.5) and not guard.is_spike(9.5) and not guard.is_spike(float("nan"))
    other = Guard(GuardConfig(spike=10.0))
    other.load(json.loads(json.dumps(guard.state())))
    assert other.is_spike(10.5)
    assert not Guard(GuardConfig()).is_spike(1e9)


@pytest.mark.parametrize("setting", [{"refused": 0}, {"spike": 1.0}])
def test_settings_that_make_no_sense_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"guard.{next(iter(setting))}: expected"):
        GuardConfig(**setting)
