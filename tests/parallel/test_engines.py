"""All engines compute what one process computes, at one and at two ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import EngineConfig, ParamGroup, make_engine
from dydit_scale.parallel.world import ONE_PROCESS, World, close, init_world
from tests.parallel.cases import DECAY, MORE, PROBE, SHARDED, parity, run_all
from tests.parallel.launch import ROOT, Ranks, child_environment, free_port
from tests.parallel.toy import CLIP, config_of, groups_of, losses_of, make_toy, toy_engine

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

RUNS = ["single@1"] + [f"{name}@{ranks}" for ranks in (1, 2) for name in SHARDED]
MORE_RUNS = [f"{name}@{ranks}" for ranks in (1, 2) for name in MORE]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Per engine@ranks, the results of each rank; two ranks run beside this process."""
    out = tmp_path_factory.mktemp("ranks")
    with Ranks("tests.parallel.cases", str(out)) as ranks:
        alone = json.loads(json.dumps(run_all(ONE_PROCESS, ("single", *SHARDED))))
        ranks.wait()
    both = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {run: [alone] if run.endswith("@1") else both for run in RUNS + MORE_RUNS}


def case(results: Results, run: str, kind: str, *more: object) -> list[dict[str, Any]]:
    key = "/".join([kind, run.partition("@")[0], *map(str, more)])
    return [rank[key] for rank in results[run]]


