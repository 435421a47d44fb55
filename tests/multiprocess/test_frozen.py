"""Every engine on two ranks goes through the phase of frozen routers as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import ONE_PROCESS
from tests.families.journey import write_world
from tests.multiprocess import frozen
from tests.multiprocess.matrix import run_folder
from tests.parallel.launch import Ranks

# a minute: two processes and one, nine and five runs
pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    worlds, out = tmp_path_factory.mktemp("worlds"), tmp_path_factory.mktemp("runs")
    for family in {kind.partition("/")[0] for kind in frozen.ENGINES_OF}:
        write_world(worlds / family, family)
    with pytest.MonkeyPatch.context() as patch:
        frozen.divide_routers(patch.setattr)
        for kind in frozen.ENGINES_OF:
            frozen.enter(worlds, out, kind, "single", ONE_PROCESS)
    with Ranks("tests.multiprocess.frozen", str(worlds), str(out), world_size=2) as processes:
        processes.wait()
    return out


@pytest.mark.parametrize(("kind", "engine"), [(k, e) for k, engines in frozen.ENGINES_OF.items() for e in engines])
def test_same_phase_as_one_process(runs: Path, kind: str, engine: str) -> None:
    ours, theirs = run_folder(runs, kind, engine, 2), run_folder(runs, kind, "single", 1)
    curves = [
        [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record] for folder in (ours, theirs)
    ]
    assert len(curves[0]) == len(curves[1]) == 4
    for a, b in zip(*curves, strict=True):
        assert a.get("sub_networks") == b.get("sub_networks")
        for key in ("loss", "ratio", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (key, a["step"])
    assert curves[0][-1]["sub_networks"] > 1
    states = [load_checkpoint(folder / "checkpoints") for folder in (ours, theirs)]
    assert states[0] is not None and states[1] is not None
    for name, expected in states[1].tensors.items():
        # a key's bias changes nothing in a softmax; AdamW makes steps of what is left of its gradient by rounding
        if name.partition(".")[0] in ("param", "ema") and not name.endswith(("to_k.bias", "add_k_proj.bias")):
            off = (states[0].tensors[name] - expected).abs()
            assert float((off > 1e-6).sum()) <= 0.01 * off.numel() + 1 and float(off.max()) < 2e-5, (name, off.max())
