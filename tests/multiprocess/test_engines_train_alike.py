"""ZeRO-2 under the deepspeed launcher and FSDP2 under torchrun, two processes each, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from tests.train.small_run import small_world

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "single": [sys.executable, "-m", "dydit_scale.train"],
    "zero": [str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "dydit_scale.train"],
    "fsdp": [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m", "dydit_scale.train"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("small"))


def launch(engine: str, recipe: Path, run: Path, *overrides: str, port: int) -> subprocess.CompletedProcess[str]:
    launcher = list(LAUNCHERS[engine])
    if engine != "single":
        launcher[1:1] = ["--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [*launcher, str(recipe), f"engine.name={engine}", f"run={run}", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def curve(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "checkpoint_seconds" not in record]


@pytest.mark.launch
@pytest.mark.parametrize("adapter", ["td_lora", pytest.param("none", marks=pytest.mark.slow)])
def test_same_losses_and_every_parameter_learns(recipe: Path, tmp_path: Path, adapter: str) -> None:
    records = {}
    for n, engine in enumerate(LAUNCHERS):
        done = launch(engine, recipe, tmp_path / engine, f"adapter.kind={adapter}", port=29611 + n)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        records[engine] = curve(tmp_path / engine)
        checkpoint = load_checkpoint(tmp_path / engine / "checkpoints")
        assert checkpoint is not None
        still = [k for k, v in checkpoint.tensors.items() if k.startswith("exp_avg.") and not v.any()]
        assert still == [], f"{engine}: parameters without a gradient"
    for engine in ("zero", "fsdp"):
        assert len(records[engine]) == len(records["single"]) == 6
        for ours, theirs in zip(records[engine], records["single"], strict=True):
            for key in ("loss", "ratio", "mse_eval", "ratio_eval"):
                assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-5), (engine, key, ours["step"])


@pytest.mark.launch
@pytest.mark.slow  # three launches; tests/checkpoint moves between all engines without a launcher
def test_one_engine_continues_anothers_run(recipe: Path, tmp_path: Path) -> None:
    whole = launch("single", recipe, tmp_path / "whole", port=0)
    assert whole.returncode == 0, whole.stderr[-3000:]
    first = launch("fsdp", recipe, tmp_path / "cut", "train.steps=4", "train.save_every=2", port=29621)
    assert first.returncode == 0, first.stderr[-3000:]
    for file in (tmp_path / "cut" / "checkpoints" / "step-0000000004").iterdir():
        file.unlink()
    (tmp_path / "cut" / "checkpoints" / "step-0000000004").rmdir()
    second = launch("zero", recipe, tmp_path / "cut", "--resume", port=29622)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    a, b = (curve(tmp_path / name) for name in ("whole", "cut"))
    assert [r.get("loss") for r in a] == pytest.approx([r.get("loss") for r in b], abs=1e-5)


@pytest.mark.launch
@pytest.mark.slow  # a launch for one refusal
def test_a_batch_that_two_ranks_cannot_share_is_refused_by_both(recipe: Path, tmp_path: Path) -> None:
    done = launch("fsdp", recipe, tmp_path / "run", "train.batch_size=7", port=29631)
    assert done.returncode != 0
    assert "train.batch_size 7: not divisible by 2 ranks; the nearest that fit are 6 and 8" in done.stderr
