"""Micro-batches from the shards of an index, in whatever process asks: bytes checked, bad samples substituted."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dydit_scale.data.buckets import Bucket, bucket_numbers, config_buckets
from dydit_scale.data.config import DataConfig
from dydit_scale.data.dataset import DataSet
from dydit_scale.data.decode import (
    BadSampleError,
    decode_caption,
    decode_fields,
    decode_image,
    image_tensor,
    pixel_values,
)
from dydit_scale.data.encoded import EncodedBatch, decode_entry, decode_tensors, join_texts
from dydit_scale.data.files import Files, SampleFiles
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.mixture import Mixture
from dydit_scale.data.position import Place, SampleOrder
from dydit_scale.data.storage import CacheUse
from dydit_scale.data.video import decode_clip, decode_clip_at, require_av
from dydit_scale.diffusion.randomness import keyed_seed

MAX_SUBSTITUTES = 100
SUBSTITUTES_OF_BUCKET = 50
"""The first so many come from the bucket of the bad sample, the others from all samples, cropped as it asks."""


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    positions: Int64[Tensor, " batch"]
    """In the training stream; what keys noise and timesteps."""
    pixels: Float32[Tensor, "batch *frames 3 height width"] | None
    """In [-1, 1]; for clips ``frames`` is those of the clip and then ``images_per_clip`` single pictures. None where
    ``encoded`` stands for them."""
    captions: tuple[str, ...]
    """"" where the caption was dropped."""
    keys: tuple[str, ...]
    """Of the samples that were read; a bad sample's substitute is named here."""
    labels: Int64[Tensor, " batch"] | None = None
    """-1 where the label was dropped with the caption or the sample has none; None if no sample of the data has."""
    picture_captions: tuple[tuple[str, ...], ...] = ()
    """[batch][images_per_clip], of the single pictures beside clips; each is dropped on its own."""
    picture_labels: Int64[Tensor, "batch images_per_clip"] | None = None
    """Of the single pictures beside clips; None if there are none or no sample of the data has a label."""
    source: int = 0
    """The number of the source that the samples come from."""
    encoded: EncodedBatch | None = None
    """Latents and embeddings, of data that were encoded before."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be used at a position."""

    position: int
    """Where it was due."""
    sample: int
    """Its number in the index; -1 in a stream."""
    shard: str
    """Its shard's file name."""
    key: str
    """Its key."""
    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.shard} sample {self.key!r}: {self.reason}"


class Read(NamedTuple):
    """A micro-batch and the bad samples that were met on the way to it."""

    batch: Batch
    bad: tuple[BadSample, ...]
    cache: CacheUse = CacheUse()


class Failure(NamedTuple):
    """What stopped a reader, to be raised in the training process."""

    message: str
    trace: str


class Source(NamedTuple):
    """A sample as it is encoded: all of its frames, nothing drawn by lot."""

    pixels: UInt8[Tensor, "*frames 3 height width"]
    """Before ``scale_values``: long clips are held and handed on in a quarter of the bytes."""
    captions: Sequence[str]
    label: int
    """-1 for none."""
    media: bytes
    """The file of the picture or clip."""
    caption: bytes
    """The file that holds the caption; empty if there is none."""


class _Sample(NamedTuple):
    number: int
    pixels: Tensor  # or an encoded sample's moments
    caption: str
    label: int
    key: str
    text: dict[str, Tensor]  # of an encoded sample's caption


class Reader(Dataset[Any]):
    """``reader[range of positions]`` is a micro-batch; copies of a reader in other processes give the same."""

    def __init__(self, config: DataConfig, data: DataSet, *, seed: int) -> None:
        self._mixture = Mixture(config.weights, config.bucket_batch, seed)
        self._sources = []
        for source, (own, index) in enumerate(zip(config.split(), data.indexes, strict=True)):
            order_seed = keyed_seed(seed, "source", source) if len(data.indexes) > 1 else seed
            self._sources.append(SourceReader(own, index, source=source, seed=seed, order_seed=order_seed))

    def __getitem__(self, positions: range) -> Read | Failure:
        draw = self._mixture[positions.start]
        try:
            source = self._sources[draw.source]
            return source.read(positions, draw.position)._replace(cache=source.take_use())
        # torch would raise a worker's exception with its traceback as the message; this way the message stays.
        except (ValueError, OSError) as error:
            return Failure(str(error), traceback.format_exc())

    def close(self) -> None:
        """Close the shards that this process holds open."""
        for source in self._sources:
            source.close()


