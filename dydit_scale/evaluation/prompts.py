"""The captions of an evaluation on the built-in data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle, islice

import numpy as np

from dydit_scale.data.shapes.language import CATEGORIES, COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES
from dydit_scale.data.shapes.scene import random_prompt
from dydit_scale.diffusion.randomness import keyed_seed

_S, _C = len(SHAPES), len(COLOURS)
_PAIRS = _S * (_S - 1) * _C * (_C - 1)
CAPTIONS = {
    "single_object": _S,
    "two_object": _S * (_S - 1),
    "counting": _S * len(NUMBERS),
    "colors": _S * _C * (1 + len(SIZES)),
    "position": _PAIRS * len(RELATIONS),
    "attribute_binding": _PAIRS * (1 + (_S - 2) * (_C - 2)),
}
"""How many different captions ``random_prompt`` can draw in each category."""


def evaluation_prompts(n: int, seed: int) -> list[str]:
    """``n`` captions, the same for the same (n, seed); those of a smaller ``n`` are its beginning.

    The six categories take turns, so they are equally large. Some have few captions (single_object 6, counting 12,
    two_object 30): theirs come again, to be drawn from other noise, as GenEval draws several pictures for a prompt.
    Raises ValueError if ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"evaluation_prompts: n must be 1 or more, got {n}")
    captions = zip(*(cycle(_distinct_captions(category, seed)) for category in CATEGORIES), strict=True)
    return list(islice(chain.from_iterable(captions), n))


def _distinct_captions(category: str, seed: int) -> Iterator[str]:
    """All captions of a category, each once, in the order in which random draws meet them first."""
    rng = np.random.RandomState(keyed_seed(seed, "evaluation prompts", category) % 2**32)
    seen: set[str] = set()
    while len(seen) < CAPTIONS[category]:
        caption = random_prompt(rng, category).caption
        if caption not in seen:
            seen.add(caption)
            yield caption
