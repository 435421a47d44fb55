"""SiT as it was published: twice the channels out, of which the second half is not used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_scale.data.loader import make_loader
from dydit_scale.data.shards import load_index
from dydit_scale.diffusion.process import FlowProcess
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import World
from dydit_scale.planning.bases import find_base
from dydit_scale.planning.plan import Planner
from dydit_scale.planning.speed import Cluster
from dydit_scale.train.build import build_parts
from dydit_scale.train.loop import train
from dydit_scale.train.objective import Objective, Terms
from tests.families.journey import FAMILIES, family_recipe, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unused")
    write_world(folder, "sit")
    pipeline = FAMILIES["sit"]()
    config = dict(pipeline.transformer.config)
    torch.manual_seed(0)
    wide = DyDiTTransformer2DModel.from_config(config | {"out_channels": 2 * config["in_channels"]})
    torch.nn.init.normal_(wide.proj_out_2.weight, std=0.1)
    wide.save_pretrained(folder / "base" / "transformer")
    return folder


@pytest.mark.parametrize(("adapter", "kind"), [("none", "distill"), ("td_lora", "distill"), ("none", "complete")])
def test_it_trains_is_evaluated_and_draws(world: Path, tmp_path: Path, adapter: str, kind: str) -> None:
    recipe = family_recipe(world, "sit", adapter, run=str(tmp_path / "run"), supervision={"kind": kind})
    train(recipe, World())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [math.isfinite(r["loss"]) for r in records if "loss" in r] == [True, True]
    assert any(math.isfinite(r["mse_eval"]) for r in records if "mse_eval" in r)
    assert list((tmp_path / "run").rglob("*.png"))


def test_it_is_planned(world: Path) -> None:
    cluster = Cluster(gpus=1, memory=2**30, tflops=1, watts=1, link=1)
    recipe = family_recipe(world, "sit", "none")
    assert Planner(find_base(recipe.model.base)).plan(recipe, cluster).fits


@pytest.mark.parametrize("kind", ["distill", "complete"])
def test_the_second_half_counts_nowhere(world: Path, kind: str) -> None:
    recipe = family_recipe(world, "sit", "none", supervision={"kind": kind})
    parts = build_parts(recipe)
    objective = Objective(recipe, parts.network, parts.pipeline, parts.teacher, torch.device("cpu"))
    before = _terms(objective)
    (before.flow.mean() + before.supervision.mean()).backward()
    last = parts.network.proj_out_2
    assert before.flow.min() > 0 and last.weight.grad[_velocity(parts.network)].abs().sum() > 0
    assert not last.weight.grad[~_velocity(parts.network)].any()
    with torch.no_grad():
        last.weight[~_velocity(parts.network)] += 1.0
    after = _terms(objective)
    assert torch.equal(after.flow, before.flow) and torch.equal(after.supervision, before.supervision)


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an output of 4 channels .* or 8 .* got 12"):
        FlowProcess().answer(torch.zeros(1, 12, 2, 2), torch.zeros(1, 4, 2, 2))


def _velocity(network: Any) -> torch.Tensor:
    """Rows of the last layer that make the first half of the channels."""
    channels = 2 * network.config["in_channels"]
    return torch.arange(network.proj_out_2.out_features) % channels < channels // 2


def _terms(objective: Objective) -> Terms:
    data = objective.recipe.data
    loader = make_loader(
        data, load_index(Path(data.path)), seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4, consumed=0
    )
    batch = next(iter(loader))
    objective.network.train()
    inputs = objective.prepare(batch, objective.training_levels(0, batch.positions), seed=0)
    return objective.terms(objective.network, inputs, batch.positions, 0)