def assert_close(got: dict[str, list[float]], expected: dict[str, list[float]], tolerance: float) -> None:
    assert list(got) and sorted(got) == sorted(expected)
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize(("run", "accumulation"), [*product(RUNS, [1, 2, "tuple"]), *product(MORE_RUNS, [2])])
def test_same_training_as_one_process(results: Results, run: str, accumulation: int | str) -> None:
    reference = case(results, "single@1", "parity", 2 if accumulation == "tuple" else accumulation)[0]
    assert min(reference["norms"]) < CLIP < max(reference["norms"]), "the limit must clip some steps and not others"
    for rank, got in enumerate(case(results, run, "parity", accumulation)):
        assert got["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        assert got["applied"] == [True] * 6
        if rank > 0:
            assert got["weights"] == got["optimizer"] == {}
            continue
        assert_close(got["weights"], reference["weights"], 1e-5)
        assert_close(got["optimizer"], reference["optimizer"], 1e-5)
        assert got["optimizer"]["step"] == [6]


@pytest.mark.parametrize("spoil", ["nan", "inf"])
@pytest.mark.parametrize("run", RUNS)
def test_step_without_finite_gradients_changes_nothing_on_any_rank(results: Results, run: str, spoil: str) -> None:
    reference = case(results, "single@1", "parity", 2)[0]
    for got in case(results, run, "guard", spoil):
        assert got["applied"] is False and not math.isfinite(got["norm"])
        assert got["same"] and got["kept"] > 10
        assert got["losses"] == pytest.approx(reference["losses"], rel=1e-5)


@pytest.mark.parametrize("run", RUNS + MORE_RUNS)
def test_the_pieces_that_are_saved_are_everything_once(results: Results, run: str) -> None:
    for got in case(results, run, "covered"):
        assert got["fits"] and len(got["counts"]) > 10
        assert {count for counts in got["counts"].values() for count in counts} == {1.0}


@pytest.mark.parametrize("run", RUNS + MORE_RUNS)
def test_average(results: Results, run: str) -> None:
    expected, outside = _average_by_hand()
    toy = make_toy()
    toy.load_state_dict(expected, strict=False)
    with torch.no_grad():
        inside = toy(PROBE).prediction
    for rank, got in enumerate(case(results, run, "average")):
        assert torch.allclose(torch.tensor(got["inside"]), inside, atol=1e-5)
        assert torch.allclose(torch.tensor(got["before"]), outside, atol=1e-5)
        assert not torch.allclose(inside, outside, atol=1e-3)
        assert got["same"]
        assert got["losses"] == pytest.approx(case(results, "single@1", "parity", 1)[0]["losses"], rel=1e-5)
        if rank == 0:
            assert_close(got["state"], {name: tensor.flatten().tolist() for name, tensor in expected.items()}, 1e-5)


def _average_by_hand() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    engine = toy_engine(config_of("single"), ONE_PROCESS)
    average = engine.trainable_state()
    for step, decay in enumerate((1 / 10, DECAY, DECAY)):  # (1 + s) / (10 + s) = 0.1, 0.18, 0.25
        losses_of(engine, range(step, step + 1))
        weights = engine.trainable_state()
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    with torch.no_grad():
        return average, engine.module(PROBE).prediction


@pytest.mark.parametrize("run", RUNS)
def test_bf16_over_a_frozen_bf16_base(results: Results, run: str) -> None:
    reference = case(results, "single@1", "half")[0]["losses"]
    full = case(results, "single@1", "parity", 2)[0]["losses"][:4]
    assert reference != full and reference == pytest.approx(full, rel=0.05)
    for got in case(results, run, "half"):
        # bf16 rounds at 2^-8 = 0.4%; rows are rounded alike, only the order of sums differs
        assert got["losses"] == pytest.approx(reference, rel=0.01)
        assert got["frozen"] == ["torch.bfloat16"] and got["kept"] == ["torch.float32"]


@pytest.mark.parametrize("gate_scope", ["layer", "network"])
@pytest.mark.parametrize("run", RUNS)
def test_the_saved_adapter_is_that_of_one_process_byte_for_byte(results: Results, run: str, gate_scope: str) -> None:
    main, *others = case(results, run, "adapter", gate_scope)
    assert main == case(results, "single@1", "adapter", gate_scope)[0]
    assert set(main["files"]) == {"adapter_model.safetensors", "adapter_config.json", "dynamic_routers.safetensors"}
    assert len(main["some"]) > 4 and all(rank == {"some": [], "files": {}} for rank in others)


@pytest.mark.parametrize("run", RUNS)
def test_a_gate_that_all_blocks_share_learns_alike(results: Results, run: str) -> None:
    reference = case(results, "single@1", "network_gate")[0]
    for rank, got in enumerate(case(results, run, "network_gate")):
        assert got["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        if rank == 0:
            assert sorted(got["gate"]) == [f"timestep_gates.td_router.default.{part}" for part in ("bias", "weight")]
            assert_close(got["gate"], reference["gate"], 1e-3)
            assert all(any(values) for values in got["gate"].values()), "the gate starts at zero and must learn"


def test_reductions(results: Results) -> None:
    rows = torch.arange(1.0, 7.0)
    for run in ("single@1", "fsdp@2"):
        for got in (rank["reductions"] for rank in results[run]):
            ranks = len(results[run])
            mean = 0.3 * float(rows.mean())
            assert got["mean"] == pytest.approx(mean)
            assert got["gradient"] == pytest.approx(2 * (mean - 1) * float(rows.mean()), rel=1e-5)
            assert got["flags"] == [False, True, True]
            assert got["values"] == {"a": (ranks - 1) / 2, "b": 2.0}
            assert got["object"] == {"from": 0}


@pytest.mark.slow  # a launch; tests/multiprocess trains under the same launcher
def test_under_the_deepspeed_launcher(tmp_path: Path) -> None:
    """The command of the documentation, on a machine without GPUs."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank"]
    command += ["--module", "tests.parallel.cases", str(tmp_path), "zero2"]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    expected = parity(ONE_PROCESS, "single", 1)["losses"]
    for rank in range(2):
        got = json.loads((tmp_path / f"rank{rank}.json").read_text())["zero2"]
        assert got["losses"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["single", *SHARDED])
def test_load_is_strict_and_changes_nothing_when_it_fails(name: str) -> None:
    engine = toy_engine(config_of(name), ONE_PROCESS)
    weights, optimizer = engine.trainable_state(), engine.optimizer_state()
    wrong_shape = {**weights, "blocks.1.up.weight": torch.zeros(7, 3)}
    missing = {key: tensor for key, tensor in optimizer.items() if key != "exp_avg_sq.scale"}
    for trainable, moments, message in (
        (wrong_shape, optimizer, r"blocks\.1\.up\.weight: expected shape \(7, 2\), got \(7, 3\)"),
        (
            {**weights, "blocks.1.base.weight": torch.zeros(7)},
            optimizer,
            r"blocks\.1\.base\.weight is not trainable",
        ),
        ({key: torch.ones_like(tensor) for key, tensor in weights.items()}, missing, r"exp_avg_sq\.scale is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load(trainable, moments)
    after = engine.trainable_state()
    assert all(torch.equal(after[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("name", ["single", *SHARDED])
def test_load_without_optimizer_starts_it_afresh(name: str) -> None:
    engine = toy_engine(config_of(name), ONE_PROCESS)
    start = engine.trainable_state()
    losses = losses_of(engine, range(3))
    assert engine.updates == 3
    engine.load(start, None)
    assert engine.updates == 0
    assert losses_of(engine, range(3)) == losses


def test_groups_that_do_not_fit_are_named() -> None:
    toy = make_toy()
    others, routers = groups_of(toy)
    frozen = ParamGroup(name="base", params={"enter.weight": toy.enter.weight}, lr=1.0)
    for groups, message in (
        ([others], r"blocks\.0\.router\.weight and 5 more are trainable but in no group"),
        ([others, routers, routers], r"blocks\.0\.router\.weight is already in group routers"),
        ([others, routers, frozen], r"enter\.weight is not a trainable parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            make_engine(EngineConfig(), toy, groups, ONE_PROCESS)
    toy.scale.data = toy.scale.data.bfloat16()
    with pytest.raises(ValueError, match=r"scale: expected torch.float32, got torch.bfloat16"):
        make_engine(EngineConfig(), toy, [others, routers], ONE_PROCESS)


def test_settings_are_checked() -> None:
    for wrong in ({"name": "mpi"}, {"precision": "fp16"}, {"zero_stage": 4}, {"clip_norm": float("nan")}):
        with pytest.raises(ValueError, match=f"engine.{next(iter(wrong))}"):
            EngineConfig(**wrong)  # type: ignore[arg-type]
    for offload in ({"name": "fsdp", "offload": "optimizer"}, {"name": "zero", "offload": "parameters"}):
        with pytest.raises(ValueError, match=r"engine\.offload: .* is not for"):
            EngineConfig(**offload)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shard_ranks: expected 1 or more, with fsdp; got 2, zero"):
        EngineConfig(name="zero", shard_ranks=2)
    with pytest.raises(ValueError, match=r"shard_ranks: 1 ranks make no groups of 2"):
        toy_engine(EngineConfig(name="fsdp", shard_ranks=2), ONE_PROCESS)
    with pytest.raises(ValueError, match="expected parameters"):
        ParamGroup(name="none", params={}, lr=1.0)
    with pytest.raises(ValueError, match="single is for one process"):
        toy_engine(config_of("single"), World(rank=1, world_size=2), toy=make_toy())
    with pytest.raises(ValueError, match="decay"):
        Ema(toy_engine(config_of("single"), ONE_PROCESS), decay=1.0)


def test_step_needs_the_last_backward() -> None:
    engine = toy_engine(config_of("single"), ONE_PROCESS)
    engine.backward(engine.module(PROBE).prediction.mean(), last=False)
    with pytest.raises(AssertionError, match="last=True"):
        engine.step(1.0)


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = init_world(device="cpu")
    assert world == World(0, 1, 0, torch.device("cpu")) and world.is_main
    close(world)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK, LOCAL_RANK, MASTER_ADDR"):
        init_world(device="cpu")


def test_compiled_units_compute_the_same() -> None:
    reference = losses_of(toy_engine(config_of("single"), ONE_PROCESS), range(2))
    toy = make_toy()
    for unit in toy.blocks:
        unit.compile = lambda unit=unit: torch.nn.Module.compile(unit, backend="eager")  # type: ignore[method-assign]
    engine = make_engine(
        EngineConfig(compile=True, clip_norm=CLIP), toy, groups_of(toy), ONE_PROCESS, shard_units=list(toy.blocks)
    )
    assert all(unit._compiled_call_impl is not None for unit in toy.blocks)
    assert losses_of(engine, range(2)) == pytest.approx(reference, rel=1e-5)
