"""Moving shapes: captions that read back, ways that do what the caption says, and shards that hold the drawn frames."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from einops import rearrange

from data_tools.shapes import write_shapes
from dydit_scale.cli.main import main
from dydit_scale.data.loader import DataConfig, make_loader
from dydit_scale.data.shapes.motion import (
    CLASS_ACTIONS,
    DIRECTIONS,
    MOTIONS,
    MotionScene,
    draw_motion,
    make_class_motion,
    make_motion,
    parse_motion_caption,
    place_motion,
)

GOLDEN = "a08283adc6878750185c71a1bf4164bdf75d20db221454656993486d9f58f05e"
"""sha256 over the clips of 8 frames at 32 pixels and the captions of scenes 0 to 29 of seed 0."""


@cache
def scenes() -> tuple[MotionScene, ...]:
    return tuple(make_motion(3, number) for number in range(150))


def test_captions_read_back_to_their_meaning() -> None:
    for scene in scenes():
        assert parse_motion_caption(scene.prompt.caption) == scene.prompt
    caption = "a green ring moves up and an orange cross stands still"
    assert parse_motion_caption(caption).caption == caption
    motions = Counter(action.motion for scene in scenes() for action in scene.prompt.actions)
    assert set(motions) == set(MOTIONS) and min(motions.values()) > 15
    assert {len(scene.movers) for scene in scenes()} == {1, 2}


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("a red circle", "ends in no motion"),
        ("a red circle flies", "ends in no motion; expected one of moves left"),
        ("a circle moves left", "expected e.g. 'a red circle moves left'"),
        ("a small red circle appears", "cannot read"),
        ("two red circles bounces", "cannot read"),
        ("a red house appears", "cannot read 'a red house'"),
    ],
)
def test_captions_outside_the_language_are_refused(caption: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_motion_caption(caption)


def test_objects_do_what_the_caption_says_inside_the_picture_and_apart() -> None:
    times = np.linspace(0, 1, 41)
    for scene in scenes():
        for action, mover in zip(scene.prompt.actions, scene.movers, strict=True):
            at, reach = mover.centres(times), 0.55 * mover.start.diameter
            assert (at >= reach - 1e-9).all() and (at <= 1 - reach + 1e-9).all()
            way, steps = at[-1] - at[0], np.diff(at, axis=0)
            there = [mover.at(float(time)) is not None for time in times]
            assert there == sorted(there) and all(there) == (action.motion != "appears")
            if action.motion in DIRECTIONS:
                assert (np.sign(np.round(way, 9)) == DIRECTIONS[action.motion]).all() and abs(way).max() >= 0.24
            elif action.motion == "bounces":
                axis = int(np.ptp(at, axis=0).argmax())
                turns = np.flatnonzero(np.diff(np.sign(steps[:, axis])))
                assert 1 <= len(turns) <= 2 and np.ptp(at[:, 1 - axis]) == 0
                assert min(at[:, axis].min(), 1 - at[:, axis].max()) < reach + 0.03
            else:
                assert np.ptp(at) == np.ptp(at[0])
        if len(scene.movers) == 2:
            one, other = (mover.centres(times) for mover in scene.movers)
            need = 0.55 * sum(mover.start.diameter for mover in scene.movers)
            assert abs(one - other).max(1).min() > need


def test_each_class_has_a_look_of_its_own_and_stays_near_the_middle() -> None:
    assert [action.motion for action in CLASS_ACTIONS] == list(MOTIONS)
    assert len({action.subject for action in CLASS_ACTIONS}) == len(CLASS_ACTIONS)
    for number in range(60):
        scene, label = make_class_motion(2, number)
        (mover,) = scene.movers
        assert (scene.prompt.actions, mover.motion) == ((CLASS_ACTIONS[label],), MOTIONS[label])
        at = mover.centres(np.linspace(0, 1, 41))
        assert 0.34 <= mover.start.diameter <= 0.4
        assert np.ptp(at) == np.ptp(at[0]) or 0.36 <= np.ptp(at, axis=0).max() <= 0.53, mover
        assert abs(at[:, np.ptp(at, axis=0).argmin()] - 0.5).max() <= 0.03


def test_too_many_objects_and_too_few_frames_are_refused() -> None:
    crowd = parse_motion_caption(" and ".join(["a red circle moves left", "a blue circle moves up"]))
    assert len(place_motion(crowd, np.random.RandomState(0)).movers) == 2
    with pytest.raises(ValueError, match="frames: expected at least 8, got 7"):
        draw_motion(scenes()[0], 32, 7)


def test_clips_and_captions_stay_as_they_are() -> None:
    digest = hashlib.sha256()
    for number in range(30):
        scene = make_motion(0, number)
        digest.update(draw_motion(scene, 32, 8).tobytes())
        digest.update(scene.prompt.caption.encode())
    assert digest.hexdigest() == GOLDEN, "another clip or caption: trained models are judged on new ones"


def test_shards_hold_the_drawn_frames_exactly(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    indices = [write_shapes(f, samples=10, side=32, seed=4, frames=8, workers=1, progress=False) for f in folders]
    assert indices[0].digest == indices[1].digest and not indices[0].bad
    assert indices[0].frames is not None and indices[0].frames.tolist() == [8] * 10
    config = DataConfig(path=str(folders[0]), image_size=32, caption_dropout=0, frames=8)
    loader = make_loader(config, indices[0], seed=0, rank=0, world_size=1, global_batch=10, micro_batch=10, consumed=0)
    batch = next(iter(loader))
    for pixels, caption, key in zip(batch.pixels, batch.captions, batch.keys, strict=True):
        scene = make_motion(4, int(key))
        shown = rearrange(((pixels + 1) * 127.5).round(), "frames c h w -> frames h w c").numpy()
        assert (shown == draw_motion(scene, 32, 8)).all()
        assert caption == scene.prompt.caption


def test_command_writes_clips_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--samples", "3", "--workers", "1"]
    assert main(["data", "shapes", str(tmp_path / "clips"), "--video", "--frames", "8", *common]) == 0
    assert (tmp_path / "clips" / "index-frames.npy").exists()
    assert main(["data", "shapes", str(tmp_path / "classes"), "--classes", *common]) == 0
    assert (tmp_path / "classes" / "classes.json").exists()
    for options, fault in [
        (["--frames", "8"], "--frames 8: pictures have none; add --video"),
        (["--video", "--frames", "1"], "--frames 1: a clip has more"),
        (["--video", "--frames", "4"], "frames of a clip: expected an integer of at least 8, got 4"),
    ]:
        assert main(["data", "shapes", str(tmp_path / "no"), *options, *common]) == 64
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
