"""Moving shapes: one or two objects that move, stand still, bounce or appear, with captions that say so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from dydit_scale.data.shapes.language import COLOURS, SHAPES, Subject, parse_caption
from dydit_scale.data.shapes.scene import Object, draw_objects
from dydit_scale.diffusion.randomness import keyed_seed

DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
"""Direction (x to the right, y down) of each straight motion."""
MOTIONS = (*DIRECTIONS, "stands still", "bounces", "appears")
MIN_FRAMES = 8
"""Fewer cannot tell a bounce from a jump."""
_TWO = 0.5  # share of clips with two objects
_GAP = 0.03  # free space between objects at any time, and to the border where it is not touched
_REACH = 0.55  # of a diameter: how far the widest shape reaches from its centre
_ROOM = 2000  # placements tried; a few dozen nearly always do


@dataclass(frozen=True)
class Ranges:
    """Between what sizes and ways are drawn, as shares of the side."""

    diameters: tuple[float, float]
    travel: tuple[float, float]
    """How far an object moves; one that bounces goes so far from the border or towards it, whichever takes longer."""
    off_centre: float = 0.5
    """How far from the middle it may start, across its way."""


RANGES = {1: Ranges((0.29, 0.38), (0.32, 0.5)), 2: Ranges((0.27, 0.31), (0.24, 0.34))}
"""Of clips of one object and of two."""
CLASS_RANGES = Ranges((0.34, 0.4), (0.36, 0.46), off_centre=0.03)
"""Of labelled clips."""


@dataclass(frozen=True)
class Action:
    """One object of a caption and what it does."""

    subject: Subject
    motion: str

    def phrase(self) -> str:
        return f"{self.subject.phrase()} {self.motion}"


CLASS_ACTIONS = tuple(
    Action(Subject(SHAPES[label % len(SHAPES)], tuple(COLOURS)[label]), motion) for label, motion in enumerate(MOTIONS)
)
"""What is to be seen in each class of the labelled clips; class ``n`` is named by its motion, ``MOTIONS[n]``."""


@dataclass(frozen=True)
class MotionPrompt:
    """A caption of a clip with its meaning."""

    actions: tuple[Action, ...]

    @property
    def caption(self) -> str:
        return " and ".join(action.phrase() for action in self.actions)


@dataclass(frozen=True)
class Mover:
    """An object with its way: it starts where ``start`` is drawn and gets ``travel`` far by the end of the clip."""

    start: Object
    motion: str
    travel: tuple[float, float] = (0.0, 0.0)
    """In x and y, as shares of the side, as if there were no border."""
    appears: float = 0.0
    """Time, as a share of the clip, from which it is there."""

    def at(self, time: float) -> Object | None:
        """The object at ``time`` from 0 to 1; None before it appears."""
        if time < self.appears:
            return None
        ((x, y),) = self.centres(np.array([time]))
        return replace(self.start, x=float(x), y=float(y))

    def centres(self, times: np.ndarray) -> np.ndarray:
        """Where it is or will appear at ``times``, [times, 2]; the border throws back whoever touches it."""
        at = np.array([self.start.x, self.start.y]) + times[:, None] * np.array(self.travel)
        low, high = _REACH * self.start.diameter, 1 - _REACH * self.start.diameter
        return np.where(at < low, 2 * low - at, np.where(at > high, 2 * high - at, at))


@dataclass(frozen=True)
class MotionScene:
    """What is to be seen, and the prompt that it fulfils."""

    prompt: MotionPrompt
    movers: tuple[Mover, ...]

    def as_dict(self) -> dict:
        """Plain values for a sample's JSON."""
        return {"caption": self.prompt.caption, "movers": [asdict(mover) for mover in self.movers]}


def parse_motion_caption(caption: str) -> MotionPrompt:
    """The prompt whose caption is exactly ``caption``; ValueError with the fault if it is not of this language."""
    actions = []
    for phrase in caption.split(" and "):
        motion = next((m for m in MOTIONS if phrase.endswith(f" {m}")), None)
        if motion is None:
            raise ValueError(f"caption {caption!r}: {phrase!r} ends in no motion; expected one of {', '.join(MOTIONS)}")
        (subject,) = parse_caption(phrase.removesuffix(f" {motion}")).subjects
        if subject.count > 1 or subject.size or not subject.colour:
            raise ValueError(f"caption {caption!r}: cannot read {phrase!r}; expected e.g. 'a red circle {motion}'")
        actions.append(Action(subject, motion))
    return MotionPrompt(tuple(actions))


def random_motion_prompt(rng: np.random.RandomState) -> MotionPrompt:
    """One or two objects of different colours and shapes, each with a motion."""
    count = 2 if rng.rand() < _TWO else 1
    shapes, colours = (rng.choice(list(words), size=count, replace=False) for words in (SHAPES, COLOURS))
    motions = rng.choice(MOTIONS, size=count)
    objects = zip(shapes, colours, motions, strict=True)
    return MotionPrompt(tuple(Action(Subject(str(s), str(c)), str(m)) for s, c, m in objects))


