"""Batches of pictures or clips with captions and labels, from any position of the training stream, on any rank, with
any number of workers.

The state of reading is one integer, ``consumed``: prefetched batches that were never trained on do not count.
"""

from __future__ import annotations

import itertools
import json
import signal
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dydit_scale.data.cache import FileCache
from dydit_scale.data.index import ShardIndex, load_index
from dydit_scale.data.reader import BadSample, Batch, Failure, Reader
from dydit_scale.data.remote import is_url
from dydit_scale.data.stream import ShardStream, StreamReader, open_stream

__all__ = ["BadDataError", "Batch", "DataConfig", "Loader", "make_loader", "open_data"]


class BadDataError(ValueError):
    """More unusable samples than the budget allows."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how."""

    path: str
    """Folder with the shards and their index, or its URL: s3://, gs://, hf:// or https://. In mode stream also the name
    of shards in it, with braces: DIR/shard-{000..099}.tar."""
    mode: str = "indexed"
    """indexed: any position can be read, so a resume is exact, on any number of ranks. stream: shards without an index,
    from end to end, drawn with replacement; pictures only, not exactly resumable."""
    cache: str = ""
    """Folder on the node's own disk that keeps whole shards of a URL; empty reads each sample from the store."""
    cache_gib: float = 100.0
    """What the folder may hold, all processes of the node together; the shards in use must fit."""
    image_size: int = 32
    """Side of the square pictures, in pixels; others are resized on the shorter side and cropped at the centre."""
    caption_dropout: float = 0.1
    """Share of positions without their caption ("" in its place) and label (-1), for classifier-free guidance."""
    frames: int = 1
    """Frames of a clip, from a start drawn for each position; 1 makes pictures, of clips one frame."""
    frame_stride: int = 1
    """A clip takes every so many-th frame of its source."""
    images_per_clip: int = 0
    """Single pictures of other samples that follow each clip's frames, for joint training on clips and pictures."""
    workers: int = 0
    """Processes that read and decode; 0 does it in the training process. The batches are the same."""
    bad_samples: int = 100
    """How many different unusable samples one process puts up with, those marked in the index included."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.path is empty; expected a folder of shards")
        self._check_storage()
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1, got {self.image_size}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"data.caption_dropout must lie in [0, 1], got {self.caption_dropout}")
        if self.frames < 1 or self.frame_stride < 1:
            raise ValueError(
                f"data.frames and data.frame_stride must be at least 1, got {self.frames} and {self.frame_stride}"
            )
        if self.images_per_clip < 0 or (self.images_per_clip and self.frames == 1):
            raise ValueError(
                f"data.images_per_clip is {self.images_per_clip} with data.frames {self.frames}; expected 0 or more "
                "beside clips of at least 2 frames, and 0 for pictures"
            )
        if self.workers < 0:
            raise ValueError(f"data.workers cannot be negative, got {self.workers}")
        if self.bad_samples < 0:
            raise ValueError(f"data.bad_samples cannot be negative, got {self.bad_samples}")

    def _check_storage(self) -> None:
        if self.mode not in ("indexed", "stream"):
            raise ValueError(f"data.mode must be indexed or stream, got {self.mode!r}")
        if not self.cache_gib > 0:
            raise ValueError(f"data.cache_gib must be positive, got {self.cache_gib}")
        if not is_url(self.path) and self.cache:
            raise ValueError(f"data.cache {self.cache}: {self.path} is a local folder already; leave data.cache empty")
        if self.mode == "stream" and (self.cache or self.frames > 1):
            raise ValueError(
                "data.mode stream reads pictures (data.frames 1) and keeps no shards (data.cache empty), since both "
                f"need an index; got data.frames {self.frames} and data.cache {self.cache!r}. Index the shards for them"
            )


def open_data(config: DataConfig) -> ShardIndex | ShardStream:
    """What ``make_loader`` reads from; ValueError as ``load_index`` and ``open_stream`` raise it."""
    if config.mode == "stream":
        return open_stream(config.path)
    cache = FileCache(Path(config.cache), int(config.cache_gib * 2**30)) if config.cache else None
    return load_index(config.path, cache)


def make_loader(
    config: DataConfig,
    index: ShardIndex | ShardStream,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch: int,
    micro_batch: int,
    consumed: int,
    quarantine: Path | None = None,
) -> Loader:
    """An endless iterable of this rank's micro-batches from position ``consumed`` on.

    Step s reads the positions ``consumed + s * global_batch + [0, global_batch)``. The n-th micro-batches of all ranks
    are its n-th part, of which rank r takes the r-th: the same samples meet, however many ranks share the work. What is
    read at a position depends on (index, seed, position) alone; of a ``ShardStream`` this holds for noise and dropout
    but not for the samples (see ``data.stream``).

    Args:
        quarantine: a file that gets one JSON line for each bad sample met; give each rank its own.

    Raises ValueError when the batch does not divide, naming the nearest that do, the index has more bad samples than
    ``config.bad_samples`` (BadDataError), no clip has the frames asked for, or clips are to be read without PyAV.
    While iterating: beyond that budget, or when a shard has vanished.
    """
    _check_split(rank, world_size, global_batch, micro_batch, consumed)
    log = _BadSampleLog(config.bad_samples, index, quarantine, rank)
    if isinstance(index, ShardStream):
        stream = StreamReader(
            index,
            seed=seed,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            consumed=consumed,
            image_size=config.image_size,
            caption_dropout=config.caption_dropout,
        )
        return Loader(stream, None, log, config.workers)
    first = consumed + rank * micro_batch
    positions = _Positions(first=first, stride=world_size * micro_batch, micro_batch=micro_batch)
    reader = Reader(
        index,
        seed=seed,
        image_size=config.image_size,
        caption_dropout=config.caption_dropout,
        frames=config.frames,
        frame_stride=config.frame_stride,
        images_per_clip=config.images_per_clip,
    )
    return Loader(reader, positions, log, config.workers)


class Loader:
    """Endless micro-batches; every ``iter()`` begins at the same position again."""

    def __init__(
        self, reader: Reader | StreamReader, positions: _Positions | None, log: _BadSampleLog, workers: int
    ) -> None:
        self._reader, self._positions, self._log, self._workers = reader, positions, log, workers

    def __iter__(self) -> Iterator[Batch]:
        results: DataLoader[Any] = DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._positions,
            num_workers=self._workers,
            collate_fn=_unchanged,
            worker_init_fn=_outlive_stop_signals,
            # Its own, because a DataLoader draws a seed for its workers from the global generator otherwise.
            generator=torch.Generator(),
        )
        try:
            for result in results:
                if isinstance(result, Failure):
                    raise ValueError(result.message) from RuntimeError(result.trace)
                self._log.add(result.bad)
                yield result.batch
        finally:
            self._reader.close()


@dataclass(frozen=True, kw_only=True)
class _Positions:
    """The ranges of positions that are one rank's micro-batches, without end."""

    first: int
    stride: int
    micro_batch: int

    def __iter__(self) -> Iterator[range]:
        return (range(start, start + self.micro_batch) for start in itertools.count(self.first, self.stride))


