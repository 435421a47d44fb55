"""A run goes on under any engine and number of ranks as if it had not stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_scale.checkpoint.folder import checkpoint_path
from dydit_scale.checkpoint.state import restore
from dydit_scale.checkpoint.store import Checkpoint
from dydit_scale.parallel.world import ONE_PROCESS
from tests.checkpoint.resume import HALF, SOURCES, STEPS, TARGETS, gathered, go, resume, save, start
from tests.parallel.launch import Ranks

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

FOLDERS = ("single@1", *(f"{name}@2" for name in SOURCES))
MOVES = [f"{folder} -> {name}@2" for folder in FOLDERS for name in TARGETS]
MOVES += [f"{folder} -> {name}@1" for folder in FOLDERS for name in ("single", *SOURCES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per rank, what came of each save and each move; those to one rank are with rank 0."""
    out = tmp_path_factory.mktemp("resume")
    single = save(out, ONE_PROCESS, "single")
    with Ranks("tests.checkpoint.resume", str(out)) as ranks:
        ranks.wait()
    both = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    both[0]["single@1"] = json.loads(json.dumps(single))
    for move in MOVES:
        source, _, target = move.partition(" -> ")
        if target.endswith("@1"):
            both[0][move] = json.loads(json.dumps(resume(out, ONE_PROCESS, source, target.partition("@")[0])))
    both[0]["manifests"] = {
        folder: json.loads((checkpoint_path(out / folder, HALF) / "manifest.json").read_text()) for folder in FOLDERS
    }
    return both


@pytest.mark.parametrize("move", MOVES)
def test_resume_equals_the_uninterrupted_run(results: list[dict[str, Any]], move: str) -> None:
    expected = results[0]["single@1"]
    for rank, result in enumerate(results):
        if move not in result:
            assert rank == 1 and move.endswith("@1")
            continue
        got = result[move]
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank == 0 or got["end"] == {}
    end = results[0][move]["end"]
    assert sorted(end) == sorted(expected["end"]) and end["count.optimizer"] == end["count.ema"] == [STEPS]
    assert {name.partition(".")[0] for name in end} == {"param", "exp_avg", "exp_avg_sq", "ema", "count"}
    for name, values in expected["end"].items():
        assert end[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


def test_all_moves_were_made(results: list[dict[str, Any]]) -> None:
    assert len(MOVES) == 6 * 4 + 6 * 6
    for folder in FOLDERS:
        assert results[0][folder]["losses"] == pytest.approx(results[0]["single@1"]["losses"], rel=1e-5)


def test_every_rank_sees_a_failure(results: list[dict[str, Any]]) -> None:
    for result in (rank["together"] for rank in results):
        assert "blocked" in result["refused"] and "step 1 was not written" in result["refused"]
        assert result["step"] == result["x"] == 1
        assert result["nothing"] is None


def test_restore_refuses_what_does_not_fit() -> None:
    ema = start(ONE_PROCESS, "single")
    go(ema, range(1))
    tensors = gathered(ema)
    for change, message in (
        ({"param.scale": torch.zeros(3)}, r"scale: expected shape \(7,\), got \(3,\)"),
        ({"param.more": torch.zeros(3)}, "more is not trainable here"),
        ({"router.bias": torch.zeros(3)}, r"router\.bias is not part of"),
        ({"exp_avg.scale": None}, r"exp_avg\.scale is missing"),
        ({"count.optimizer": None}, "step is missing"),
        ({"count.ema": None}, "holds no average"),
        ({"ema.scale": None}, "ema state: scale is missing"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            restore(Checkpoint(1, changed, {}, Path("here")), start(ONE_PROCESS, "single").engine, ema)
    without = {k: v for k, v in tensors.items() if not k.startswith("ema.") and k != "count.ema"}
    with pytest.raises(ValueError, match="holds an average"):
        restore(Checkpoint(1, tensors, {}, Path("here")), ema.engine, None)
    restore(Checkpoint(1, without, {}, Path("here")), ema.engine, None)


def test_every_rank_writes_what_it_holds_and_nothing_twice(results: list[dict[str, Any]]) -> None:
    for folder in FOLDERS:
        name, _, ranks = folder.partition("@")
        manifest = results[0]["manifests"][folder]
        assert manifest["world_size"] == int(ranks) and manifest["engine"] == name
        files = {file["name"]: file["bytes"] for file in manifest["files"]}
        expected = ["rank-00000-00001.safetensors"]
        if ranks == "2" and name != "ddp":
            expected.append("rank-00001-00001.safetensors")
        assert sorted(files) == expected
        cut = [tensor for tensor in manifest["tensors"].values() if len(tensor["pieces"]) > 1]
        assert bool(cut) == (len(files) > 1)
