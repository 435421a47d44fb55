"""Scenes: a prompt drawn at random, objects placed so that it holds, and their picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from dydit_scale.data.shapes.language import BACKGROUND, CLASSES, COLOURS, RELATIONS, SHAPES, SIZES, Prompt, Subject
from dydit_scale.diffusion.randomness import keyed_seed

CATEGORY_SHARES = {
    "single_object": 0.12,
    "two_object": 0.12,
    "counting": 0.16,
    "colors": 0.2,
    "position": 0.2,
    "attribute_binding": 0.2,
}
_GAP = 0.04  # free space between objects and to the border, as a share of the side
_CROWDS = {2: (0.36, 0.42), 3: (0.32, 0.36)}  # diameters of several objects, by their number
_JITTER = {1: 0.08, 2: 0.04, 3: 0.03}  # how far from their places they are drawn; the border may move them further
_ROOM = 20  # placements tried before the sizes are drawn anew
_OFF_CENTRE = 0.04  # how far the object of a class may lie from the middle, as a share of the side
_DRAWS = 50  # draws of the sizes; one nearly always does, so a prompt that needs more does not fit into the picture


@dataclass(frozen=True)
class Object:
    """One drawn shape; centre and diameter as shares of the picture's side."""

    shape: str
    colour: str
    diameter: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What is to be seen, and the prompt that it fulfils."""

    prompt: Prompt
    objects: tuple[Object, ...]

    def as_dict(self) -> dict:
        """Plain values for a sample's JSON."""
        return {
            "caption": self.prompt.caption,
            "category": self.prompt.category,
            "objects": [asdict(o) for o in self.objects],
        }


def random_prompt(rng: np.random.RandomState, category: str | None = None) -> Prompt:
    """A prompt of ``category``, or of one drawn by ``CATEGORY_SHARES``."""
    category = category or str(rng.choice(list(CATEGORY_SHARES), p=list(CATEGORY_SHARES.values())))
    shapes = [str(s) for s in rng.choice(SHAPES, size=3, replace=False)]
    colours = [str(c) for c in rng.choice(list(COLOURS), size=3, replace=False)]
    if category == "single_object":
        return Prompt(category, (Subject(shapes[0]),))
    if category == "colors":
        size = str(rng.choice(list(SIZES))) if rng.rand() < 0.3 else None
        return Prompt(category, (Subject(shapes[0], colours[0], size),))
    if category == "counting":
        return Prompt(category, (Subject(shapes[0], count=int(rng.choice([2, 3]))),))
    if category == "two_object":
        return Prompt(category, (Subject(shapes[0]), Subject(shapes[1])))
    pair = (Subject(shapes[0], colours[0]), Subject(shapes[1], colours[1]))
    if category == "position":
        return Prompt(category, pair, str(rng.choice(list(RELATIONS))))
    if category == "attribute_binding":
        return Prompt(category, (*pair, Subject(shapes[2], colours[2])) if rng.rand() < 0.25 else pair)
    raise ValueError(f"category {category!r}: expected one of {', '.join(CATEGORY_SHARES)}")


def make_scene(seed: int, number: int) -> Scene:
    """Scene ``number`` of the endless set named by ``seed``."""
    rng = np.random.RandomState(keyed_seed(seed, "scene", number) % 2**32)
    return place(random_prompt(rng), rng)


def make_class_scene(seed: int, number: int) -> tuple[Scene, int]:
    """Picture ``number`` of the labelled set named by ``seed``, and its class."""
    rng = np.random.RandomState(keyed_seed(seed, "class scene", number) % 2**32)
    label = int(rng.randint(len(CLASSES)))
    return place_class(label, rng), label


def place_class(label: int, rng: np.random.RandomState) -> Scene:
    """A scene of class ``label``: one large object near the middle."""
    subject = CLASSES[label]
    x, y = (float(v) for v in 0.5 + rng.uniform(-_OFF_CENTRE, _OFF_CENTRE, size=2))
    thing = Object(subject.shape, str(subject.colour), float(rng.uniform(*SIZES["large"])), x, y)
    return Scene(Prompt("colors", (subject,)), (thing,))


