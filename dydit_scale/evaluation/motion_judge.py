"""The judge of the moving shapes: does a clip show the objects of its caption, in their colours, doing what it says?

Objects are read off each frame on its own, joined over the frames to tracks, and each track's motion is named from its
way alone, without knowing the caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from dydit_scale.data.shapes.motion import DIRECTIONS, MIN_FRAMES, Action, parse_motion_caption
from dydit_scale.evaluation.shapes_judge import Scores
from dydit_scale.evaluation.shapes_reader import Found, read_scene

MOTION_CATEGORIES = ("object", "colour", "motion", "both")
STILL = 0.07
"""Share of the side within which something that stands still may tremble."""
MIN_WAY = 0.16
"""Share of the side that a straight motion must cover at least (the data has 0.24)."""
MIN_LEG = 0.08
"""The same for each of a bounce's two legs (the data has 0.16)."""
NEAR_BORDER = 0.12
"""How far from touching the border a bounce may turn, as a share of the side."""
AGREEMENT = 0.75
"""Share of the frames in which a track must have one shape, and one colour, to be said to have it."""
_WOBBLE = 0.25  # share of a way that may go back, or to the side, in all
_JUMP = 0.5  # largest share of a way that may be covered between two frames


@dataclass
class Track:
    """One object over the frames."""

    seen: dict[int, Found] = field(default_factory=dict)
    """By frame."""

    @property
    def last(self) -> Found:
        return self.seen[max(self.seen)]

    @property
    def shape(self) -> str | None:
        """None if it has none, or changes it."""
        return _agreed([found.shape for found in self.seen.values()])

    @property
    def colour(self) -> str | None:
        """None if it is odd, or changes."""
        return _agreed([found.colour for found in self.seen.values()])

    def centres(self) -> np.ndarray:
        """[frames in which it is seen, 2], x and y."""
        return np.array([[self.seen[frame].x, self.seen[frame].y] for frame in sorted(self.seen)])


@dataclass(frozen=True)
class Performed:
    """What a clip shows of one object; None for what cannot be named."""

    shape: str | None
    colour: str | None
    motion: str | None

    def __str__(self) -> str:
        return f"{self.colour or 'oddly coloured'} {self.shape or 'blob'} that {self.motion or 'moves oddly'}"


@dataclass(frozen=True)
class MotionVerdict:
    """What the judge says of one clip, each for all of its objects."""

    object: bool
    """The shapes are the named ones, and there are no other objects."""
    colour: bool
    motion: bool
    reason: str
    """What is wrong, in words for a report; "as described" when nothing is."""
    found: tuple[Performed, ...]

    @property
    def both(self) -> bool:
        """The named objects, in their colours, do what is said: all of the caption."""
        return self.object and self.colour and self.motion


def judge_motion(clip: np.ndarray, caption: str) -> MotionVerdict:
    """Whether ``clip`` (uint8 [frames, side, side, 3], 8 frames or more) shows what ``caption`` says and nothing else.

    Objects are paired with those of the caption so that most agrees; a clip with too many or too few is wrong in all.
    Raises ValueError for another dtype or shape, and a caption that is not of the language.
    """
    wanted, found = parse_motion_caption(caption).actions, tuple(read_motion(clip))
    if len(found) != len(wanted):
        seen = ", ".join(map(str, found)) or "nothing"
        return MotionVerdict(False, False, False, f"expected {len(wanted)} objects, found {seen}", found)
    rows = [[_agree(a, p) for a, p in zip(wanted, order, strict=True)] for order in permutations(found)]
    best = max(rows, key=lambda row: sum(map(sum, row)))
    object_right, colour_right, motion_right = (all(column) for column in zip(*best, strict=True))
    right = object_right and colour_right and motion_right
    reason = "as described" if right else f"expected {caption}, found {', '.join(map(str, found))}"
    return MotionVerdict(object_right, colour_right, motion_right, reason, found)


