"""The built-in data: draws captioned or labelled scenes and clips of coloured shapes and packs them into shards."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from dydit_scale.data.processes import default_workers
from dydit_scale.data.shapes.language import CLASSES
from dydit_scale.data.shapes.motion import MIN_FRAMES, MOTIONS, MotionScene, draw_motion, make_class_motion, make_motion
from dydit_scale.data.shapes.scene import Scene, draw, make_class_scene, make_scene
from dydit_scale.data.shards import ShardIndex, write_shards
from dydit_scale.data.video import encode_mp4, require_av

MIN_SIDE = 16
"""Pixels below which the small shapes cannot be told apart."""
CLASSES_FILE = "classes.json"
"""Beside labelled shards: the list of the classes' captions; the one at place n is that of label n."""
FPS = 8
"""Frames a second of the clips."""
_CHUNK = 128
"""Scenes that a process draws at a time."""

Sample = dict[str, bytes | str]


def write_shapes(
    out: Path,
    *,
    samples: int,
    side: int = 32,
    seed: int = 0,
    classes: bool = False,
    frames: int = 1,
    samples_per_shard: int = 2048,
    workers: int | None = None,
    progress: bool = True,
) -> ShardIndex:
    """Draw scenes 0 to ``samples`` - 1 of ``seed`` and write them to the folder ``out`` as shards with an index.

    A sample is a PNG of ``side`` x ``side`` pixels, its caption (txt) and the scene (json: caption, category, objects).
    With more than one of ``frames`` it is a clip of moving shapes in place of the PNG: an MP4 that decodes to the drawn
    frames exactly, for which PyAV is needed. With ``classes`` it shows one object, and has the number of its class too
    (cls): one of 48 colours and shapes, near the middle of a picture, or one of 7 motions of a clip. ``classes.json``
    lists their names.
    The same arguments give the same tars, byte for byte, for any number of ``workers`` (processes that draw; None for
    one on each core, at most 8); compression may differ between versions of Pillow and PyAV.
    Raises ValueError, before anything is drawn or written, for numbers out of range, and if ``out`` is a file or holds
    shards already.
    """
    out = Path(out)
    _check("samples", samples, 1)
    _check("side", side, MIN_SIDE)
    _check("seed", seed, 0)
    _check("samples_per_shard", samples_per_shard, 1)
    _check("frames", frames, 1)
    workers = default_workers() if workers is None else workers
    _check("workers", workers, 1)
    if frames > 1:
        _check_clip(frames, side)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder or a new path, got the file {out}; choose another path")
    kinds: dict[tuple[bool, bool], Callable[..., Sample]] = {
        (False, False): _captioned,
        (False, True): _labelled,
        (True, False): partial(_moving, frames=frames),
        (True, True): partial(_moving_labelled, frames=frames),
    }
    draw_one = kinds[frames > 1, classes]
    digits = max(6, len(str(samples - 1)))
    drawn = _samples(samples, partial(_named, draw_one, digits=digits, side=side, seed=seed), workers)
    index = write_shards(drawn, out, samples_per_shard=samples_per_shard, progress=progress)
    if classes:
        names = list(MOTIONS) if frames > 1 else [subject.phrase() for subject in CLASSES]
        (out / CLASSES_FILE).write_text(json.dumps(names, indent=1) + "\n")
    return index


def _check_clip(frames: int, side: int) -> None:
    _check("frames of a clip", frames, MIN_FRAMES)
    if side % 2:
        raise ValueError(f"side: expected an even number of pixels for clips, got {side}")
    require_av()


def _check(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _samples(samples: int, draw_one: Callable[[int], Sample], workers: int) -> Iterator[Sample]:
    if workers == 1 or samples <= _CHUNK:
        yield from map(draw_one, range(samples))
        return
    with multiprocessing.Pool(workers) as pool:
        yield from pool.imap(draw_one, range(samples), chunksize=_CHUNK)


def _named(draw_one: Callable[..., Sample], number: int, digits: int, side: int, seed: int) -> Sample:
    return {"__key__": f"{number:0{digits}d}"} | draw_one(number, side=side, seed=seed)


def _captioned(number: int, side: int, seed: int) -> Sample:
    return _picture(make_scene(seed, number), side)


def _labelled(number: int, side: int, seed: int) -> Sample:
    scene, label = make_class_scene(seed, number)
    return _picture(scene, side) | {"cls": str(label)}


def _picture(scene: Scene, side: int) -> Sample:
    png = io.BytesIO()
    Image.fromarray(draw(scene, side)).save(png, "PNG")
    return {"png": png.getvalue(), "txt": scene.prompt.caption, "json": _meaning(scene.as_dict())}


def _moving(number: int, side: int, seed: int, frames: int) -> Sample:
    return _clip(make_motion(seed, number), side, frames)


def _moving_labelled(number: int, side: int, seed: int, frames: int) -> Sample:
    scene, label = make_class_motion(seed, number)
    return _clip(scene, side, frames) | {"cls": str(label)}


def _clip(scene: MotionScene, side: int, frames: int) -> Sample:
    video = encode_mp4(draw_motion(scene, side, frames), FPS, lossless=True)
    return {"mp4": video, "txt": scene.prompt.caption, "json": _meaning(scene.as_dict())}


def _meaning(scene: dict) -> bytes:
    return json.dumps(scene, sort_keys=True).encode()
