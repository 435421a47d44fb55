"""Ranks that hold micro-batches of different sizes in the same step train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from tests.families.journey import write_world
from tests.multiprocess.sizes import run_folder
from tests.parallel.launch import Ranks

pytestmark = [pytest.mark.launch, pytest.mark.slow]  # one and two processes, two and six runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    worlds, out = tmp_path_factory.mktemp("worlds"), tmp_path_factory.mktemp("runs")
    for family in ("flux", "latte"):
        write_world(worlds / family, family)
    for ranks in (1, 2):
        with Ranks("tests.multiprocess.sizes", str(worlds), str(out), world_size=ranks) as processes:
            processes.wait()
    return out


@pytest.mark.parametrize(
    ("family", "engine", "other", "cost"),
    [
        *(("flux", engine, "single", False) for engine in ("zero2", "zero3", "fsdp")),
        ("latte", "fsdp", "single", False),
        ("flux", "zero2", "fsdp", True),
    ],
)
def test_the_same_training(runs: Path, family: str, engine: str, other: str, cost: bool) -> None:
    folders = [run_folder(runs, family, name, cost=cost) for name in (engine, other)]
    ours, theirs = ([r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r] for folder in folders)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "ratio", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
    mine, base = (load_checkpoint(folder / "checkpoints") for folder in folders)
    assert mine is not None and base is not None and mine.tensors.keys() == base.tensors.keys()
    for name, expected in base.tensors.items():
        # a key's bias changes nothing in a softmax; AdamW makes steps of what is left of its gradient by rounding
        if name.startswith("param.") and not name.endswith(("to_k.bias", "add_k_proj.bias")):
            off = (mine.tensors[name] - expected).abs()
            assert float((off > 1e-5).sum()) <= 0.01 * off.numel() + 1, (name, float(off.max()))


def test_the_cost_loss_acts(runs: Path) -> None:
    last = [read_metrics(run_folder(runs, "flux", "zero2", cost=cost) / "metrics.jsonl")[2] for cost in (True, False)]
    assert last[0]["ratio"] != last[1]["ratio"]
