"""The arrays of an index as its shards come in: written to unnamed files, so that millions of samples need no memory
of their own."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib.recfunctions import repack_fields

from dydit_scale.data.encoded import Encoding
from dydit_scale.data.index import ShardIndex, ShardInfo, compute_digest
from dydit_scale.data.records import SAMPLE, Columns, pack, unpack

SCANNED = np.dtype([*SAMPLE.descr, ("frames", "<i4"), ("seconds", "<f8"), ("label", "<i8")])
"""What a scan finds of a sample; frames, seconds and labels become arrays of their own."""

_OPTIONAL: dict[str, tuple[str, Any]] = {"labels": ("label", -1), "frames": ("frames", 0), "seconds": ("seconds", 0.0)}
"""Arrays of an index that are there if any sample has something else than this value in that field."""


class ScannedShard(NamedTuple):
    """All that an index says of one shard."""

    info: ShardInfo
    rows: np.ndarray
    """[count] records of ``SCANNED``; ``key_end`` counts from the shard's own start."""
    keys: bytes
    """All keys in UTF-8, one after the other."""
    bad: dict[int, str]
    """Rows that are unusable, and why."""
    foreign: tuple[str, ...] = ()
    """Other tools whose index files were found to agree."""
    ignored: dict[str, int] = {}
    """Members that are no part of a sample, by extension."""

    def key(self, row: int) -> bytes:
        """A row's key."""
        return self.keys[int(self.rows["key_end"][row - 1]) if row else 0 : int(self.rows["key_end"][row])]


class Gatherer:
    """Takes shards one after the other and makes an index of them; a context manager.

    Args:
        folder: that of the shards; must have room for the index three times.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._present: set[str] = set()
        self._shards: list[ShardInfo] = []
        self._bad: dict[int, str] = {}
        self._ignored: Counter[str] = Counter()
        self._samples = self._key_bytes = 0
        self._hashes = _Hashes()

    def __enter__(self) -> Gatherer:
        with ExitStack() as opened:
            for name in ("samples", "keys", *_OPTIONAL):
                self._files[name] = opened.enter_context(tempfile.TemporaryFile(dir=self._folder))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def add(self, shard: ScannedShard) -> None:
        """Append a shard; ValueError, naming both shards, if one of its keys is an earlier one's too."""
        hashes = hash_keys(shard)
        for row in self._hashes.seen(hashes):
            self._check_key(shard, shard.key(int(row)))
        self._hashes.add(hashes)
        rows = shard.rows.copy()
        rows["key_end"] += self._key_bytes
        self._files["samples"].write(repack_fields(rows[list(SAMPLE.names or ())]).tobytes())
        self._files["keys"].write(shard.keys)
        for name, (field, nothing) in _OPTIONAL.items():
            self._files[name].write(rows[field].tobytes())
            if (rows[field] != nothing).any():
                self._present.add(name)
        self._bad |= {self._samples + row: reason for row, reason in shard.bad.items()}
        self._ignored.update(shard.ignored)
        self._samples += len(rows)
        self._key_bytes += len(shard.keys)
        self._shards.append(shard.info)

    def index(self, broken: dict[str, str], encoding: Encoding | None) -> ShardIndex:
        """The index of all shards so far, which must be saved before this gatherer is left."""
        if "frames" in self._present and encoding is None:
            self._present.add("seconds")  # all of them zero, perhaps, which is not the same as not known
        index = ShardIndex(
            folder=self._folder,
            shards=tuple(self._shards),
            digest="",
            columns=pack(_mapped(self._files["samples"], SAMPLE), self._unnamed),
            key_bytes=_mapped(self._files["keys"], np.dtype(np.uint8)),
            bad=self._bad,
            broken=broken,
            encoding=encoding,
            ignored=dict(self._ignored.most_common()),
        )
        arrays: dict[str, Any] = {n: _mapped(self._files[n], SCANNED[_OPTIONAL[n][0]]) for n in self._present}
        index = replace(index, **arrays)
        return replace(index, digest=compute_digest(index))

    def _unnamed(self, length: int, dtype: np.dtype) -> np.ndarray:
        """An array in a file of its own, which lives as long as the array."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk kills the process that writes to a map
                os.posix_fallocate(file.fileno(), 0, length * dtype.itemsize)
            return np.memmap(file, dtype, mode="w+", shape=(length,)).view(np.ndarray)

    def _check_key(self, shard: ScannedShard, key: bytes) -> None:
        """Two keys have the same hash: look whether they are the same."""
        samples, keys = _mapped(self._files["samples"], SAMPLE), _mapped(self._files["keys"], np.dtype(np.uint8))
        end = 0
        for earlier in self._shards:
            start, end = end, end + earlier.count
            ends = samples["key_end"][start:end]
            starts = np.concatenate([samples["key_end"][start - 1 : start] if start else [0], ends[:-1]])
            for at in np.flatnonzero(ends - starts == len(key)):
                if keys[starts[at] : ends[at]].tobytes() == key:
                    raise ValueError(
                        f"{shard.info.name}: sample {key.decode()!r} is also in {earlier.name}; keys must differ, "
                        "rename one"
                    )


class _Hashes:
    """The hashes of all keys so far, 8 bytes each, in sorted runs whose lengths at least double."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def seen(self, hashes: np.ndarray) -> np.ndarray:
        """The places in ``hashes`` of those that were added before."""
        found = np.zeros(len(hashes), dtype=bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        return np.flatnonzero(found)

    def add(self, hashes: np.ndarray) -> None:
        self._runs.append(np.sort(hashes))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")


def hash_keys(shard: ScannedShard) -> np.ndarray:
    """64 bits for each key of a shard."""
    ends = shard.rows["key_end"].tolist()
    keys = (shard.keys[start:end] for start, end in pairwise([0, *ends]))
    hashes = [hashlib.blake2b(key, digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(hashes), "<u8")


def slice_index(index: ShardIndex, number: int) -> ScannedShard:
    """What an index says of its shard ``number``, as if it had just been scanned."""
    start, stop = index.starts[number : number + 2]
    rows = np.zeros(stop - start, SCANNED)
    samples = unpack(Columns(*(array[start:stop] for array in index.columns)))
    for field in SAMPLE.names or ():
        rows[field] = samples[field]
    for name, (field, nothing) in _OPTIONAL.items():
        held = getattr(index, name)
        rows[field] = nothing if held is None else held[start:stop]
    first = int(index.columns.key_ends[start - 1]) if start else 0
    keys = index.key_bytes[first : int(index.columns.key_ends[stop - 1])].tobytes()
    rows["key_end"] -= first
    bad = {sample - start: reason for sample, reason in index.bad.items() if start <= sample < stop}
    return ScannedShard(index.shards[number], rows, keys, bad)


def _mapped(file: IO[bytes], dtype: np.dtype) -> np.ndarray:
    file.flush()
    return np.memmap(file, dtype, mode="r").view(np.ndarray)