def make_motion(seed: int, number: int) -> MotionScene:
    """Clip ``number`` of the endless set named by ``seed``."""
    rng = np.random.RandomState(keyed_seed(seed, "motion", number) % 2**32)
    return place_motion(random_motion_prompt(rng), rng)


def make_class_motion(seed: int, number: int) -> tuple[MotionScene, int]:
    """Clip ``number`` of the labelled set named by ``seed``, and its class."""
    rng = np.random.RandomState(keyed_seed(seed, "class motion", number) % 2**32)
    label = int(rng.randint(len(CLASS_ACTIONS)))
    return place_class_motion(label, rng), label


def place_class_motion(label: int, rng: np.random.RandomState) -> MotionScene:
    """A scene of class ``label``: one large object near the middle."""
    action = CLASS_ACTIONS[label]
    return MotionScene(MotionPrompt((action,)), (_mover(action, CLASS_RANGES, rng),))


def motion_vocabulary() -> tuple[str, ...]:
    """Every word that a caption of a clip can hold, in a fixed order."""
    words = {"a", "an", "and", *COLOURS, *SHAPES, *(word for motion in MOTIONS for word in motion.split())}
    return tuple(sorted(words))


def place_motion(prompt: MotionPrompt, rng: np.random.RandomState) -> MotionScene:
    """A scene that fulfils ``prompt``: objects that stay inside the picture and apart from each other all the time.

    Raises ValueError if they find no room.
    """
    for _ in range(_ROOM):
        movers = tuple(_mover(action, RANGES[len(prompt.actions)], rng) for action in prompt.actions)
        if _apart(movers):
            return MotionScene(prompt, movers)
    raise ValueError(f"prompt {prompt.caption!r}: found no room for its objects; ask for fewer")


def draw_motion(scene: MotionScene, side: int, frames: int) -> np.ndarray:
    """The clip, uint8 [frames, side, side, 3]: equal steps in time from the first frame at 0 to the last at 1.

    Raises ValueError for fewer frames than ``MIN_FRAMES``.
    """
    if frames < MIN_FRAMES:
        raise ValueError(f"frames: expected at least {MIN_FRAMES}, got {frames}")
    shown = ([mover.at(frame / (frames - 1)) for mover in scene.movers] for frame in range(frames))
    return np.stack([draw_objects([thing for thing in things if thing], side) for things in shown])


def _mover(action: Action, ranges: Ranges, rng: np.random.RandomState) -> Mover:
    diameter = float(rng.uniform(*ranges.diameters))
    low, high = _REACH * diameter + _GAP, 1 - _REACH * diameter - _GAP
    x, y = (float(v) for v in rng.uniform(max(low, 0.5 - ranges.off_centre), min(high, 0.5 + ranges.off_centre), 2))
    start = Object(action.subject.shape, str(action.subject.colour), diameter, x, y)
    if action.motion == "appears":
        return Mover(start, action.motion, appears=float(rng.uniform(0.25, 0.75)))
    if action.motion == "stands still":
        return Mover(start, action.motion)
    way = float(rng.uniform(*ranges.travel))
    if action.motion == "bounces":
        return _bouncing(start, way, rng)
    # From a random place on the part of the line from which the way fits into the picture.
    right, down = DIRECTIONS[action.motion]
    begin = float(rng.uniform(low, high - way))
    begin = begin if right + down > 0 else 1 - begin
    start = replace(start, x=begin) if right else replace(start, y=begin)
    return Mover(start, action.motion, (right * way, down * way))


def _bouncing(start: Object, way: float, rng: np.random.RandomState) -> Mover:
    """To a border and back again; the border comes at 0.4 to 0.6 of the clip."""
    reach, part = _REACH * start.diameter, float(rng.uniform(0.4, 0.6))
    total, sideways, forward = way / max(part, 1 - part), rng.rand() < 0.5, rng.rand() < 0.5
    begin = reach + total * part
    begin, total = (1 - begin, total) if forward else (begin, -total)
    if sideways:
        return Mover(replace(start, x=begin), "bounces", (total, 0.0))
    return Mover(replace(start, y=begin), "bounces", (0.0, total))


def _apart(movers: tuple[Mover, ...], moments: int = 17) -> bool:
    """Whether no two ever come closer than the gap; those that appear keep their place free before."""
    if len(movers) < 2:
        return True
    one, other = movers
    times = np.linspace(0, 1, moments)
    need = _REACH * (one.start.diameter + other.start.diameter) + _GAP
    return bool(np.abs(one.centres(times) - other.centres(times)).max(1).min() >= need)