def score_motion(clips: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> Scores:
    """Judges ``clips`` ([n, frames, side, side, 3] uint8, or n of them) against their captions.

    "categories" holds the share of clips whose objects, colours and motions are right, each for itself, and "both" the
    share of those that are right in all three, which is "overall" too. Raises ValueError if there is nothing to judge
    or the numbers differ.
    """
    if len(clips) != len(captions) or not captions:
        raise ValueError(
            f"score_motion: expected as many clips as captions, at least one; got {len(clips)} and {len(captions)}"
        )
    verdicts = [judge_motion(clip, caption) for clip, caption in zip(clips, captions, strict=True)]
    shares = {name: sum(getattr(v, name) for v in verdicts) / len(verdicts) for name in MOTION_CATEGORIES}
    return Scores(overall=shares["both"], categories=shares, counts=dict.fromkeys(MOTION_CATEGORIES, len(verdicts)))


def read_motion(clip: np.ndarray) -> list[Performed]:
    """The objects of ``clip`` (uint8 [frames, side, side, 3]) and what each does.

    What is seen in an eighth of the frames or less is taken for dirt. Raises ValueError for another dtype or shape, or
    fewer frames than the moving shapes have.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or len(clip) < MIN_FRAMES:
        raise ValueError(
            f"clip: expected uint8 [{MIN_FRAMES} or more frames, side, side, 3], got {clip.dtype} {list(clip.shape)}"
        )
    tracks: list[Track] = []
    for frame, picture in enumerate(clip):
        _extend(tracks, frame, read_scene(picture))
    lasting = [track for track in tracks if len(track.seen) > len(clip) // 8]
    return [Performed(t.shape, t.colour, name_motion(t, len(clip))) for t in lasting]


def name_motion(track: Track, frames: int) -> str | None:
    """What a track does in a clip of so many frames, or None if that has no name here."""
    slack = frames // 8
    first, last = min(track.seen), max(track.seen)
    if last < frames - 1 - slack or len(track.seen) < (last + 1 - first) - slack:
        return None
    centres = track.centres()  # [seen, 2]
    still = bool((np.ptp(centres, axis=0) <= STILL).all())
    if first > slack:
        return "appears" if still else None
    if still:
        return "stands still"
    axis = int(np.ptp(centres, axis=0).argmax())
    along, across = centres[:, axis], centres[:, 1 - axis]
    if np.ptp(across) > max(STILL, _WOBBLE * np.ptp(along)):
        return None
    if _is_straight(along, MIN_WAY):
        sign = int(np.sign(along[-1] - along[0]))
        return next(name for name, way in DIRECTIONS.items() if way[axis] == sign)
    radius = float(np.median([found.diameter for found in track.seen.values()])) / 2
    return "bounces" if _is_bounce(along, radius) else None


def _extend(tracks: list[Track], frame: int, found: list[Found]) -> None:
    """Give every object of a frame to the track it continues best, or to a new one; likeness counts before nearness."""
    pairs = [(_distance(track.last, thing), t, f) for t, track in enumerate(tracks) for f, thing in enumerate(found)]
    taken: set[int] = set()
    for _, t, f in sorted(pairs):
        if frame not in tracks[t].seen and f not in taken:
            tracks[t].seen[frame] = found[f]
            taken.add(f)
    tracks += [Track({frame: thing}) for f, thing in enumerate(found) if f not in taken]


def _distance(one: Found, other: Found) -> float:
    unlike = (one.colour != other.colour) + (one.shape != other.shape)
    return float(np.hypot(one.x - other.x, one.y - other.y)) + unlike


def _agreed(values: list[str | None]) -> str | None:
    value, count = Counter(values).most_common(1)[0]
    return value if count >= AGREEMENT * len(values) else None


def _is_straight(along: np.ndarray, least: float) -> bool:
    """Far enough in one direction, with little of the way back and no jump."""
    steps, way = np.diff(along), along[-1] - along[0]
    back = float(np.abs(steps[steps * way < 0]).sum())
    return bool(abs(way) >= least and back <= _WOBBLE * abs(way) and np.abs(steps).max() <= _JUMP * abs(way))


def _is_bounce(along: np.ndarray, radius: float) -> bool:
    """Out and back, with the turn where the object touches the border."""
    for turn, border in ((int(along.argmin()), along.min() - radius), (int(along.argmax()), 1 - along.max() - radius)):
        legs = along[: turn + 1], along[turn:]
        if border <= NEAR_BORDER and all(len(leg) > 1 and _goes(leg) for leg in legs):
            return True
    return False


def _goes(leg: np.ndarray) -> bool:
    """A leg of a bounce: as a straight motion, but of so few frames that one step may be most of it."""
    steps, way = np.diff(leg), leg[-1] - leg[0]
    return bool(abs(way) >= MIN_LEG and np.abs(steps[steps * way < 0]).sum() <= _WOBBLE * abs(way))


def _agree(action: Action, performed: Performed) -> tuple[bool, bool, bool]:
    subject = action.subject
    return performed.shape == subject.shape, performed.colour == subject.colour, performed.motion == action.motion