class SourceReader:
    """Micro-batches of one source."""

    def __init__(self, config: DataConfig, index: ShardIndex, *, source: int, seed: int, order_seed: int) -> None:
        self._index, self._source, self._seed = index, source, int(seed)
        self._clip = range(0, config.frames * config.frame_stride, config.frame_stride)
        self._fps, self._images_per_clip = config.fps, config.images_per_clip
        self._dropped_below = int(config.caption_dropout * 2**63)
        self._sizes = config_buckets(config)
        buckets = bucket_numbers(index, self._sizes)
        counts = [shard.count for shard in index.shards]
        self._order = SampleOrder(counts, order_seed, buckets=buckets, unit=config.bucket_batch)
        self._files = SampleFiles(index)
        if config.frames > 1:
            check_times(config, index)
            _check_clips(index, self._clip[-1] + 1, config.fps)
        if index.frames is not None and index.encoding is None:
            require_av()

    def close(self) -> None:
        self._files.close()

    def take_use(self) -> CacheUse:
        """What was opened since the last call."""
        return self._files.take_use()

    def read(self, positions: range, first: int) -> Read:
        """The samples from place ``first`` of the source's own order on, at ``positions`` of the training stream."""
        bad: list[BadSample] = []
        self._files.forget()  # the tensors below are stacked, which copies them
        places = self._order.places(range(first, first + len(positions)))
        rows = [self._read_position(*of, bad) for of in zip(positions, places, strict=True)]
        labels = torch.tensor([[sample.label for sample in row] for row in rows])  # [batch, 1 + images_per_clip]
        has_labels, has_pictures = self._index.labels is not None, self._images_per_clip > 0
        pixels = torch.stack([_joined(row) for row in rows])
        texts = [sample.text for row in rows for sample in row]
        encoded = None if self._index.encoding is None else EncodedBatch(pixels, *join_texts(texts))
        batch = Batch(
            torch.tensor(positions),
            pixels if encoded is None else None,
            tuple(row[0].caption for row in rows),
            tuple(row[0].key for row in rows),
            labels=labels[:, 0] if has_labels else None,
            picture_captions=tuple(tuple(p.caption for p in row[1:]) for row in rows) if has_pictures else (),
            picture_labels=labels[:, 1:] if has_labels and has_pictures else None,
            source=self._source,
            encoded=encoded,
        )
        return Read(batch, tuple(bad))

    def _read_position(self, position: int, place: Place, bad: list[BadSample]) -> list[_Sample]:
        """The sample due at a position and the single pictures beside it; bad ones on the way are added to ``bad``."""
        sample = self._index.starts[place.shard] + place.row
        bucket = self._order.bucket_of(sample)
        first = self._read_good(sample, bucket, self._clip, bad, position)
        row, others = [first], max(1, self._index.num_samples - 1)
        for picture in range(self._images_per_clip):
            step = 1 + keyed_seed(self._seed, "picture", position, picture) % others
            other = (first.number + step) % self._index.num_samples
            row.append(self._read_good(other, bucket, range(1), bad, position, picture))
        return row

    def _read_good(
        self, sample: int, bucket: int, clip: range, bad: list[BadSample], position: int, *picture: int
    ) -> _Sample:
        """The sample in the bucket's size or, if it is bad, the first good one in a fixed list; caption and label
        dropped by lot."""
        reasons: list[str] = []
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                found = self._read_sample(sample, self._sizes[bucket], clip, position, *picture)
            except BadSampleError as error:
                shard = self._index.shards[self._index.shard_of(sample)].name
                key = self._index.key(sample)
                bad.append(BadSample(position=position, sample=sample, shard=shard, key=key, reason=str(error)))
                reasons.append(str(bad[-1]))
                drawn = keyed_seed(self._seed, "substitute", position, *picture, attempt)
                own = attempt < SUBSTITUTES_OF_BUCKET or self._index.encoding is not None  # latents are not cropped
                sample = self._order.sample_of(bucket, drawn) if own else drawn % self._index.num_samples
            else:
                dropped = keyed_seed(self._seed, "caption", position, *picture) < self._dropped_below
                return found._replace(caption="", label=-1) if dropped else found
        raise ValueError(
            f"{self._index.place}: the sample at position {position} is bad and so are {MAX_SUBSTITUTES} substitutes; "
            f"first: {'; '.join(reasons[:3])}. Restore the shards, or index them again if they were replaced"
        )

    def _read_sample(self, sample: int, size: Bucket, clip: range, *draw: int) -> _Sample:
        if sample in self._index.bad:
            raise BadSampleError(self._index.bad[sample])
        frames = self._choose_frames(sample, clip, *draw)
        timed = self._fps is not None and len(clip) > 1
        times = self._choose_times(sample, self._fps or 1, len(clip), *draw) if timed else []
        files = self._files.read(sample)
        captions: Sequence[str]
        texts: list[dict[str, Tensor]] = []
        if self._index.encoding is not None:
            entry = decode_entry(bytes(files.caption or b""))
            if (entry.height, entry.width) != size:
                raise BadSampleError(
                    f"encoded at {entry.height} x {entry.width} pixels, the batch has {size.height} x {size.width}"
                )
            moments, texts = decode_tensors(files.image, entry, self._index.encoding)
            captions, pixels = entry.captions, moments[frames.start : frames.stop : frames.step] if frames else moments
        else:
            media = bytes(files.image)
            pixels = decode_clip_at(media, times, *size) if timed else _decode(media, frames, size)
            captions = _captions(files)
        choice = keyed_seed(self._seed, "caption choice", *draw) % len(captions) if len(captions) > 1 else 0
        caption, text = captions[choice] if captions else "", texts[choice] if texts else {}
        one = pixels[0] if len(frames) == 1 else pixels
        return _Sample(sample, one, caption, self._label(sample), self._index.key(sample), text)

    def read_source(self, sample: int) -> Source:
        """A whole sample, to be encoded. Raises BadSampleError."""
        if sample in self._index.bad:
            raise BadSampleError(self._index.bad[sample])
        self._files.forget()
        files = self._files.read(sample)
        media, caption = bytes(files.image), bytes(files.caption or b"")
        pixels = _decode(media, range(self._frames_of(sample)), self._sizes[self._order.bucket_of(sample)])
        return Source(pixel_values(pixels), _captions(files), self._label(sample), media, caption)

    def _label(self, sample: int) -> int:
        return -1 if self._index.labels is None else int(self._index.labels[sample])

    def _frames_of(self, sample: int) -> int:
        return 0 if self._index.frames is None else int(self._index.frames[sample])

    def _choose_frames(self, sample: int, clip: range, *draw: int) -> range:
        """Which frames to take, from one drawn by lot on; none of a picture, or where their times choose them."""
        held = self._frames_of(sample)
        if (held == 0 and len(clip) == 1) or (self._fps is not None and len(clip) > 1):
            return range(0)
        if held <= clip[-1]:
            kind = f"clip of {held} frames" if held else "a picture"
            raise BadSampleError(f"{kind}, expected at least {clip[-1] + 1} frames (data.frames, data.frame_stride)")
        start = keyed_seed(self._seed, "clip start", *draw) % (held - clip[-1])
        return range(start, start + clip.stop, clip.step)

    def _choose_times(self, sample: int, fps: float, count: int, *draw: int) -> list[float]:
        """``count`` times in seconds, ``fps`` a second from one drawn by lot on."""
        assert self._index.seconds is not None, "an index without durations passed the check"
        lasts, span = float(self._index.seconds[sample]), (count - 1) / fps
        if lasts <= span:
            clip = self._frames_of(sample)
            kind = f"clip of {lasts:g} s" if lasts else "clip whose frames' times do not rise" if clip else "a picture"
            raise BadSampleError(f"{kind}, expected more than {span:g} s (data.frames, data.fps)")
        start = (lasts - span) * keyed_seed(self._seed, "clip start", *draw) / 2**63
        return [start + span * frame / (count - 1) for frame in range(count)]


