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
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dydit_scale.data.config import DataConfig, SourceConfig
from dydit_scale.data.dataset import DataSet, load_data
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.reader import BadSample, Batch, Failure, Reader
from dydit_scale.data.storage import CacheUse
from dydit_scale.data.stream import ShardStream, StreamReader, open_stream

__all__ = ["BadDataError", "Batch", "DataConfig", "DataSet", "Loader", "SourceConfig", "make_loader", "open_data"]


class BadDataError(ValueError):
    """More unusable samples than the budget allows."""


def open_data(config: DataConfig) -> DataSet | ShardStream:
    """What ``make_loader`` reads from; ValueError as ``load_index`` and ``open_stream`` raise it."""
    return open_stream(config.path) if config.mode == "stream" else load_data(config)


def make_loader(
    config: DataConfig,
    data: DataSet | ShardIndex | ShardStream,
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
    read at a position depends on (config, data, seed, position) alone. Where there are buckets or several sources, each
    micro-batch is of one bucket and one source. Of a ``ShardStream`` this holds for noise and dropout but not for the
    samples (see ``data.stream``).

    Args:
        data: the indexes of the config's sources; the index itself will do for one.
        quarantine: a file that gets one JSON line for each bad sample met; give each rank its own.

    Raises ValueError when the batch does not divide, naming the nearest that do, micro-batches do not divide
    ``config.bucket_batch`` where they must, an index has more bad samples than ``config.bad_samples`` (BadDataError),
    no clip is as long as asked for, or clips are to be read without PyAV.
    While iterating: beyond that budget, or when a shard has vanished.
    """
    data = DataSet((data,)) if isinstance(data, ShardIndex) else data
    _check_split(rank, world_size, global_batch, micro_batch, consumed)
    if isinstance(data, ShardStream):
        stream = StreamReader(
            data,
            seed=seed,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            consumed=consumed,
            image_size=config.image_size,
            caption_dropout=config.caption_dropout,
        )
        return Loader(stream, None, [_BadSampleLog(config.bad_samples, data, quarantine, rank)], config.workers)
    _check_unit(config, micro_batch, consumed)
    logs = [_BadSampleLog(config.bad_samples, index, quarantine, rank) for index in data.indexes]
    first = consumed + rank * micro_batch
    positions = _Positions(first=first, stride=world_size * micro_batch, micro_batch=micro_batch)
    return Loader(Reader(config, data, seed=seed), positions, logs, config.workers)


class Loader:
    """Endless micro-batches; every ``iter()`` begins at the same position again."""

    def __init__(
        self, reader: Reader | StreamReader, positions: _Positions | None, logs: list[_BadSampleLog], workers: int
    ) -> None:
        self._reader, self._positions, self._logs, self._workers = reader, positions, logs, workers
        self._cache = CacheUse()

    def counts(self) -> tuple[int, int, int]:
        """Up to the last batch: different bad samples, shards found in the cache, shards downloaded into it."""
        return sum(len(log) for log in self._logs), *self._cache

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
                self._logs[result.batch.source].add(result.bad)
                self._cache = CacheUse(*(a + b for a, b in zip(self._cache, result.cache, strict=True)))
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
    """Counts the different bad samples of a source in this process, names each once and stops beyond the budget."""

    def __init__(self, budget: int, index: ShardIndex | ShardStream, quarantine: Path | None, rank: int) -> None:
        self._budget, self._place, self._quarantine, self._rank = budget, index.place, quarantine, rank
        self._named: set[tuple[str, str]] = set()
        self._found: dict[tuple[str, str], str] = {}
        if isinstance(index, ShardIndex):
            for sample, reason in index.bad.items():
                shard = index.shards[index.shard_of(sample)].name
                self._found[shard, index.key(sample)] = f"{index.name(sample)}: {reason}"
        self._check()

    def __len__(self) -> int:
        return len(self._found)

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
            line = {"rank": self._rank, "folder": self._place, **asdict(entry)}
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

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


def _check_unit(config: DataConfig, micro_batch: int, consumed: int) -> None:
    config.check_micro_batch(micro_batch)
    if config.unit and consumed % micro_batch:
        raise ValueError(
            f"data: after {consumed} samples, micro-batches of {micro_batch} would hold several buckets or sources; "
            f"take micro-batches that divide {gcd(consumed, config.unit)} (train.batch_size, train.accumulation)"
        )
