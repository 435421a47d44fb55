"""Every family: a static base becomes dynamic in training, is saved, loaded, packed and sampled, and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_scale.data.loader import make_loader
from dydit_scale.data.shards import load_index
from dydit_scale.models.registry import family_of
from dydit_scale.parallel.world import World
from dydit_scale.sampling.generate import generate, recorded, sampler_timesteps
from dydit_scale.train.build import build_parts
from dydit_scale.train.loop import train
from dydit_scale.train.objective import Objective, sample_size
from dydit_scale.workflows.export import export_run
from dydit_scale.workflows.runs import load_run, sample_config, static_pipeline
from tests.families.journey import FAMILIES, FRAMES, VIDEOS, family_recipe, prompt, write_world


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    write_world(folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("adapter", ["none", "td_lora"])
def test_it_is_adapted_saved_loaded_packed_and_sampled(family: tuple[str, Path], adapter: str) -> None:
    name, folder = family
    if name in VIDEOS:
        pytest.importorskip("av")
    recipe = family_recipe(folder, name, adapter)
    train(recipe, World())
    records = [json.loads(line) for line in (folder / f"run-{adapter}" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    run = load_run(folder / f"run-{adapter}", device="cpu")
    config = sample_config(run, steps=3, cfg=2.0, batch=2)
    prompts = [prompt(name), "", prompt(name)]
    with recorded(run.network) as seen:
        masked = generate(run.pipeline, prompts, config)
    timesteps = sampler_timesteps(run.pipeline, config)
    assert sorted(set(seen.timesteps)) == pytest.approx(sorted(set(timesteps.tolist())))
    run.network.pack(timesteps)
    packed = generate(run.pipeline, prompts, config)
    shape = (3, FRAMES, 16, 16, 3) if name in VIDEOS else (3, 16, 16, 3)
    assert masked.shape == shape and masked.dtype == np.uint8
    assert np.abs(packed.astype(int) - masked.astype(int)).max() <= 1  # rounding to bytes
    alone = generate(run.pipeline, prompts[2:], config, first=2)
    assert np.abs(alone[0].astype(int) - packed[2].astype(int)).max() <= 1  # noise belongs to the picture's number
    static = generate(static_pipeline(run), prompts[:1], config)
    assert static.shape[1:] == shape[1:]


def test_its_objective_trains_every_router_and_weight(family: tuple[str, Path]) -> None:
    name, folder = family
    if name in VIDEOS:
        pytest.importorskip("av")
    recipe = family_recipe(folder, name, "none")
    parts = build_parts(recipe)
    objective = Objective(recipe, parts.network, parts.pipeline, parts.teacher, torch.device("cpu"))
    loader = make_loader(
        recipe.data, load_index(folder / "shards"), seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4,
        consumed=0,
    )  # fmt: skip
    batch = next(iter(loader))
    parts.network.train()
    for step in range(3):
        inputs = objective.prepare(batch, objective.training_levels(step, batch.positions), seed=step)
        terms = objective.terms(parts.network, inputs, batch.positions + 4 * step, step)
        (terms.flow.mean() + terms.supervision.mean() + (terms.ratio.mean() - 0.5) ** 2).backward()
    without = {n for n, p in parts.network.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    size = sample_size(recipe)
    cost = family_of(parts.pipeline).cost(parts.network, parts.pipeline, size, recipe.model.text_tokens)
    assert 0 < terms.ratio.min() <= terms.ratio.max() <= 1.1 and cost.static > 0


def test_its_exports_are_loaded_back(family: tuple[str, Path]) -> None:
    name, folder = family
    if not (folder / "run-td_lora").is_dir():
        pytest.skip("needs the runs of the first test")
    (row,) = export_run(folder / "run-td_lora", ["td-lora"])
    assert row["verified"]
    (row,) = export_run(folder / "run-none", ["pipeline"])
    assert row["verified"]
    if name != "flux":
        with pytest.raises(ValueError, match="diffusers loads no LoRA into a"):
            export_run(folder / "run-td_lora", ["diffusers"])
