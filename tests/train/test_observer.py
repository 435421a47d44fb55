"""What is measured in a run, and that nobody who listens can stop it."""

from __future__ import annotations

import json
import socket
import sys
import threading
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.checkpoint.writer import Commit
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.monitoring import sinks
from dydit_scale.monitoring.records import RUN_FILE, rank_file, read_about, read_metrics
from dydit_scale.monitoring.registry import BY_KEY, CLOCK_KEYS
from dydit_scale.parallel.world import World
from dydit_scale.train.loop import train
from dydit_scale.train.metrics import RankLog
from dydit_scale.train.objective import Inputs, Terms
from dydit_scale.train.observer import Observer, bucket_of, measured_peak
from dydit_scale.train.recipe import Recipe, load_recipe
from tests.train.small_run import small_world

KNOWN_ELSEWHERE = {"data_seconds"}


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_world(folder)
    return folder


def recipe_of(folder: Path, run: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", [f"run={run}", "monitor.routers_every=2", *overrides])


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def plain(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe_of(world_folder, tmp_path_factory.mktemp("plain") / "run"), World())


def test_all_that_a_run_records_is_in_the_table(plain: Path) -> None:
    keys = {key for record in read_metrics(plain / "metrics.jsonl") for key in record}
    assert keys - set(BY_KEY) == KNOWN_ELSEWHERE
    found = keys | set(read_about(plain)) | set(read_metrics(rank_file(plain, 0))[0])
    # only where there is a cache, a GPU; what an endpoint is told besides
    assert set(BY_KEY) - found == {"cache_hits", "cache_misses", "gpu_memory", "dropped", "sink_failures"}


def test_a_step_says_how_it_went(plain: Path) -> None:
    steps, about = steps_of(plain), read_about(plain)
    assert about["peak"] == "measured" and about["peak_tflops"] > 0 and about["ranks"] == 1
    assert [record["consumed"] for record in steps] == [8, 16, 24, 32]
    for record in steps:
        assert 0 <= record["data_wait"] <= 1 and 0 < record["goodput"] <= 1
        assert record["rank_seconds"]["min"] == record["rank_seconds"]["max"] < record["seconds"]
        mfu, tflops = record["mfu"], record["tflops"]
        assert mfu["activated"] == pytest.approx(record["ratio"] * mfu["dense"])
        assert tflops["dense"] == pytest.approx(mfu["dense"] * about["peak_tflops"])
        assert len(record["loss_timestep"]) == 8
    assert ["routers" in record for record in steps] == [False, True, False, True]
    routers = steps[1]["routers"]
    assert list(routers) == ["heads", "groups", "tokens"]
    assert [len(layer) for layer in routers["heads"]] == [8, 8]
    assert len(read_metrics(rank_file(plain, 0))) == 4


def test_an_evaluation_of_the_cost_agrees_with_the_operations(plain: Path, world_folder: Path) -> None:
    """dense = 2 passes x 2 x MACs x samples / seconds; MACs of one forward from the cost model."""
    from dydit_scale.models.registry import family_of
    from dydit_scale.train.build import build_parts
    from dydit_scale.train.objective import sample_size

    recipe = recipe_of(world_folder, plain)
    parts = build_parts(recipe)
    cost = family_of(parts.pipeline).cost(parts.network, parts.pipeline, sample_size(recipe), recipe.model.text_tokens)
    record = steps_of(plain)[0]
    operations = record["tflops"]["dense"] * 1e12 * record["seconds"]
    assert operations == pytest.approx(2 * 2 * cost.static * recipe.train.batch_size, rel=1e-6)


def test_a_restart_is_counted_and_its_steps_are_not_lost(world_folder: Path, tmp_path: Path) -> None:
    run = train(recipe_of(world_folder, tmp_path / "run", "train.steps=2"), World())
    first = read_about(run)
    holder = json.loads((run / "attempt.json").read_text())
    (run / "attempt.json").write_text(json.dumps({**holder, "ended": None, "pid_started": "0"}))  # as if killed
    train(recipe_of(world_folder, tmp_path / "run"), World(), resume=True)
    second = read_about(run)
    assert (first["restarts"], second["restarts"]) == ({}, {"killed": 1})
    assert second["began"] == first["began"] and second["checkpoint_step"] == second["first_step"] == 2
    steps = steps_of(run)
    spent = sum(record["seconds"] for record in steps)
    assert steps[-1]["goodput"] == pytest.approx(spent / (steps[-1]["time"] - first["began"]), rel=1e-3)


class _Hanging:
    """A wandb that never answers."""

    over = threading.Event()

    @classmethod
    def init(cls, **_: Any) -> None:
        cls.over.wait(100)


@pytest.fixture
def adverse(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """W&B hangs, MLflow is not installed, TensorBoard fails, and a port is taken."""
    monkeypatch.setattr(sinks, "OPENING", 0.1)
    monkeypatch.setattr(sinks, "CLOSING", 0.1)
    module = types.ModuleType("wandb")
    module.init = _Hanging.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(sinks.TensorBoard, "write", lambda *_: 1 / 0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield taken.getsockname()[1]
    _Hanging.over.set()


def test_training_is_the_same_when_everyone_who_listens_fails(
    world_folder: Path, plain: Path, tmp_path: Path, adverse: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / RUN_FILE).mkdir(parents=True)  # cannot be replaced
    (run / "ranks").write_text("a file, where a folder should be")
    listening = ["monitor.sinks=[tensorboard,wandb,mlflow]", f"monitor.prometheus_port={adverse}"]
    train(recipe_of(world_folder, run, *listening), World())
    said = "".join(capsys.readouterr())
    for told in (
        f"port {adverse} (monitor.prometheus_port) cannot be had",
        "wandb has not opened after", "mlflow cannot be used",
        "tensorboard failed: ZeroDivisionError", f"{RUN_FILE} was not written", "records cannot be written",
    ):  # fmt: skip
        assert said.count(told) == 1, (told, said)
    ours, theirs = (
        [{k: v for k, v in record.items() if k not in CLOCK_KEYS} for record in steps_of(folder)]
        for folder in (run, plain)
    )
    assert len(ours) == 4 and ours == theirs
    a, b = (load_checkpoint(folder / "checkpoints") for folder in (run, plain))
    assert a is not None and b is not None and all(torch.equal(a.tensors[k], b.tensors[k]) for k in b.tensors)


def test_the_endpoint_tells_of_the_run(world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    read: list[str] = []
    finish = Observer.finish

    def scrape(self: Observer, record: dict[str, Any], **options: Any) -> None:
        finish(self, record, **options)
        if record["step"] == 3:  # which rank 0 has not told yet, but its process has
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                read.append(answer.read().decode())

    monkeypatch.setattr(Observer, "finish", scrape)
    train(recipe_of(world_folder, tmp_path / "run", f"monitor.prometheus_port={port}"), World())
    (text,) = read
    for line in (
        'dydit_cost_ratio_target{run="small"} 0.5', 'dydit_train_steps{run="small"} 4.0',
        'dydit_train_step{run="small"} 3.0',
        'dydit_sink_dropped_total{run="small",sink="tensorboard"} 0.0', 'dydit_step_seconds_count{run="small"} 3.0',
    ):  # fmt: skip
        assert line in text, line
    assert 'dydit_heartbeat_timestamp_seconds{rank="0",run="small"}' in text
    with pytest.raises(OSError):  # the port is given back
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


class _Objective:
    """Of a network that costs 1,000 MACs a sample."""

    network = types.SimpleNamespace(cost=None)

    @staticmethod
    def cost(*_: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(static=1000)


def observers(recipe: Recipe, folder: Path, ranks: int) -> list[Observer]:
    return [
        Observer(recipe, World(r, ranks), _Objective(), RankLog(folder, r), 1.0)  # type: ignore[arg-type]
        for r in range(ranks)
    ]


def seen(levels: list[float], losses: list[float], heads: torch.Tensor) -> tuple[Inputs, Terms]:
    level, zeros = torch.tensor(levels), torch.zeros(len(levels))
    inputs = Inputs(zeros, zeros, zeros, level, {}, None, 0)  # type: ignore[arg-type]
    masks = DynamicMasks(heads, torch.ones(2, len(levels), 3), torch.zeros(2, len(levels), 5))
    return inputs, Terms(torch.tensor(losses), zeros, zeros, masks)


def test_two_ranks_measure_as_one_would(world_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world_folder, tmp_path / "run", "monitor.timestep_buckets=4", "monitor.routers_every=1")
    both = observers(recipe, tmp_path, 2)
    heads = torch.zeros(2, 2, 4)  # layers batch heads
    heads[0, 0, :2] = 1
    heads[1, :, 3] = 1
    for rank, observer in enumerate(both):
        observer.begin()
        observer.has_data()
        observer.saw(*seen([0.1, 0.9], [1.0 + rank, 5.0 + rank], heads if rank == 0 else torch.zeros_like(heads)))
        observer._data = 1.0 + rank
    values = [observer.values(0) for observer in both]
    means = {"loss": 3.0} | {key: (values[0][key] + values[1][key]) / 2 for key in values[0]}
    record = both[0].reduced(means)
    assert means == {"loss": 3.0}, "what is not the observer's stays"
    assert record["loss_timestep"] == [1.5, None, None, 5.5]
    assert record["routers"]["heads"] == [[0.25, None, None, 0.0], [0.125, None, None, 0.125]]
    assert record["routers"]["groups"][0] == [1.0, None, None, 1.0] and record["routers"]["tokens"][1][0] == 0
    assert record["dead_heads"] == 5 / 8
    assert record["slowest_rank"] == 1 and record["rank_seconds"]["max"] >= 2 > record["rank_seconds"]["min"] >= 1
    step: dict[str, Any] = {"step": 0, "ratio": 0.5}
    both[0]._began -= 4.0  # a step of four seconds
    both[0].finish(step, consumed=8, counts=True, commit=Commit(5, 7.0))
    assert (step["checkpoint_step"], step["checkpoint_time"]) == (5, 7.0)
    assert step["data_wait"] == pytest.approx(0.5, rel=0.2), "of the slowest reader"
    assert step["tflops"]["dense"] == pytest.approx(2 * 2 * 2000 / step["seconds"] / 1e12)


def test_steps_that_were_undone_or_left_out_are_no_goodput(world_folder: Path, tmp_path: Path) -> None:
    (observer,) = observers(recipe_of(world_folder, tmp_path / "run"), tmp_path, 1)
    observer.went_before(observer.began - 100, [{"step": s, "seconds": 10.0, "grad_norm": 1.0} for s in range(3)])
    observer.went_before(observer.began, [{"step": 2, "seconds": 10.0, "grad_norm": float("nan")}])
    now = observer.began + 100
    assert observer._goodput(now) == pytest.approx(0.3)
    observer.back_to(1)
    assert observer._goodput(now) == pytest.approx(0.1)


def test_noise_levels_fall_into_equal_parts() -> None:
    assert bucket_of(torch.tensor([0.0, 0.24, 0.26, 0.999, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]
    assert bucket_of(torch.tensor([0, 249, 250, 999]), 4).tolist() == [0, 0, 1, 3]


def test_a_peak_is_measured_without_touching_the_runs_randomness() -> None:
    state = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), "fp32") > 1e-4
    assert torch.equal(state, torch.get_rng_state())
