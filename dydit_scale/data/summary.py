"""What a data set holds, from its index and a bounded share of its bytes: seconds for ten million samples."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from dydit_scale.data.buckets import Bucket, bucket_counts, bucket_numbers, config_buckets
from dydit_scale.data.decode import BadSampleError, decode_caption, decode_fields, decode_image
from dydit_scale.data.encoded import decode_entry
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.loader import DataConfig
from dydit_scale.data.records import SIZES, Part
from dydit_scale.data.storage import ShardFiles
from dydit_scale.data.video import first_frame
from dydit_scale.diffusion.randomness import keyed_seed

CAPTIONS_READ = 4096
EXAMPLES = 24
LARGEST_EXAMPLE = 512
REPEATED = 5


class Example(NamedTuple):
    """A sample that is shown."""

    name: str
    picture: np.ndarray
    """uint8 [height, width, 3], no side over ``LARGEST_EXAMPLE``; of a clip the first frame."""
    caption: str | None
    label: int | None
    frames: int
    """0 for a picture."""
    size: tuple[int, int]
    """Width and height in pixels."""


class Repeated(NamedTuple):
    """A caption that several samples share."""

    caption: str
    samples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
    """What can be said of the captions."""

    present: int
    """Good samples that have one."""
    read: int
    """Captions that were read: all, or ``CAPTIONS_READ`` drawn evenly."""
    characters: np.ndarray
    """[read]"""
    words: np.ndarray
    """[read], parts between white space."""
    empty: int
    """Of those read, how many hold white space or nothing."""
    compared: int
    """Captions in a ``.txt``: these are compared with one another, all of them, by length and CRC32."""
    distinct: int
    """How many different ones there are among these."""
    repeated: tuple[Repeated, ...]
    """The most frequent of those that come more than once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """A data set at a glance."""

    index: ShardIndex
    good: np.ndarray
    """bool [num_samples]"""
    captions: Captions
    examples: tuple[Example, ...]
    reasons: tuple[tuple[str, int, str], ...]
    """Why samples are unusable, numbers left out; how many; the name of one. Most frequent first."""
    changed: tuple[str, ...]
    """Samples that could not be read for this summary although they could when they were indexed, and why."""

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.index.shards)

    @property
    def clips(self) -> np.ndarray | None:
        """Frames of the good clips; None without clips."""
        return None if self.index.frames is None else self.index.frames[self.good & (self.index.frames > 0)]

    def column(self, name: str) -> np.ndarray:
        """Width, height or a field of the places of the good samples."""
        columns = self.index.columns
        held: np.ndarray = (columns.sizes if name in SIZES else columns.places)[name]
        return held[self.good].astype(np.int64)


class BucketUse(NamedTuple):
    """What a recipe makes of the samples that fall into one of its pixel sizes."""

    bucket: Bucket
    samples: int
    enlarged: int
    """Samples that are smaller than the bucket on some side."""
    kept: float
    """Mean share of a picture's area that is left after cropping; NaN without samples."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a recipe makes of the samples."""

    name: str
    buckets: tuple[BucketUse, ...]
    short: int
    """Good samples that a recipe for clips must replace by others: pictures, and clips with too few frames."""


def use_of(summary: Summary, name: str, config: DataConfig) -> Use:
    """How the good samples fall into the pixel sizes of ``config``, whose folder does not matter."""
    buckets = config_buckets(config)
    numbers = bucket_numbers(summary.index, buckets)
    numbers = np.zeros(summary.index.num_samples, np.int64) if numbers is None else numbers
    numbers, width, height = numbers[summary.good], summary.column("width"), summary.column("height")
    sizes = np.array(buckets)
    enlarged = (height < sizes[numbers, 0]) | (width < sizes[numbers, 1])
    stretch = width / height * (sizes[:, 0] / sizes[:, 1])[numbers]
    kept = np.minimum(stretch, 1 / stretch)
    counts = bucket_counts(summary.index, config)
    with np.errstate(invalid="ignore"):
        shares = np.bincount(numbers, kept, len(buckets)) / np.bincount(numbers, minlength=len(buckets))
    enlarged_in = np.bincount(numbers[enlarged], minlength=len(buckets))
    uses = zip(buckets, enlarged_in.tolist(), shares.tolist(), strict=True)
    return Use(
        name=name,
        buckets=tuple(BucketUse(bucket, counts[bucket], small, share) for bucket, small, share in uses),
        short=_short(summary, config) if config.frames > 1 else 0,
    )


def _short(summary: Summary, config: DataConfig) -> int:
    """Good samples that hold no clip as long as asked for."""
    last = config.frames - 1
    if config.fps is not None:
        lasts, needed = summary.index.seconds, last / config.fps
    else:
        lasts, needed = summary.index.frames, float(last * config.frame_stride)
    return int(summary.good.sum()) if lasts is None else int((lasts[summary.good] <= needed).sum())


def summarize_index(index: ShardIndex) -> Summary:
    """Look at all of an index, and read up to ``CAPTIONS_READ`` captions and ``EXAMPLES`` pictures, always the same."""
    good = index.good
    parts = _Parts(index)
    try:
        captions, examples = _captions(index, good, parts), _examples(index, good, parts)
    finally:
        parts.close()
    reasons = _reasons(index)
    return Summary(
        index=index, good=good, captions=captions, examples=examples, reasons=reasons, changed=tuple(parts.changed)
    )


