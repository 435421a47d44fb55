"""What an index keeps of each sample: about twenty bytes that every reading looks at, the rest apart from them.

Files in a tar begin at multiples of its block, a caption lies beside its picture, and every field has the narrowest
integers that hold it in this index; so places are never too large, they only take more room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dydit_scale.data.tar import BLOCK

SAMPLE = np.dtype(
    [
        ("image_offset", "<i8"),
        ("image_bytes", "<i8"),
        ("image_crc", "<u4"),
        ("caption_offset", "<i8"),
        ("caption_bytes", "<i8"),
        ("caption_crc", "<u4"),
        ("caption_is_json", "u1"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("key_end", "<i8"),
    ]
)
"""A sample written out, as it is scanned and as the digest counts it. ``image_*`` is its picture or clip, all zero if
it has none; a ``caption_offset`` of 0 says that it has no caption. Of an encoded sample ``image_*`` are the tensors and
``caption_*`` is the entry."""

PLACES = ("image_block", "image_bytes", "image_crc", "caption_gap", "caption_bytes", "caption_crc", "caption_is_json")
"""The fields that are needed to read a sample. ``image_block`` is its offset in blocks; without a picture, one less
than the caption's. ``caption_gap`` is how many blocks the caption begins behind the picture's end or, negative, ends
before its start; 0 for none."""
SIZES = ("width", "height")

_ROWS = 1 << 16
"""Samples that are converted at a time."""


class Part(NamedTuple):
    """One file of a sample."""

    offset: int
    """In its shard; 0 if the sample has no such file."""
    bytes: int
    crc: int
    """CRC32 of the bytes."""


class Record(NamedTuple):
    """Where a sample's files lie."""

    image: Part
    """Picture or clip; of an encoded sample its tensors."""
    caption: Part
    """Of an encoded sample its entry."""
    caption_is_json: bool


class Columns(NamedTuple):
    """The arrays that an index keeps, all of them [samples]."""

    places: np.ndarray
    """Records of ``PLACES``, in integers of any width."""
    sizes: np.ndarray
    """Records of ``SIZES``, likewise."""
    key_ends: np.ndarray


def unpack_record(place: np.void) -> Record:
    """One of ``Columns.places``."""
    block, size, crc, gap, caption_size, caption_crc, is_json = place.item()
    caption = block + (_blocks(size) + gap if gap > 0 else gap - _blocks(caption_size)) if gap else 0
    return Record(
        Part(block * BLOCK if size else 0, size, crc), Part(caption * BLOCK, caption_size, caption_crc), bool(is_json)
    )


def pack(samples: np.ndarray, make: Callable[[int, np.dtype], np.ndarray] = np.empty) -> Columns:
    """``samples`` (records of ``SAMPLE``) as an index keeps them, in arrays that ``make(length, dtype)`` gives."""
    parts = [slice(start, start + _ROWS) for start in range(0, len(samples), _ROWS)]
    ranges: dict[str, tuple[int, int]] = {}
    for part in parts:
        for name, values in _fields(samples[part]).items():
            low, high = ranges.get(name, (0, 0))
            ranges[name] = (min(low, int(values.min())), max(high, int(values.max())))
    columns = Columns(
        make(len(samples), _narrowest(PLACES, ranges)),
        make(len(samples), _narrowest(SIZES, ranges)),
        make(len(samples), _narrowest(("key_end",), ranges)["key_end"]),
    )
    for part in parts:
        fields = _fields(samples[part])
        for name in PLACES:
            columns.places[name][part] = fields[name]
        for name in SIZES:
            columns.sizes[name][part] = fields[name]
        columns.key_ends[part] = fields["key_end"]
    return columns


def unpack(columns: Columns) -> np.ndarray:
    """What ``pack`` was given."""
    places = {name: columns.places[name].astype(np.int64) for name in PLACES}
    block, gap, size, caption_size = (places[n] for n in ("image_block", "caption_gap", "image_bytes", "caption_bytes"))
    caption = block + np.where(gap > 0, _blocks(size) + gap, gap - _blocks(caption_size))
    samples = np.zeros(len(block), SAMPLE)
    samples["image_offset"] = np.where(size > 0, block, 0) * BLOCK
    samples["caption_offset"] = np.where(gap != 0, caption, 0) * BLOCK
    for name in ("image_bytes", "image_crc", "caption_bytes", "caption_crc", "caption_is_json"):
        samples[name] = places[name]
    for name in SIZES:
        samples[name] = columns.sizes[name]
    samples["key_end"] = columns.key_ends
    return samples


def unpacked(columns: Columns) -> Iterator[np.ndarray]:
    """``unpack`` in parts, of which each needs little memory."""
    for start in range(0, len(columns.places), _ROWS):
        yield unpack(Columns(*(array[start : start + _ROWS] for array in columns)))


def _fields(samples: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of ``Columns``, in 64 bits."""
    block, caption = samples["image_offset"] // BLOCK, samples["caption_offset"] // BLOCK
    block = np.where(block > 0, block, np.maximum(0, caption - 1))
    behind = caption - (block + _blocks(samples["image_bytes"]))
    before = caption + _blocks(samples["caption_bytes"]) - block
    gap = np.where(caption > block, behind, before) * (caption > 0)
    kept = {name: samples[name] for name in SAMPLE.names or () if not name.endswith("_offset")}
    return {"image_block": block, "caption_gap": gap, **kept}


def _blocks(size: Any) -> Any:
    """How many blocks hold so many bytes; of one number or an array."""
    return -(-size // BLOCK)


def _narrowest(names: Iterable[str], ranges: dict[str, tuple[int, int]]) -> np.dtype:
    def fits(kind: str, low: int, high: int) -> bool:
        return bool(np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)

    widths = {n: next(k for k in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8") if fits(k, *ranges[n])) for n in names}
    return np.dtype(list(widths.items()))
