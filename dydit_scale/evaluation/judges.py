"""Which prompts a model of the built-in data is tried with, who judges what it draws, and what it should look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np

from dydit_scale.data.shapes.language import CLASSES, parse_caption
from dydit_scale.data.shapes.motion import (
    MOTIONS,
    draw_motion,
    parse_motion_caption,
    place_class_motion,
    place_motion,
    random_motion_prompt,
)
from dydit_scale.data.shapes.scene import draw, place, place_class
from dydit_scale.diffusion.randomness import keyed_seed
from dydit_scale.evaluation.motion_judge import judge_motion, read_motion, score_motion
from dydit_scale.evaluation.prompts import evaluation_prompts
from dydit_scale.evaluation.shapes_judge import Scores, judge, score


class Judge(NamedTuple):
    """A trial on the built-in data."""

    prompts: Callable[[int], list[str]]
    """So many prompts, always the same."""
    score: Callable[[np.ndarray, Sequence[str]], Scores]
    """Of pictures uint8 [n, side, side, 3], or clips uint8 [n, frames, side, side, 3], and their prompts."""
    correct: Callable[[np.ndarray, str], bool]
    """Of one."""
    draw: Callable[[str, np.random.RandomState, int, int], np.ndarray]
    """What a prompt describes, uint8, of so many pixels a side and so many frames."""


def judge_for(*, reads_text: bool, video: bool) -> Judge:
    """The judge of a kind of model: pictures or clips, of captions or of classes."""
    return _JUDGES[reads_text, video]


def real_scenes(judge: Judge, prompts: Sequence[str], *, side: int, frames: int, seed: int) -> np.ndarray:
    """What ``prompts`` describe, drawn by the program that draws the training data.

    uint8 [n, side, side, 3], or [n, frames, side, side, 3] for clips.
    """
    rngs = (np.random.RandomState(keyed_seed(seed, "real scene", i) % 2**32) for i in range(len(prompts)))
    return np.stack([judge.draw(prompt, rng, side, frames) for prompt, rng in zip(prompts, rngs, strict=True)])


def _in_turn(names: Sequence[str], n: int) -> list[str]:
    return list(islice(cycle(names), n))


def _motion_prompts(n: int) -> list[str]:
    rngs = (np.random.RandomState(keyed_seed(0, "motion prompt", i) % 2**32) for i in range(n))
    return [random_motion_prompt(rng).caption for rng in rngs]


def _performs(clip: np.ndarray, motion: str) -> bool:
    """Whether the clip shows one object, which does that."""
    return [performed.motion for performed in read_motion(clip)] == [motion]


def _score_motions(clips: np.ndarray, motions: Sequence[str]) -> Scores:
    right = [_performs(clip, motion) for clip, motion in zip(clips, motions, strict=True)]
    counts = Counter(motions)
    shares = {m: sum(r for r, of in zip(right, motions, strict=True) if of == m) / counts[m] for m in counts}
    return Scores(overall=sum(shares.values()) / len(shares), categories=shares, counts=dict(counts))


_PHRASES = [subject.phrase() for subject in CLASSES]
_JUDGES = {
    (True, False): Judge(
        lambda n: evaluation_prompts(n, seed=0),
        score,
        lambda x, c: judge(x, c).correct,
        lambda c, rng, side, _: draw(place(parse_caption(c), rng), side),
    ),
    (False, False): Judge(
        lambda n: _in_turn(_PHRASES, n),
        score,
        lambda x, c: judge(x, c).correct,
        lambda c, rng, side, _: draw(place_class(_PHRASES.index(c), rng), side),
    ),
    (True, True): Judge(
        _motion_prompts,
        score_motion,
        lambda x, c: judge_motion(x, c).both,
        lambda c, rng, side, frames: draw_motion(place_motion(parse_motion_caption(c), rng), side, frames),
    ),
    (False, True): Judge(
        lambda n: _in_turn(MOTIONS, n),
        _score_motions,
        _performs,
        lambda c, rng, side, frames: draw_motion(place_class_motion(MOTIONS.index(c), rng), side, frames),
    ),
}
