"""The captions of an evaluation on the built-in data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, zip_longest

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
    """``n`` captions, no two alike, the same for the same (n, seed); those of a smaller ``n`` are its beginning.

    The six categories take turns. Some have few captions (single_object 6, counting 12, two_object 30); when one has
    given all, the others go on without it, so the categories are equally large up to n = 36. Every category weighs the
    same in the judge's overall score all the same.
    Raises ValueError if ``n`` is below 1 or above the number of captions there are.
    """
    most = sum(CAPTIONS.values())
    if not 1 <= n <= most:
        raise ValueError(f"evaluation_prompts: n must be from 1 to {most}, the number of captions there are, got {n}")
    rounds = zip_longest(*(_distinct_captions(category, seed) for category in CATEGORIES))
    return list(islice((caption for caption in chain.from_iterable(rounds) if caption is not None), n))


def _distinct_captions(category: str, seed: int) -> Iterator[str]:
    """All captions of a category, each once, in the order in which random draws meet them first."""
    rng = np.random.RandomState(keyed_seed(seed, "evaluation prompts", category) % 2**32)
    seen: set[str] = set()
    while len(seen) < CAPTIONS[category]:
        caption = random_prompt(rng, category).caption
        if caption not in seen:
            seen.add(caption)
            yield caption
