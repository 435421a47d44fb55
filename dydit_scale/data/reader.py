"""Micro-batches from the shards of an index, in whatever process asks: bytes checked, bad samples substituted."""

from __future__ import annotations

import os
import traceback
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.utils.data import Dataset

from dydit_scale.data.decode import BadSampleError, decode_caption, decode_image, image_tensor
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.position import SampleOrder
from dydit_scale.data.tar import read_at
from dydit_scale.diffusion.randomness import keyed_seed

MAX_OPEN_SHARDS = 64
MAX_SUBSTITUTES = 100


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    positions: Int64[Tensor, " batch"]
    """In the training stream; what keys noise and timesteps."""
    pixels: Float32[Tensor, "batch 3 height width"]
    """In [-1, 1]."""
    captions: tuple[str, ...]
    """"" where the caption was dropped."""
    keys: tuple[str, ...]
    """Of the samples that were read; a bad sample's substitute is named here."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be used at a position."""

    position: int
    """Where it was due."""
    sample: int
    """Its number in the index."""
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


class Reader(Dataset[Any]):
    """``reader[range of positions]`` is a micro-batch; copies of a reader in other processes give the same."""

    def __init__(self, index: ShardIndex, *, seed: int, image_size: int, caption_dropout: float) -> None:
        self._index, self._seed, self._image_size = index, int(seed), image_size
        self._dropped_below = int(caption_dropout * 2**63)
        self._order = SampleOrder([shard.count for shard in index.shards], self._seed)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh inherits no descriptors.
        return self.__dict__ | {"_open": OrderedDict()}

    def __getitem__(self, positions: range) -> Read | Failure:
        try:
            return self._read_batch(positions)
        # torch would raise a worker's exception with its traceback as the message; this way the message stays.
        except (ValueError, OSError) as error:
            return Failure(str(error), traceback.format_exc())

    def close(self) -> None:
        """Close the shards that this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read_batch(self, positions: range) -> Read:
        bad: list[BadSample] = []
        samples = [self._read_position(position, bad) for position in positions]
        pixels, captions, keys = zip(*samples, strict=True)
        return Read(Batch(torch.tensor(positions), torch.stack(pixels), captions, keys), tuple(bad))

    def _read_position(self, position: int, bad: list[BadSample]) -> tuple[Tensor, str, str]:
        """Pixels, caption and key of the position's sample or, if it is bad, of the first good one in a fixed list.

        The bad ones are added to ``bad``.
        """
        place = self._order[position]
        sample = int(self._index.starts[place.shard]) + place.row
        reasons: list[str] = []
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                pixels, caption = self._read_sample(sample)
            except BadSampleError as error:
                shard = self._index.shards[self._index.shard_of(sample)].name
                key = self._index.key(sample)
                bad.append(BadSample(position=position, sample=sample, shard=shard, key=key, reason=str(error)))
                reasons.append(str(bad[-1]))
                sample = keyed_seed(self._seed, "substitute", position, attempt) % self._index.num_samples
            else:
                dropped = keyed_seed(self._seed, "caption", position) < self._dropped_below
                return pixels, "" if dropped else caption, self._index.key(sample)
        raise ValueError(
            f"{self._index.folder}: the sample at position {position} is bad and so are {MAX_SUBSTITUTES} substitutes; "
            f"first: {'; '.join(reasons[:3])}. Restore the shards, or index them again if they were replaced"
        )

    def _read_sample(self, sample: int) -> tuple[Tensor, str]:
        if sample in self._index.bad:
            raise BadSampleError(self._index.bad[sample])
        image = image_tensor(decode_image(self._read_part(sample, "image")), self._image_size)
        is_json = bool(self._index.samples["caption_is_json"][sample])
        return image, decode_caption(self._read_part(sample, "caption"), is_json=is_json)

    def _read_part(self, sample: int, part: str) -> bytes:
        row = self._index.samples[sample]
        size = int(row[f"{part}_bytes"])
        data = read_at(self._descriptor(self._index.shard_of(sample)), int(row[f"{part}_offset"]), size)
        if len(data) != size:
            raise BadSampleError(
                f"{part} has {len(data)} bytes, expected {size}: the shard was cut off since it was indexed"
            )
        if zlib.crc32(data) != int(row[f"{part}_crc"]):
            raise BadSampleError(f"{part} checksum (CRC32) differs from the index: its bytes changed since")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            path = self._index.folder / self._index.shards[shard].name
            try:
                self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ValueError(
                    f"{path}: the shard cannot be opened any more ({error}); restore it, resume"
                ) from error
        self._open.move_to_end(shard)
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]
