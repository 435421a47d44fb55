"""Quality against time: the static and the dynamic models, with fewer steps and with a cache of blocks."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig

from benchmarks.evidence.distance import distance
from benchmarks.evidence.units import Place, Unit
from dydit_scale.evaluation.judges import judge_for
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import generate, sampler_timesteps
from dydit_scale.workflows.runs import load_run, sample_config

STEPS = (4, 6, 10, 16)
CACHED_STEPS = (10, 16)
CACHE_THRESHOLDS = (0.1, 0.3)
"""Of FirstBlockCache; diffusers' default is 0.05."""
MODELS = ("static", "dynamic-0.7", "dynamic-0.5", "dynamic-0.3")
BATCH = 24


class Sampler(NamedTuple):
    """A way to draw."""

    variant: str
    steps: int
    cache: float | None


def samplers() -> list[Sampler]:
    """Everything that is timed."""
    plain = [Sampler(variant, steps, None) for variant in MODELS for steps in STEPS]
    cached = [
        Sampler(variant, steps, threshold)
        for variant in ("static", "dynamic-0.5")
        for steps in CACHED_STEPS
        for threshold in CACHE_THRESHOLDS
    ]
    return plain + cached


@torch.no_grad()
def measure(place: Place, trial_name: str, seed: int) -> list[dict[str, Any]]:
    """A row for each sampler: seconds a picture, least of the rounds, and the quality of what it drew. All samplers
    take turns, so that a slow moment of the machine strikes none alone."""
    trial = place.size.trials[trial_name]
    runs = {variant: load_run(place.run(Unit(trial_name, variant, seed))) for variant in MODELS}
    any_run = runs["static"]
    judge = judge_for(reads_text=family_of(any_run.pipeline).reads_text, video=False)
    prompts = judge.prompts(trial.pictures)
    seconds: dict[Sampler, list[float]] = {}
    quality: dict[Sampler, dict[str, float]] = {}
    for _ in range(place.size.timed):
        for sampler in samplers():
            run = runs[sampler.variant]
            config = sample_config(run, steps=sampler.steps, cfg=trial.cfg, batch=BATCH, seed=seed)
            if run.recipe.dynamic is not None:
                run.network.pack(sampler_timesteps(run.pipeline, config))
            if sampler.cache is not None:
                run.network.enable_cache(FirstBlockCacheConfig(threshold=sampler.cache))
            generate(run.pipeline, prompts[:BATCH], config)  # warm
            began = time.perf_counter()
            pictures = generate(run.pipeline, prompts, config)
            seconds.setdefault(sampler, []).append((time.perf_counter() - began) / len(prompts))
            if sampler.cache is not None:
                run.network.disable_cache()
            quality[sampler] = {
                "score": judge.score(pictures, prompts)["overall"],
                "frechet": distance(place, trial_name, pictures),
            }
    return [
        {**sampler._asdict(), "seconds": min(seconds[sampler]), "spread": float(np.ptp(seconds[sampler])),
         "median": statistics.median(seconds[sampler]), **quality[sampler]}
        for sampler in seconds
    ]  # fmt: skip
