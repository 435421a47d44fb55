"""How far drawn pictures are from real ones: the Fréchet distance on the features of the built-in data's classifier."""

from __future__ import annotations

from functools import cache

import numpy as np

from benchmarks.evidence.emoji import real_emoji
from benchmarks.evidence.units import Place
from dydit_scale.evaluation.classifier import features
from dydit_scale.evaluation.frechet import frechet_distance
from dydit_scale.evaluation.judges import judge_for, real_scenes

REFERENCE = 2048
"""Real scenes, or clips, that drawn ones are compared with."""
REFERENCE_SEED, OTHER_SEED = 1, 2


def distance(place: Place, trial: str, pictures: np.ndarray) -> float:
    """Of drawn pictures or clips from real ones of the same prompts (emoji: from all that were kept from training). It
    is the larger the fewer they are: compare equal numbers."""
    return frechet_distance(features(pictures), _reference(place, trial))


@cache
def real_distance(place: Place, trial: str, count: int) -> float:
    """Of so many other real pictures: what no model can be expected to beat."""
    if place.size.trials[trial].emoji:
        return distance(place, trial, real_emoji(place.trial(trial), 32, held_out=False)[:count])
    return distance(place, trial, _scenes(place, trial, count, OTHER_SEED))


@cache
def _reference(place: Place, trial: str) -> np.ndarray:
    if place.size.trials[trial].emoji:
        return features(real_emoji(place.trial(trial), 32))
    return features(_scenes(place, trial, REFERENCE, REFERENCE_SEED))


def _scenes(place: Place, name: str, count: int, seed: int) -> np.ndarray:
    trial = place.size.trials[name]
    video = "--video" in trial.data
    judge = judge_for(reads_text=trial.family == "flux", video=video)
    prompts = judge.prompts(trial.pictures)
    in_turn = [prompts[i % len(prompts)] for i in range(count)]
    return real_scenes(judge, in_turn, side=16 if video else 32, frames=8 if video else 1, seed=seed)
