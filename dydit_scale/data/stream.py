"""Shards without an index, read one after the other from end to end: for sources that cannot be indexed.

Each worker of each rank draws shards with replacement and mixes their samples in a buffer, as is usual with webdataset.
Positions number the samples that come, so noise and dropout are keyed as ever, but which sample comes at a position
depends on the numbers of ranks and workers and on where the run was last resumed: a resume is not exact.

What is read is checked as an index would check it: tars strictly, files by an allow-list of extensions and by size.
Nothing is opened by webdataset itself, whose URLs may be commands.
"""

from __future__ import annotations

import hashlib
import io
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls

from dydit_scale.data.decode import (
    CAPTION_EXTENSION,
    FIELDS_EXTENSION,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    BadSampleError,
    decode_caption,
    decode_fields,
    decode_image,
    decode_label,
    image_tensor,
)
from dydit_scale.data.encoded import find_encoding
from dydit_scale.data.index import find_shards
from dydit_scale.data.reader import MAX_SUBSTITUTES, BadSample, Batch, Failure, Read
from dydit_scale.data.remote import CHUNK, RangeFile, RemoteError, RemoteFolder, is_url
from dydit_scale.data.tar import Member, split_name, walk_file
from dydit_scale.diffusion.randomness import keyed_seed

SHUFFLED = 1000
"""Samples that a worker mixes, as encoded bytes."""

_LIMITS = {name: MAX_IMAGE_BYTES for name in IMAGE_EXTENSIONS} | {
    CAPTION_EXTENSION: MAX_CAPTION_BYTES,
    FIELDS_EXTENSION: MAX_CAPTION_BYTES,
    LABEL_EXTENSION: MAX_LABEL_BYTES,
}
"""The extensions that are read, and the most bytes of each; other files are passed over."""


@dataclass(frozen=True, kw_only=True)
class ShardStream:
    """Shards to be read as a stream."""

    place: str
    """Their folder or URL."""
    shards: tuple[str, ...]
    """File names in it."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the shards' names: all that is known of them."""
        return hashlib.sha256("\0".join(("stream", *self.shards)).encode()).hexdigest()


def open_stream(path: str) -> ShardStream:
    """The shards of a folder, of a URL, or of a name with braces in either (``DIR/shard-{000..099}.tar``).

    Raises ValueError on a folder without shards, and on a web server without braces, since it has no list to trust.
    """
    place, _, name = path.rpartition("/") if path.endswith(".tar") else (path, "", "")
    place = place or "."
    remote = RemoteFolder(place) if is_url(place) else None
    if name:
        shards = tuple(expand_urls(name))
    elif find_encoding(remote or Path(place)) is not None:
        raise ValueError(f"{place}: encoded data have an index; data.mode stream reads pictures, set data.mode=indexed")
    elif remote is None:
        shards = tuple(shard.name for shard in find_shards(Path(place)))
    else:
        shards = tuple(remote.shards() or ())
        if not shards:
            raise ValueError(
                f"{remote}: found no shards (*.tar); web servers have no list of files, so name them with braces: "
                f"data.path={remote}/shard-{{000000..000099}}.tar"
            )
    return ShardStream(place=place, shards=shards)


class StreamReader(IterableDataset[Any]):
    """Endless micro-batches of pictures; every ``iter()`` begins anew, the same in the same worker.

    Bad samples are passed over, and named with the batch that follows them.
    """

    def __init__(
        self,
        stream: ShardStream,
        *,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        consumed: int,
        image_size: int,
        caption_dropout: float,
    ) -> None:
        self._stream, self._seed, self._rank, self._world_size = stream, int(seed), rank, world_size
        self._micro_batch, self._consumed, self._image_size = micro_batch, consumed, image_size
        self._dropped_below = int(caption_dropout * 2**63)

    def __iter__(self) -> Iterator[Read | Failure]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        samples = self._samples(keyed_seed(self._seed, "stream", self._consumed, self._rank, worker))
        try:
            for number in count(worker, workers):
                start = self._consumed + (number * self._world_size + self._rank) * self._micro_batch
                yield self._read_batch(range(start, start + self._micro_batch), samples)
        # As in Reader: the message would be lost on the way from a worker.
        except (ValueError, OSError) as error:
            yield Failure(str(error), traceback.format_exc())

    def close(self) -> None:
        """Nothing is held open."""

    def _samples(self, seed: int) -> Iterator[_Files]:
        """Endless, shuffled."""
        shards = webdataset.ResampledShards(
            list(self._stream.shards), seed=seed, worker_seed=lambda: 0, deterministic=True
        )
        shuffle = webdataset.shuffle(SHUFFLED, initial=SHUFFLED, seed=seed)
        return iter(webdataset.DataPipeline(shards, self._read_shards, shuffle))

    def _read_shards(self, shards: Iterable[dict[str, str]]) -> Iterator[_Files]:
        place = self._stream.place
        for shard in (source["url"] for source in shards):
            with _open_shard(place, shard) as file:
                yield from _read_shard(file, shard)

    def _read_batch(self, positions: range, samples: Iterator[_Files]) -> Read:
        bad: list[BadSample] = []
        rows = [self._read_good(position, samples, bad) for position in positions]
        labels = torch.tensor([row.label for row in rows])
        dropped = [keyed_seed(self._seed, "caption", position) < self._dropped_below for position in positions]
        batch = Batch(
            torch.tensor(positions),
            torch.stack([row.pixels for row in rows]),
            tuple("" if drop else row.caption for row, drop in zip(rows, dropped, strict=True)),
            tuple(row.key for row in rows),
            labels=torch.where(torch.tensor(dropped), -1, labels) if (labels >= 0).any() else None,
        )
        return Read(batch, tuple(bad))

    def _read_good(self, position: int, samples: Iterator[_Files], bad: list[BadSample]) -> _Sample:
        reasons: list[str] = []
        while len(reasons) <= MAX_SUBSTITUTES:
            found = next(samples)
            try:
                return _decode(found, self._image_size, keyed_seed(self._seed, "caption choice", position))
            except BadSampleError as error:
                bad.append(BadSample(position=position, sample=-1, shard=found.shard, key=found.key, reason=str(error)))
                reasons.append(str(bad[-1]))
        raise ValueError(
            f"{self._stream.place}: {len(reasons)} bad samples in a row; first: {'; '.join(reasons[:3])}. They need a "
            "picture (clips need data.mode=indexed) and a caption or class; restore the shards"
        )