class _Parts:
    """Reads pictures and captions, and notes what has changed since it was indexed."""

    def __init__(self, index: ShardIndex) -> None:
        self._index, self._files = index, ShardFiles(index.folder)
        self.changed: list[str] = []

    def read(self, sample: int, name: str, part: Part) -> bytes | None:
        index = self._index
        shard = index.shards[index.shard_of(sample)].name
        try:
            data = bytearray(part.bytes)
            del data[self._files.read(shard, part.offset, memoryview(data)) :]
        except (ValueError, OSError) as error:
            self.changed.append(f"{index.name(sample)}: {error}")
            return None
        if zlib.crc32(data) == part.crc:
            return bytes(data)
        self.changed.append(f"{index.name(sample)}: {name} checksum (CRC32) differs from the index")
        return None

    def caption(self, sample: int) -> str | None:
        """The caption; None if there is none or it has changed."""
        place = self._index.record(sample)
        data = self.read(sample, "caption", place.caption) if place.caption.offset else None
        if data is None:
            return None
        if self._index.encoding is not None:
            return next(iter(decode_entry(data).captions), None)
        return next(iter(decode_fields(data).captions), None) if place.caption_is_json else decode_caption(data)

    def picture(self, sample: int) -> Image.Image | None:
        """The picture or the first frame; None if it has changed."""
        data = self.read(sample, "image", self._index.record(sample).image)
        clip = self._index.frames is not None and self._index.frames[sample] > 0
        if data is None:
            return None
        try:
            image = first_frame(data) if clip else decode_image(data)
        except BadSampleError as error:
            self.changed.append(f"{self._index.name(sample)}: {error}")
            return None
        image.thumbnail((LARGEST_EXAMPLE, LARGEST_EXAMPLE), Image.Resampling.LANCZOS)
        return image

    def close(self) -> None:
        self._files.close()


def _captions(index: ShardIndex, good: np.ndarray, parts: _Parts) -> Captions:
    with_caption = np.flatnonzero(good & index.has_caption)
    chosen = with_caption
    if len(chosen) > CAPTIONS_READ:
        chosen = chosen[np.linspace(0, len(chosen) - 1, CAPTIONS_READ).astype(np.int64)]
    texts = [text for sample in chosen.tolist() if (text := parts.caption(sample)) is not None]
    in_text = with_caption[index.columns.places["caption_is_json"][with_caption] == 0]
    distinct, repeated = _repeated(index, in_text, parts)
    return Captions(
        present=len(with_caption),
        read=len(texts),
        characters=np.array([len(text) for text in texts], np.int64),
        words=np.array([len(text.split()) for text in texts], np.int64),
        empty=sum(not text for text in texts),
        compared=len(in_text),
        distinct=distinct,
        repeated=repeated,
    )


def _repeated(index: ShardIndex, samples: np.ndarray, parts: _Parts) -> tuple[int, tuple[Repeated, ...]]:
    """How many different captions there are, and the most frequent ones."""
    places = index.columns.places
    lengths = places["caption_bytes"][samples].astype(np.uint64)
    marks = (lengths << np.uint64(32)) | places["caption_crc"][samples].astype(np.uint64)
    _, first, counts = np.unique(marks, return_index=True, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:REPEATED]
    found = [(parts.caption(int(samples[first[at]])), int(counts[at])) for at in most if counts[at] > 1]
    return len(counts), tuple(Repeated(caption, count) for caption, count in found if caption is not None)


def _examples(index: ShardIndex, good: np.ndarray, parts: _Parts) -> tuple[Example, ...]:
    if index.encoding is not None:
        return ()  # there are no pictures to show
    found = []
    for sample in _drawn(np.flatnonzero(good), EXAMPLES):
        image = parts.picture(sample)
        if image is None:
            continue
        label = -1 if index.labels is None else int(index.labels[sample])
        width, height = index.columns.sizes[sample].item()
        found.append(
            Example(
                name=index.name(sample),
                picture=np.asarray(image),
                caption=parts.caption(sample),
                label=label if label >= 0 else None,
                frames=0 if index.frames is None else int(index.frames[sample]),
                size=(width, height),
            )
        )
    return tuple(found)


def _drawn(samples: np.ndarray, count: int) -> list[int]:
    """That many of ``samples`` by lot, each once, in their order."""
    if len(samples) <= count:
        return list(samples.tolist())
    drawn: set[int] = set()
    attempt = 0
    while len(drawn) < count:
        drawn.add(keyed_seed(0, "example", attempt) % len(samples))
        attempt += 1
    return [int(samples[place]) for place in sorted(drawn)]


def _reasons(index: ShardIndex) -> tuple[tuple[str, int, str], ...]:
    kinds = {sample: re.sub(r"(?<![\w-])\d+(?!\w)", "…", reason)[:160] for sample, reason in index.bad.items()}
    names: dict[str, str] = {}
    for sample, kind in kinds.items():
        names.setdefault(kind, index.name(sample))
    return tuple((kind, count, names[kind]) for kind, count in Counter(kinds.values()).most_common())
