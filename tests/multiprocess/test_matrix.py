"""Every engine, at two and four ranks, trains every kind of model and of what may learn as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import ONE_PROCESS
from tests.families.journey import write_world
from tests.multiprocess import matrix
from tests.multiprocess.matrix import run_folder
from tests.parallel.launch import Ranks

# three minutes: two and four processes, thirteen and four runs
pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    worlds, out = tmp_path_factory.mktemp("worlds"), tmp_path_factory.mktemp("runs")
    for family in {kind.partition("/")[0] for kind in matrix.CASES[1]}:
        write_world(worlds / family, family)
    matrix.train_all(worlds, out, ONE_PROCESS)
    for ranks in (2, 4):
        with Ranks("tests.multiprocess.matrix", str(worlds), str(out), world_size=ranks) as processes:
            processes.wait()
    return out


CASES = [
    *((kind, engine, ranks) for ranks in (2, 4) for kind, engines in matrix.CASES[ranks].items() for engine in engines),
    (matrix.ELASTIC, "elastic", 4),
]


@pytest.mark.parametrize(("kind", "engine", "ranks"), CASES)
def test_same_training_as_one_process(runs: Path, kind: str, engine: str, ranks: int) -> None:
    ours, theirs = run_folder(runs, kind, engine, ranks), run_folder(runs, kind, "single", 1)
    curves = [
        [record for record in read_metrics(folder / "metrics.jsonl") if "checkpoint_seconds" not in record]
        for folder in (ours, theirs)
    ]
    assert len(curves[0]) == len(curves[1]) >= 3
    for a, b in zip(*curves, strict=True):
        for key in ("loss", "ratio", "mse_eval", "ratio_eval"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), (key, a["step"])
    states = [load_checkpoint(folder / "checkpoints") for folder in (ours, theirs)]
    assert states[0] is not None and states[1] is not None
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, expected in states[1].tensors.items():
        # a key's bias changes nothing in a softmax; AdamW makes steps of what is left of its gradient by rounding
        if name.partition(".")[0] in ("param", "ema") and not name.endswith(("to_k.bias", "add_k_proj.bias")):
            off = (states[0].tensors[name] - expected).abs()
            assert float((off > 1e-6).sum()) <= 0.01 * off.numel() + 1 and float(off.max()) < 2e-5, (name, off.max())
