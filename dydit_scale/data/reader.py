"""Micro-batches from the shards of an index, in whatever process asks: bytes checked, bad samples substituted."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from isal.isal_zlib import crc32  # zlib's, some times faster: it is most of a large sample's cost
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.utils.data import Dataset

from dydit_scale.data.decode import BadSampleError, decode_caption, decode_fields, decode_image, image_tensor
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.position import SampleOrder
from dydit_scale.data.storage import open_shards
from dydit_scale.data.video import decode_clip, require_av
from dydit_scale.diffusion.randomness import keyed_seed

MAX_SUBSTITUTES = 100


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    positions: Int64[Tensor, " batch"]
    """In the training stream; what keys noise and timesteps."""
    pixels: Float32[Tensor, "batch *frames 3 height width"]
    """In [-1, 1]; for clips ``frames`` is those of the clip and then ``images_per_clip`` single pictures."""
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


class Failure(NamedTuple):
    """What stopped a reader, to be raised in the training process."""

    message: str
    trace: str


class _Sample(NamedTuple):
    number: int
    pixels: Tensor
    caption: str
    label: int
    key: str


class Reader(Dataset[Any]):
    """``reader[range of positions]`` is a micro-batch; copies of a reader in other processes give the same."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        image_size: int,
        caption_dropout: float,
        frames: int = 1,
        frame_stride: int = 1,
        images_per_clip: int = 0,
    ) -> None:
        self._index, self._seed, self._image_size = index, int(seed), image_size
        self._clip, self._images_per_clip = range(0, frames * frame_stride, frame_stride), images_per_clip
        self._dropped_below = int(caption_dropout * 2**63)
        self._order = SampleOrder([shard.count for shard in index.shards], self._seed)
        self._shards = open_shards(index)
        if frames > 1:
            _check_clips(index, self._clip[-1] + 1)
        if index.frames is not None:
            require_av()

    def __getitem__(self, positions: range) -> Read | Failure:
        try:
            return self._read_batch(positions)
        # torch would raise a worker's exception with its traceback as the message; this way the message stays.
        except (ValueError, OSError) as error:
            return Failure(str(error), traceback.format_exc())

    def close(self) -> None:
        """Close the shards that this process holds open."""
        self._shards.close()

    def _read_batch(self, positions: range) -> Read:
        bad: list[BadSample] = []
        rows = [self._read_position(position, bad) for position in positions]
        labels = torch.tensor([[sample.label for sample in row] for row in rows])  # [batch, 1 + images_per_clip]
        has_labels, has_pictures = self._index.labels is not None, self._images_per_clip > 0
        batch = Batch(
            torch.tensor(positions),
            torch.stack([_joined(row) for row in rows]),
            tuple(row[0].caption for row in rows),
            tuple(row[0].key for row in rows),
            labels=labels[:, 0] if has_labels else None,
            picture_captions=tuple(tuple(p.caption for p in row[1:]) for row in rows) if has_pictures else (),
            picture_labels=labels[:, 1:] if has_labels and has_pictures else None,
        )
        return Read(batch, tuple(bad))

    def _read_position(self, position: int, bad: list[BadSample]) -> list[_Sample]:
        """The position's sample and the single pictures beside it; bad ones met on the way are added to ``bad``."""
        place = self._order[position]
        first = self._read_good(int(self._index.starts[place.shard]) + place.row, self._clip, bad, position)
        row, others = [first], max(1, self._index.num_samples - 1)
        for picture in range(self._images_per_clip):
            step = 1 + keyed_seed(self._seed, "picture", position, picture) % others
            other = (first.number + step) % self._index.num_samples
            row.append(self._read_good(other, range(1), bad, position, picture))
        return row

    def _read_good(self, sample: int, clip: range, bad: list[BadSample], position: int, *picture: int) -> _Sample:
        """The sample or, if it is bad, the first good one in a fixed list; caption and label dropped by lot."""
        reasons: list[str] = []
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                found = self._read_sample(sample, clip, position, *picture)
            except BadSampleError as error:
                shard = self._index.shards[self._index.shard_of(sample)].name
                key = self._index.key(sample)
                bad.append(BadSample(position=position, sample=sample, shard=shard, key=key, reason=str(error)))
                reasons.append(str(bad[-1]))
                drawn = keyed_seed(self._seed, "substitute", position, *picture, attempt)
                sample = drawn % self._index.num_samples
            else:
                dropped = keyed_seed(self._seed, "caption", position, *picture) < self._dropped_below
                return found._replace(caption="", label=-1) if dropped else found
        raise ValueError(
            f"{self._index.place}: the sample at position {position} is bad and so are {MAX_SUBSTITUTES} substitutes; "
            f"first: {'; '.join(reasons[:3])}. Restore the shards, or index them again if they were replaced"
        )

    def _read_sample(self, sample: int, clip: range, *draw: int) -> _Sample:
        if sample in self._index.bad:
            raise BadSampleError(self._index.bad[sample])
        pixels = self._read_pixels(sample, clip, *draw)
        row, labels = self._index.samples[sample], self._index.labels
        caption = ""
        if row["caption_offset"]:
            data = self._read_part(sample, "caption")
            caption = (decode_fields(data).caption if row["caption_is_json"] else decode_caption(data)) or ""
        label = -1 if labels is None else int(labels[sample])
        return _Sample(sample, pixels, caption, label, self._index.key(sample))

    def _read_pixels(self, sample: int, clip: range, *draw: int) -> Tensor:
        """[frames, 3, side, side], or [3, side, side] for a single frame; a clip starts at a frame drawn by lot."""
        held = 0 if self._index.frames is None else int(self._index.frames[sample])
        if held == 0 and len(clip) == 1:
            return image_tensor(decode_image(self._read_part(sample, "image")), self._image_size)
        if held <= clip[-1]:
            kind = f"clip of {held} frames" if held else "a picture"
            raise BadSampleError(f"{kind}, expected at least {clip[-1] + 1} frames (data.frames, data.frame_stride)")
        start = keyed_seed(self._seed, "clip start", *draw) % (held - clip[-1])
        wanted = range(start, start + clip.stop, clip.step)
        frames = decode_clip(self._read_part(sample, "image"), wanted, self._image_size)
        return frames if len(clip) > 1 else frames[0]

    def _read_part(self, sample: int, part: str) -> bytes:
        row = self._index.samples[sample]
        size = int(row[f"{part}_bytes"])
        name = "video" if part == "image" and self._index.frames is not None and self._index.frames[sample] else part
        shard = self._index.shards[self._index.shard_of(sample)].name
        data = self._shards.read(shard, int(row[f"{part}_offset"]), size)
        if len(data) != size:
            raise BadSampleError(
                f"{name} has {len(data)} bytes, expected {size}: the shard was cut off since it was indexed"
            )
        if crc32(data) != int(row[f"{part}_crc"]):
            raise BadSampleError(f"{name} checksum (CRC32) differs from the index: its bytes changed since")
        return data


def _joined(row: list[_Sample]) -> Tensor:
    """A clip's frames and the single pictures after them, or a lone picture."""
    first, *pictures = [sample.pixels for sample in row]
    return torch.cat([first, torch.stack(pictures)]) if pictures else first


def _check_clips(index: ShardIndex, needed: int) -> None:
    longest = 0 if index.frames is None else int(index.frames.max())
    if longest < needed:
        held = f"the longest clip has {longest} frames" if longest else "there are pictures only"
        raise ValueError(
            f"{index.place}: {held}, but data.frames and data.frame_stride ask for clips of {needed} frames; "
            "lower them, or choose other shards"
        )