def place(prompt: Prompt, rng: np.random.RandomState) -> Scene:
    """A scene that fulfils ``prompt``: objects near places of their own, inside the picture and apart from each other.

    Two in a stated relation stand in a row or a column of their own; all others from left to right in the order of the
    caption, three and more alternately high and low. The judge asks for no more than the caption says. Raises
    ValueError if the objects find no room, as two large ones do not.
    """
    subjects = [s for s in prompt.subjects for _ in range(s.count)]
    crowd = max(_CROWDS) if any(s.size for s in subjects) else min(len(subjects), max(_CROWDS))  # room for a large one
    one_colour = str(rng.choice(list(COLOURS)))
    places, jitter = _places(len(subjects), prompt.relation), _JITTER[min(len(subjects), max(_JITTER))]
    for _ in range(_DRAWS):
        sizes = np.array([_diameter(s, crowd, rng) for s in subjects])
        reaches = [_reach(s.shape) * d for s, d in zip(subjects, sizes, strict=True)]
        colours = [s.colour or (one_colour if s.count > 1 else str(rng.choice(list(COLOURS)))) for s in subjects]
        border = (_GAP + sizes / 2)[:, None]
        for _ in range(_ROOM):
            centres = np.clip(places + rng.uniform(-jitter, jitter, size=places.shape), border, 1 - border)
            if _apart(centres, reaches):
                objects = zip(subjects, colours, sizes.tolist(), centres.tolist(), strict=True)
                return Scene(prompt, tuple(Object(s.shape, c, d, x, y) for s, c, d, (x, y) in objects))
    raise ValueError(f"prompt {prompt.caption!r}: found no room for its objects; ask for fewer or smaller ones")


def _places(number: int, relation: str | None) -> np.ndarray:
    """Where objects stand, in the order of the caption, [objects, 2]."""
    if relation is not None:
        direction = np.array(RELATIONS[relation])
        return 0.5 + 0.25 * np.stack([direction, -direction])
    x = (np.arange(number) + 0.5) / number
    y = np.full(number, 0.5) if number < 3 else np.where(np.arange(number) % 2, 0.75, 0.25)
    return np.stack([x, y], axis=1)


def _diameter(subject: Subject, crowd: int, rng: np.random.RandomState) -> float:
    if subject.size is None and crowd > 1:
        return float(rng.uniform(*_CROWDS[crowd]))
    return float(rng.uniform(*SIZES[subject.size or str(rng.choice(list(SIZES)))]))


def _reach(shape: str) -> float:
    """How far a shape extends along an axis from its centre, in diameters."""
    return 0.55 if shape == "diamond" else 0.5


def _apart(centres: np.ndarray, reaches: list[float]) -> bool:
    pairs = [(i, j) for i in range(len(reaches)) for j in range(i)]
    return all(np.abs(centres[i] - centres[j]).max() > reaches[i] + reaches[j] + _GAP for i, j in pairs)


def draw(scene: Scene, side: int) -> np.ndarray:
    """The picture of a scene, uint8 [side, side, 3]."""
    return draw_objects(scene.objects, side)


def draw_objects(objects: Iterable[Object], side: int, oversample: int = 4) -> np.ndarray:
    """Objects on the ground, uint8 [side, side, 3], with smooth edges (box filter over ``oversample`` squared points a
    pixel)."""
    picture = np.empty((side, side, 3))
    picture[:] = BACKGROUND
    for o in objects:
        rows, cols = _span(o.y, o.diameter, side), _span(o.x, o.diameter, side)
        y, x = (_points(span, side, oversample) for span in (rows, cols))
        inside = shape_mask(o.shape, (x[None, :] - o.x) / (o.diameter / 2), (y[:, None] - o.y) / (o.diameter / 2))
        cover = inside.reshape(len(rows), oversample, len(cols), oversample).mean(axis=(1, 3))[..., None]
        box = picture[rows.start : rows.stop, cols.start : cols.stop]
        box += (np.array(COLOURS[o.colour]) - box) * cover
    return np.round(picture).astype(np.uint8)


def _span(centre: float, diameter: float, side: int) -> range:
    """The pixels along one axis that a shape can touch; the widest shape reaches 1.1 radii."""
    reach = 0.55 * diameter
    return range(max(0, int((centre - reach) * side)), min(side, int((centre + reach) * side) + 2))


def _points(span: range, side: int, oversample: int) -> np.ndarray:
    return (np.arange(span.start * oversample, span.stop * oversample) + 0.5) / (side * oversample)


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie inside; ``x`` to the right and ``y`` down, in units of the shape's radius."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r <= 1
    if shape == "ring":
        return (r <= 1) & (r >= 0.5)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "diamond":
        return abs(x) + abs(y) <= 1.1
    if shape == "triangle":
        return (y <= 0.9) & (y >= -1) & (abs(x) <= (y + 1) / 1.9)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)
    raise ValueError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")
