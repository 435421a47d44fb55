"""Ratio in training against ratio at sampling, and tokens by threshold against a fixed number of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.distance import distance
from benchmarks.evidence.units import Place, Unit
from dydit_scale.data.loader import make_loader, open_data
from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.evaluation.judges import judge_for
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import forwards, generate, recorded, sampler_timesteps
from dydit_scale.train.objective import Objective
from dydit_scale.workflows.runs import LoadedRun, load_run, sample_config
from dydit_scale.workflows.sample import macs_of

RULES = {
    "threshold": "tokens by threshold",
    "mean": "top k, k the mean number above the threshold",
    "expected": "top k, k the mean number drawn as in training",
}
"""How tokens are chosen at sampling; width always goes by threshold."""
COUNTED = 48
"""Pictures that the numbers of tokens above the threshold are counted on as they are drawn, and held-out ones, with
noise, for the numbers drawn as in training."""


@torch.no_grad()
def calibrate(place: Place, unit: Unit) -> list[dict[str, Any]]:
    """A row for each rule: the ratio that sampling really had, and how good the pictures are."""
    trial = place.size.trials[unit.trial]
    run = load_run(place.run(unit))
    config = sample_config(run, steps=trial.sampler_steps, cfg=trial.cfg, batch=48, seed=unit.seed)
    judge = judge_for(reads_text=family_of(run.pipeline).reads_text, video=config.frames > 1)
    prompts = judge.prompts(trial.pictures)
    timesteps, network = sampler_timesteps(run.pipeline, config), run.network
    with recorded(network) as counted:
        generate(run.pipeline, prompts[:COUNTED], config)
    capacities = {
        "threshold": None,
        "mean": TokenCapacity.from_masks(counted.timesteps, counted.masks, multiple=1),
        "expected": _expected(run, place, unit, timesteps.tolist()),
    }
    cost = family_of(run.pipeline).cost(network, run.pipeline, config.size, config.text_tokens)
    static = cost.static * forwards(run.pipeline, config)
    rows = []
    for rule, capacity in capacities.items():
        network.pack(timesteps, capacity=capacity)
        with recorded(network) as recording:
            pictures = generate(run.pipeline, prompts, config)
        network.unpack()
        rows.append({
            "variant": unit.variant, "seed": unit.seed, "rule": rule,
            "ratio": macs_of(run, recording, config) / static,
            "tokens": float(np.mean([m.tokens.mean() for m in recording.masks])),
            "score": judge.score(pictures, prompts)["overall"],
            "frechet": distance(place, unit.trial, pictures),
        })  # fmt: skip
    return rows


def _expected(run: LoadedRun, place: Place, unit: Unit, timesteps: list[float]) -> TokenCapacity:
    """Numbers of tokens that the gates keep when they are drawn as in training, at each step of the sampler."""
    shards = str(place.trial(unit.trial) / "held-out")
    data = replace(run.recipe.data, path=shards)
    count = min(COUNTED, place.size.held_out)
    loader = make_loader(
        data, open_data(data), seed=unit.seed, rank=0, world_size=1, global_batch=count, micro_batch=count, consumed=0
    )
    batch = next(iter(loader))
    device = next(run.network.parameters()).device
    objective = Objective(run.recipe, run.network, run.pipeline, None, device)
    masks = []
    for timestep in timesteps:
        level = torch.full((count,), round(timestep), dtype=torch.long)  # DDPM's levels are its timesteps
        inputs = objective.prepare(batch, level, unit.seed)
        _, drawn = objective.forward_dynamic(run.network, inputs, objective.gate_noise(batch.positions, inputs.size))
        masks.append(drawn)
    return TokenCapacity.from_masks(timesteps, masks, multiple=1)
