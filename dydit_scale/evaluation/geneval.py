"""GenEval's rules (Ghosh et al., 2023, arXiv:2310.11513): does a picture show the objects that a prompt names, as many,
in the colours and the positions that it says?

What is wanted comes as a line of its evaluation_metadata.jsonl:

    {"tag": "position", "prompt": "...", "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1,
     "position": ["right of", 0]}], "exclude": [{"class": "dog", "count": 3}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""Kinds of prompts."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Among which the colour of an object is chosen."""
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (x, y) and sign of the offset."""
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Least confidence of an object that counts, and the same for prompts of a number."""
MAX_OBJECTS = 16
"""Of a class."""
SLACK = 0.1
"""Share of both objects' extents that does not count as an offset."""


class Detected(NamedTuple):
    """One object in a picture."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: np.ndarray
    """bool [height, width]."""


class Judgement(NamedTuple):
    """Whether a picture is right, and what is wrong."""

    correct: bool
    reason: str


def wanted_names(line: Mapping[str, Any]) -> set[str]:
    """The classes that a line of metadata asks for or forbids."""
    return {want["class"] for key in ("include", "exclude") for want in line.get(key, ())}


def check_line(line: Any, where: str) -> None:
    """ValueError, beginning with ``where``, if ``line`` is no metadata of a GenEval prompt."""
    if not isinstance(line, dict) or not isinstance(line.get("tag"), str) or not line.get("include"):
        raise ValueError(f"{where}: expected GenEval metadata with tag, prompt and include, got {str(line)[:80]}")
    if line["tag"] not in TAGS:
        raise ValueError(f"{where}: unknown tag {line['tag']!r}; they are {', '.join(TAGS)}")
    for key in ("include", "exclude"):
        for place, want in enumerate(line.get(key, ())):
            at = f"{where}: {key} {place}"
            if not isinstance(want, dict) or not isinstance(want.get("class"), str):
                raise ValueError(f"{at}: expected a class, got {want}")
            if not isinstance(want.get("count"), int) or want["count"] < 1:
                raise ValueError(f"{at}: expected a count of 1 or more, got {want.get('count')}")
            if want.get("color", COLOURS[0]) not in COLOURS:
                raise ValueError(f"{at}: unknown color {want['color']!r}; they are {', '.join(COLOURS)}")
            match want.get("position"):
                case None:
                    pass
                case [relation, int(target)] if relation in RELATIONS and 0 <= target < place:
                    pass
                case other:
                    raise ValueError(f"{at}: expected position [relation, place of an earlier one], got {other}")


def judge(
    found: Sequence[Detected],
    line: Mapping[str, Any],
    colours_of: Callable[[Sequence[Detected], str], Sequence[str]],
) -> Judgement:
    """Whether the objects ``found`` fulfil ``line``.

    Those of a class count from the most certain on; as many as are asked for are looked at for colour and position.

    Args:
        colours_of: the colours, of ``COLOURS``, of objects of a class.
    """
    least = COUNTING_THRESHOLD if line["tag"] == "counting" else THRESHOLD
    certain = sorted((thing for thing in found if thing.score > least), key=lambda thing: -thing.score)
    by_name = {name: [t for t in certain if t.name == name][:MAX_OBJECTS] for name in wanted_names(line)}
    faults: list[str] = []
    groups: list[Sequence[Detected] | None] = []
    for want in line["include"]:
        things = by_name[want["class"]][: want["count"]]
        fault = _fault(want, things, groups, colours_of)
        faults += [fault] if fault else []
        groups.append(None if fault else things)
    for ban in line.get("exclude", ()):
        if (count := len(by_name[ban["class"]])) >= ban["count"]:
            faults.append(f"expected fewer than {ban['count']} of {ban['class']}, found {count}")
    return Judgement(not faults, "; ".join(faults) or "as described")


def summarise(tags: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Share of right pictures by tag, and "overall", the mean over the tags: GenEval's score."""
    shares = {
        tag: float(np.mean([c for t, c in zip(tags, correct, strict=True) if t == tag])) for tag in dict.fromkeys(tags)
    }
    return {"overall": float(np.mean(list(shares.values()))), **shares}


def relations(one: Detected, other: Detected) -> set[str]:
    """How ``one`` lies to ``other``: where the offset of their centres, less a tenth of their extents, is more than
    half of the distance."""
    a, b = (np.array(thing.box).reshape(2, 2) for thing in (one, other))
    offset = a.mean(0) - b.mean(0)
    slack = SLACK * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    share = beyond / np.linalg.norm(offset)
    return {name for name, (axis, sign) in RELATIONS.items() if share[axis] * sign > 0.5}


def _fault(
    want: Mapping[str, Any],
    things: Sequence[Detected],
    groups: Sequence[Sequence[Detected] | None],
    colours_of: Callable[[Sequence[Detected], str], Sequence[str]],
) -> str | None:
    name, count = want["class"], want["count"]
    if len(things) < count:
        return f"expected {count} of {name}, found {len(things)}"
    if "color" in want:
        colours = list(colours_of(things, name))
        if colours.count(want["color"]) < count:
            return f"expected {count} {want['color']} {name}, found {', '.join(colours)}"
    if "position" in want:
        relation, place = want["position"]
        targets = groups[place]
        if targets is None:
            return f"nothing that {name} could be {relation}"
        if not all(relation in relations(thing, target) for thing in things for target in targets):
            return f"{name} is not {relation} its target"
    return None