class _Files(NamedTuple):
    """A sample as it lies in its shard."""

    shard: str
    key: str
    files: dict[str, bytes]
    """By extension."""
    reason: str = ""
    """Why it is bad, if that is known already."""


class _Sample(NamedTuple):
    pixels: torch.Tensor
    caption: str
    label: int
    key: str


def _open_shard(place: str, shard: str) -> BinaryIO:
    if not is_url(place):
        return (Path(place) / shard).open("rb")
    remote = RemoteFolder(place)
    size = remote.size(shard)
    if size is None:
        raise RemoteError(f"{remote}/{shard}: not found, or of unknown size; restore it")
    return io.BufferedReader(RangeFile(remote, shard, size), CHUNK)


def _read_shard(file: BinaryIO, shard: str) -> Iterator[_Files]:
    """Its samples; what lies behind a damage is one bad sample, and so is a shard that holds none."""
    key, size = "", file.seek(0, io.SEEK_END)
    try:
        for key, members in groupby(walk_file(file, shard, size), key=lambda member: split_name(member.name)[0]):
            yield _read_files(file, shard, key, members)
    # RemoteError is a ValueError, too, but says nothing of the shard.
    except RemoteError:
        raise
    except ValueError as error:
        yield _Files(shard, key, {}, f"left out with all behind it: {error}")
    else:
        if not key:
            yield _Files(shard, key, {}, "the shard holds no samples")


def _read_files(file: BinaryIO, shard: str, key: str, members: Iterable[Member]) -> _Files:
    files: dict[str, bytes] = {}
    reason = ""
    for member in members:
        extension = split_name(member.name)[1]
        if extension in files:
            reason = f"{extension!r} twice (two samples with one key?)"
        elif member.size > _LIMITS.get(extension, member.size):
            reason = f".{extension} of {member.size} bytes, more than the limit of {_LIMITS[extension]}"
        elif extension in _LIMITS:
            file.seek(member.offset)
            files[extension] = file.read(member.size)
    return _Files(shard, key, files, reason)


def _decode(found: _Files, image_size: int, choice: int) -> _Sample:
    """The sample; ``choice`` chooses one of several captions."""
    if found.reason:
        raise BadSampleError(found.reason)
    images = [found.files[extension] for extension in IMAGE_EXTENSIONS if extension in found.files]
    if len(images) != 1:
        raise BadSampleError(f"{len(images)} images, expected one of {', '.join(IMAGE_EXTENSIONS)}")
    text, number, fields = (found.files.get(name) for name in (CAPTION_EXTENSION, LABEL_EXTENSION, FIELDS_EXTENSION))
    captions: tuple[str, ...] = () if text is None else (decode_caption(text),)
    label = None if number is None else decode_label(number)
    if fields is not None and (not captions or label is None):
        told = decode_fields(fields)
        captions, label = captions or told.captions, told.label if label is None else label
    if not captions and label is None:
        raise BadSampleError("neither caption nor label: no .txt, no .cls, and no .json that holds one")
    pixels = image_tensor(decode_image(images[0]), image_size, image_size)
    caption = captions[choice % len(captions)] if captions else ""
    return _Sample(pixels, caption, -1 if label is None else label, found.key)
