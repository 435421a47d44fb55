"""The judge of the built-in data: does a picture of shapes show what its caption says?

Six categories and the overall score are GenEval's (Ghosh et al., 2023, arXiv:2310.11513), which asks a detector about
photographs; here the detector is exact. In one point the judge is stricter: any object that the caption does not name
makes the picture wrong in every category, not in counting alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypedDict

import numpy as np

from dydit_scale.data.shapes.language import CATEGORIES, RELATIONS, SIZES, Prompt, Subject, parse_caption
from dydit_scale.evaluation.shapes_reader import Found, read_scene

__all__ = ["Found", "Scores", "Verdict", "judge", "read_scene", "score"]

SIZE_TOLERANCE = 0.04
"""Share of the side by which a named size may be missed; with it small and large meet halfway."""
MIN_OFFSET = 0.1
"""Share of the side by which two objects must lie apart in the stated direction (the data keeps 0.2)."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one picture."""

    correct: bool
    category: str
    reason: str
    """Why it is wrong, in words for a report; "as described" when it is right."""
    found: tuple[Found, ...]


class Scores(TypedDict):
    """Shares from 0 to 1, plain values for JSON."""

    overall: float
    categories: dict[str, float]
    counts: dict[str, int]


def judge(picture: np.ndarray, caption: str) -> Verdict:
    """Whether ``picture`` (uint8 [side, side, 3]) shows exactly what ``caption`` says, and nothing else.

    Every object must have the named shape and, where they are named, the colour and the size; a stated relation holds
    when the offset in its direction is above 0.1 of the side and larger than the offset across.
    Raises ValueError for a caption that is not of the language.
    """
    prompt = parse_caption(caption)
    found = tuple(read_scene(picture))
    reason = _fault(prompt, found)
    return Verdict(reason is None, prompt.category, reason or "as described", found)


def score(pictures: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> Scores:
    """Judges ``pictures`` ([n, side, side, 3] uint8, or n of them) against their captions.

    "categories" holds the share of right pictures for each category that has captions, "counts" the number of captions
    for all six, and "overall" the mean over the categories, each with the same weight however many captions it has:
    GenEval's way. A category without captions counts in neither. Raises ValueError if there is nothing to judge or the
    numbers differ.
    """
    if len(pictures) != len(captions) or not captions:
        raise ValueError(
            f"score: expected as many pictures as captions, at least one; got {len(pictures)} and {len(captions)}"
        )
    verdicts = [judge(p, c) for p, c in zip(pictures, captions, strict=True)]
    correct = {name: [v.correct for v in verdicts if v.category == name] for name in CATEGORIES}
    shares = {name: sum(right) / len(right) for name, right in correct.items() if right}
    return Scores(
        overall=sum(shares.values()) / len(shares),
        categories=shares,
        counts={name: len(right) for name, right in correct.items()},
    )


def _fault(prompt: Prompt, found: tuple[Found, ...]) -> str | None:
    """What is wrong, or None."""
    wanted = [s for s in prompt.subjects for _ in range(s.count)]
    if not found:
        return f"nothing to be seen, expected {_listed(_plain(s) for s in wanted)}"
    if blobs := [f for f in found if f.shape is None or f.colour is None]:
        return f"cannot read {_listed(str(f) for f in blobs)}"
    if len(found) != len(wanted):
        expected = f"expected {len(wanted)} ({_listed(_plain(s) for s in wanted)})"
        return f"{expected}, found {len(found)} ({_listed(map(str, found))})"
    fits = [order for order in permutations(found) if all(map(_matches, wanted, order))]
    if not fits:
        return _mismatch(wanted, found)
    if prompt.relation and not any(_related(order, prompt.relation) for order in fits):
        first, second = fits[0]
        offset = f"({first.x - second.x:+.2f}, {first.y - second.y:+.2f})"
        return f"{first} is not {prompt.relation} {second}: it lies at {offset} from it, y down"
    return None


def _matches(subject: Subject, found: Found) -> bool:
    return (
        found.shape == subject.shape
        and subject.colour in (None, found.colour)
        and (subject.size is None or _has_size(found.diameter, subject.size))
    )


def _has_size(diameter: float, size: str) -> bool:
    low, high = SIZES[size]
    return low - SIZE_TOLERANCE <= diameter <= high + SIZE_TOLERANCE


def _related(order: tuple[Found, ...], relation: str) -> bool:
    right, down = RELATIONS[relation]
    dx, dy = order[0].x - order[1].x, order[0].y - order[1].y
    along, across = dx * right + dy * down, abs(dx * down + dy * right)
    return along > MIN_OFFSET and along > across


def _mismatch(wanted: list[Subject], found: tuple[Found, ...]) -> str:
    """The pairing with most matches, as "expected a, found b" for what is left."""
    best = max(permutations(found), key=lambda order: sum(map(_matches, wanted, order)))
    wrong = [(s, f) for s, f in zip(wanted, best, strict=True) if not _matches(s, f)]
    sized = any(s.size for s, _ in wrong)
    seen = _listed(f"{f} of diameter {f.diameter:.2f}" if sized else str(f) for _, f in wrong)
    return f"expected {_listed(_plain(s) for s, _ in wrong)}, found {seen}"


def _plain(subject: Subject) -> str:
    return " ".join(word for word in (subject.size, subject.colour, subject.shape) if word)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)