def _captions(files: Files) -> Sequence[str]:
    """Of a picture or clip."""
    if files.caption is None:
        return ()
    data = bytes(files.caption)
    return decode_fields(data).captions if files.caption_is_json else (decode_caption(data),)


def _decode(media: bytes, frames: range, size: Bucket) -> Tensor:
    """The given frames of a clip [frames, 3, height, width], or without any a picture [3, height, width]."""
    if frames:
        return decode_clip(media, frames, size.height, size.width)
    return image_tensor(decode_image(media), size.height, size.width)


def _joined(row: list[_Sample]) -> Tensor:
    """A clip's frames and the single pictures after them, or a lone picture."""
    first, *pictures = [sample.pixels for sample in row]
    return torch.cat([first, torch.stack(pictures)]) if pictures else first


def check_times(config: DataConfig, index: ShardIndex) -> None:
    """ValueError if frames are to be taken by their times from clips that were encoded without."""
    if index.encoding is not None and config.fps is not None and config.frames > 1:
        raise ValueError(f"{index.place}: encoded clips hold no times for data.fps; take data.frame_stride")


def _check_clips(index: ShardIndex, needed: int, fps: float | None) -> None:
    """ValueError if no clip has ``needed`` frames or, with ``fps``, lasts longer than they are apart."""
    if fps is not None and index.frames is not None and index.seconds is None:
        raise ValueError(
            f"{index.place}: data.fps needs the clips' durations, which this index does not hold; "
            f"run `dydit data index {index.place}` (which makes it another data set)"
        )
    if index.frames is None:
        fault = "there are pictures only"
    elif fps is None and int(index.frames.max()) < needed:
        fault = f"the longest clip has {int(index.frames.max())} frames"
    elif fps is not None and index.seconds is not None and float(index.seconds.max()) <= (needed - 1) / fps:
        fault = f"the longest clip lasts {float(index.seconds.max()):g} s"
    else:
        return
    asked = (
        f"data.frames and data.frame_stride ask for clips of {needed} frames"
        if fps is None
        else f"data.frames and data.fps ask for clips of more than {(needed - 1) / fps:g} s"
    )
    raise ValueError(f"{index.place}: {fault}, but {asked}; change them, or choose other shards")
