"""The built-in data set: draws captioned scenes of coloured shapes and packs them into shards."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from dydit_scale.data.shapes.scene import draw, make_scene
from dydit_scale.data.shards import ShardIndex, write_shards

MIN_SIDE = 16
"""Pixels below which the small shapes cannot be told apart."""
_CHUNK = 128
"""Scenes that a process draws at a time."""

Sample = dict[str, bytes | str]


def write_shapes(
    out: Path,
    *,
    samples: int,
    side: int = 32,
    seed: int = 0,
    samples_per_shard: int = 2048,
    workers: int | None = None,
    progress: bool = True,
) -> ShardIndex:
    """Draw scenes 0 to ``samples`` - 1 of ``seed`` and write them to the folder ``out`` as shards with an index.

    A sample is a PNG of ``side`` x ``side`` pixels, its caption (txt) and the scene (json: caption, category, objects).
    The same arguments give the same tars, byte for byte, for any number of ``workers`` (processes that draw; None for
    one on each core, at most 8); the PNGs' compression may differ between Pillow versions.
    Raises ValueError, before anything is drawn or written, for numbers out of range, and if ``out`` is a file or holds
    shards already.
    """
    out = Path(out)
    _check("samples", samples, 1)
    _check("side", side, MIN_SIDE)
    _check("seed", seed, 0)
    _check("samples_per_shard", samples_per_shard, 1)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    _check("workers", workers, 1)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder or a new path, got the file {out}; choose another path")
    digits = max(6, len(str(samples - 1)))
    scenes = _samples(samples, partial(_sample, side=side, seed=seed, digits=digits), workers)
    return write_shards(scenes, out, samples_per_shard=samples_per_shard, progress=progress)


def _check(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _samples(samples: int, draw_one: Callable[[int], Sample], workers: int) -> Iterator[Sample]:
    if workers == 1 or samples <= _CHUNK:
        yield from map(draw_one, range(samples))
        return
    with multiprocessing.Pool(workers) as pool:
        yield from pool.imap(draw_one, range(samples), chunksize=_CHUNK)


def _sample(number: int, side: int, seed: int, digits: int) -> Sample:
    scene = make_scene(seed, number)
    png = io.BytesIO()
    Image.fromarray(draw(scene, side)).save(png, "PNG")
    meaning = json.dumps(scene.as_dict(), sort_keys=True)
    return {
        "__key__": f"{number:0{digits}d}",
        "png": png.getvalue(),
        "txt": scene.prompt.caption,
        "json": meaning.encode(),
    }
