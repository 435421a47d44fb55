"""The judge of motion agrees with the clips that are drawn, and not with reversed, frozen, recoloured or mixed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from dydit_scale.data.shapes.language import BACKGROUND, COLOURS
from dydit_scale.data.shapes.motion import MotionScene, Mover, draw_motion, make_motion
from dydit_scale.data.shapes.scene import Object, draw_objects
from dydit_scale.evaluation.motion_judge import judge_motion, read_motion, score_motion

FRAMES = 8


@cache
def drawn() -> tuple[tuple[np.ndarray, MotionScene], ...]:
    found = [make_motion(77, number) for number in range(60)]
    return tuple((draw_motion(scene, 32, FRAMES), scene) for scene in found)


def motions(scene: MotionScene) -> set[str]:
    return {action.motion for action in scene.prompt.actions}


def test_own_clips_are_right() -> None:
    scores = score_motion([clip for clip, _ in drawn()], [scene.prompt.caption for _, scene in drawn()])
    assert min(scores["categories"].values()) >= 0.99, scores
    assert scores["overall"] == scores["categories"]["both"]
    assert set(scores["categories"]) == set(scores["counts"]) == {"object", "colour", "motion", "both"}
    assert set(scores["counts"].values()) == {60}


def test_noise_of_a_small_model_is_forgiven() -> None:
    rng = np.random.RandomState(0)
    for clip, scene in drawn()[:12]:
        noisy = np.clip(np.round(clip + rng.normal(0, 6, clip.shape)), 0, 255).astype(np.uint8)
        assert judge_motion(noisy, scene.prompt.caption).both


Spoiler = Callable[[np.ndarray], np.ndarray]
UNDIRECTED = {"stands still", "bounces"}  # a bounce backwards is a bounce


@pytest.mark.parametrize(
    ("spoil", "unchanged"),
    [
        (lambda clip: clip[::-1], UNDIRECTED),
        (lambda clip: np.repeat(clip[-1:], FRAMES, axis=0), {"stands still"}),
        (lambda clip: clip[[3, 6, 0, 5, 2, 7, 1, 4]], {"stands still"}),
    ],
    ids=["reversed", "frozen", "shuffled"],
)
def test_spoilt_motion_fails_and_objects_stay_right(spoil: Spoiler, unchanged: set[str]) -> None:
    spoilt = [(spoil(clip), scene) for clip, scene in drawn() if motions(scene) - unchanged][:25]
    assert len(spoilt) == 25
    for clip, scene in spoilt:
        verdict = judge_motion(clip, scene.prompt.caption)
        assert (verdict.object, verdict.colour, verdict.motion, verdict.both) == (True, True, False, False), verdict
        assert verdict.reason.startswith(f"expected {scene.prompt.caption}, found")


def test_recoloured_clips_fail_in_colour_alone() -> None:
    for _, scene in drawn()[:20]:
        taken = {mover.start.colour for mover in scene.movers}
        other = next(colour for colour in COLOURS if colour not in taken)
        first, *rest = scene.movers
        movers = (replace(first, start=replace(first.start, colour=other)), *rest)
        verdict = judge_motion(draw_motion(replace(scene, movers=movers), 32, FRAMES), scene.prompt.caption)
        assert (verdict.object, verdict.colour, verdict.motion, verdict.both) == (True, False, True, False), verdict


def test_missing_and_added_objects_fail_in_all() -> None:
    pairs = [(clip, scene) for clip, scene in drawn() if len(scene.movers) == 2][:6]
    for clip, scene in pairs:
        alone = draw_motion(replace(scene, movers=scene.movers[:1]), 32, FRAMES)
        first = replace(scene.prompt, actions=scene.prompt.actions[:1])
        for shown, caption in [(alone, scene.prompt.caption), (clip, first.caption)]:
            verdict = judge_motion(shown, caption)
            assert not (verdict.object or verdict.colour or verdict.motion)
            assert "objects, found" in verdict.reason
    blank = np.full((FRAMES, 32, 32, 3), BACKGROUND, dtype=np.uint8)
    assert judge_motion(blank, "a red circle moves up").reason == "expected 1 objects, found nothing"


def path(*centres: tuple[float, float] | None, colour: str = "red") -> np.ndarray:
    things = [[Object("circle", colour, 0.3, *at)] if at else [] for at in centres]
    return np.stack([draw_objects(thing, 32) for thing in things])


@pytest.mark.parametrize(
    ("clip", "motion"),
    [
        (path(*[(0.2 + 0.06 * t, 0.5) for t in range(8)]), "moves right"),
        (path(*[(0.5, 0.8 - 0.06 * t) for t in range(8)]), "moves up"),
        (path(*[(0.2 + 0.06 * t, 0.2 + 0.06 * t) for t in range(8)]), None),  # aslant
        (path(*[(0.5, 0.5) if t < 4 else (0.8, 0.5) for t in range(8)]), None),  # a jump
        (path(*[(0.3 + 0.02 * (-1) ** t, 0.5) for t in range(8)]), "stands still"),
        (path(*[(0.18 + 0.1 * abs(t - 4), 0.5) for t in range(8)]), "bounces"),
        (path(*[(0.4 + 0.08 * abs(t - 4), 0.5) for t in range(8)]), None),  # turns away from the border
        (path(*[None] * 3, *[(0.5, 0.5)] * 5), "appears"),
        (path(*[(0.5, 0.5)] * 5, *[None] * 3), None),  # disappears
        (path(*[None] * 3, *[(0.2 + 0.1 * t, 0.5) for t in range(5)]), None),  # appears and moves
        (path(*[(0.5, 0.5) if t % 2 else None for t in range(8)]), None),  # flickers
    ],
)
def test_motions_are_told_by_the_way_alone(clip: np.ndarray, motion: str | None) -> None:
    (performed,) = read_motion(clip)
    assert (performed.shape, performed.colour, performed.motion) == ("circle", "red", motion)


def test_an_object_that_changes_its_colour_has_none() -> None:
    half = path(*[(0.5, 0.5)] * 4), path(*[(0.5, 0.5)] * 4, colour="blue")
    (performed,) = read_motion(np.concatenate(half))
    assert str(performed) == "oddly coloured circle that stands still"


def test_wrong_arguments_are_refused() -> None:
    clip, scene = drawn()[0]
    with pytest.raises(ValueError, match=r"clip: expected uint8 \[8 or more frames.*got uint8 \[4, 32, 32, 3\]"):
        read_motion(clip[:4])
    with pytest.raises(ValueError, match="got float32"):
        read_motion(clip.astype(np.float32))
    with pytest.raises(ValueError, match="got 1 and 0"):
        score_motion([clip], [])
    with pytest.raises(ValueError, match="ends in no motion"):
        judge_motion(clip, "a red circle")
    assert isinstance(scene.movers[0], Mover)
