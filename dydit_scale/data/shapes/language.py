"""The language of the scenes: what a caption can say, written out and read back.

The six categories are GenEval's (Ghosh et al., 2023): single object, two objects, counting, colours, position,
attribute binding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 52, 47),
    "orange": (245, 147, 30),
    "yellow": (250, 226, 60),
    "green": (48, 172, 82),
    "cyan": (82, 218, 232),
    "blue": (48, 92, 224),
    "purple": (168, 72, 206),
    "white": (244, 244, 240),
}
BACKGROUND = (28, 31, 38)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: dict[str, tuple[float, float]] = {"small": (0.34, 0.40), "large": (0.48, 0.56)}
"""Diameter ranges as shares of the picture's side."""
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction (x to the right, y down) in which the first object lies, seen from the second."""
NUMBERS = {"two": 2, "three": 3}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "attribute_binding")


@dataclass(frozen=True)
class Subject:
    """One noun phrase: ``count`` objects of a shape, with or without a named colour and size."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1

    def phrase(self) -> str:
        words = [w for w in (self.size, self.colour) if w]
        if self.count == 1:
            first = words[0] if words else self.shape
            return " ".join(["an" if first[0] in "aeiou" else "a", *words, self.shape])
        number = next(word for word, n in NUMBERS.items() if n == self.count)
        return " ".join([number, *words, _plural(self.shape)])


CLASSES = tuple(Subject(shape, colour) for colour in COLOURS for shape in SHAPES)
"""The 48 classes of the labelled pictures; class ``n`` is ``CLASSES[n]``, named by its phrase ("a red circle")."""


@dataclass(frozen=True)
class Prompt:
    """A caption with its meaning."""

    category: str
    subjects: tuple[Subject, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        phrases = [s.phrase() for s in self.subjects]
        if self.relation:
            return f"{phrases[0]} {self.relation} {phrases[1]}"
        return " and ".join(([", ".join(phrases[:-1])] if len(phrases) > 1 else []) + phrases[-1:])


def parse_caption(caption: str) -> Prompt:
    """The prompt whose caption is exactly ``caption``; ValueError with the fault if it is not of this language."""
    relation = next((r for r in RELATIONS if f" {r} " in caption), None)
    phrases = caption.split(f" {relation} ") if relation else re.split(r", | and ", caption)
    subjects = tuple(_parse_phrase(p, caption) for p in phrases)
    prompt = Prompt(_category(subjects, relation), subjects, relation)
    if prompt.caption != caption:
        raise ValueError(f"caption {caption!r}: not of the language, expected {prompt.caption!r}")
    return prompt


def _parse_phrase(phrase: str, caption: str) -> Subject:
    words = phrase.split()
    singular = {_plural(s): s for s in SHAPES} | {s: s for s in SHAPES}
    if len(words) < 2 or words[0] not in {"a", "an", *NUMBERS} or words[-1] not in singular:
        raise ValueError(
            f"caption {caption!r}: cannot read {phrase!r}; expected e.g. 'a large red circle' or 'two squares'"
        )
    size = next((w for w in words[1:-1] if w in SIZES), None)
    colour = next((w for w in words[1:-1] if w in COLOURS), None)
    if unknown := [w for w in words[1:-1] if w not in (size, colour)]:
        raise ValueError(
            f"caption {caption!r}: unknown word {unknown[0]!r}; "
            f"colours are {', '.join(COLOURS)}, sizes {', '.join(SIZES)}"
        )
    return Subject(singular[words[-1]], colour, size, NUMBERS.get(words[0], 1))


def _category(subjects: tuple[Subject, ...], relation: str | None) -> str:
    if relation:
        return "position"
    if len(subjects) > 1:
        return "attribute_binding" if any(s.colour for s in subjects) else "two_object"
    if subjects[0].count > 1:
        return "counting"
    return "colors" if subjects[0].colour else "single_object"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def vocabulary() -> tuple[str, ...]:
    """Every word and mark a caption can hold, in a fixed order."""
    words = {"a", "an", "and", ",", *NUMBERS, *SIZES, *COLOURS, *SHAPES, *(_plural(s) for s in SHAPES)}
    words |= {w for r in RELATIONS for w in r.split()}
    return tuple(sorted(words))