class _BadSampleLog:
    """Counts the different bad samples of this process, names each once and stops beyond the budget."""

    def __init__(self, budget: int, index: ShardIndex | ShardStream, quarantine: Path | None, rank: int) -> None:
        self._budget, self._place, self._quarantine, self._rank = budget, index.place, quarantine, rank
        self._named: set[tuple[str, str]] = set()
        self._found: dict[tuple[str, str], str] = {}
        if isinstance(index, ShardIndex):
            for sample, reason in index.bad.items():
                shard = index.shards[index.shard_of(sample)].name
                self._found[shard, index.key(sample)] = f"{index.name(sample)}: {reason}"
        self._check()

    def add(self, bad: tuple[BadSample, ...]) -> None:
        for entry in bad:
            if (entry.shard, entry.key) not in self._named:
                self._named.add((entry.shard, entry.key))
                self._found[entry.shard, entry.key] = str(entry)
                warnings.warn(f"bad {entry}; another sample takes its place", stacklevel=3)
                self._write(entry)
        self._check()

    def _write(self, entry: BadSample) -> None:
        if self._quarantine is not None:
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"rank": self._rank, **asdict(entry)}, ensure_ascii=False) + "\n")

    def _check(self) -> None:
        if len(self._found) > self._budget:
            raise BadDataError(
                f"{self._place}: {len(self._found)} bad samples, more than the budget of {self._budget} "
                f"(data.bad_samples); first: {'; '.join(list(self._found.values())[:3])}. "
                "Repair the shards and run `dydit data index` on them, or raise data.bad_samples"
            )


def _unchanged(result: Any) -> Any:
    return result


def _outlive_stop_signals(worker: int) -> None:
    # Launchers signal whole process groups. The trainer stops in its own time and needs its workers until then.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _check_split(rank: int, world_size: int, global_batch: int, micro_batch: int, consumed: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"data: rank {rank} of {world_size}, expected 0 <= rank < world_size")
    if global_batch < 1 or micro_batch < 1 or consumed < 0:
        raise ValueError(
            f"data: expected a global batch and a micro-batch of at least 1 and consumed of at least 0, "
            f"got {global_batch}, {micro_batch} and {consumed}"
        )
    unit = world_size * micro_batch
    below = global_batch // unit * unit
    nearest = " or ".join(str(batch) for batch in (below, below + unit) if batch)
    if global_batch % world_size:
        raise ValueError(
            f"data: a global batch of {global_batch} cannot be split over {world_size} ranks; with micro-batches of "
            f"{micro_batch} take {nearest}"
        )
    share = global_batch // world_size
    if share % micro_batch:
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        smaller = max(size for size in divisors if size < micro_batch)
        sizes = [smaller, *[size for size in divisors if size > micro_batch][:1]]
        raise ValueError(
            f"data: a rank's share of {share} (global batch {global_batch} over {world_size} ranks) cannot be cut in "
            f"micro-batches of {micro_batch}; take micro-batches of {' or '.join(map(str, sizes))}, or a global batch "
            f"of {nearest}"
        )
