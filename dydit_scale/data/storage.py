"""Where the bytes of shards come from: a local folder, or an object store with or without a cache on this node."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dydit_scale.data.cache import FileCache, Wanted
from dydit_scale.data.index import ShardIndex, ShardInfo
from dydit_scale.data.remote import RemoteFolder
from dydit_scale.data.tar import fill

MAX_OPEN_SHARDS = 64
MAX_CACHED_SHARDS = 32
"""Shards of the cache that a process keeps from being removed: two groups of those that are mixed with one another."""
IN_USE = 256
"""Reads after which a shard of the cache that was not among them may be removed: of the 16 that are mixed with one
another, each is read every 16th time."""


def open_shards(index: ShardIndex) -> ShardFiles | RangeShards:
    """What reads the shards of an index; ValueError if its cache is too small for the largest."""
    if index.remote is None:
        return ShardFiles(index.folder)
    if index.cache is None:
        return RangeShards(index.remote, index.shards)
    return CachedShards(index.remote, index.shards, index.cache)


class ShardFiles:
    """Shards in a local folder. Copies in other processes open files of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._max_open = folder, MAX_OPEN_SHARDS
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh inherits no descriptors.
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, shard: str, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from ``offset`` on; how many bytes there were before the shard's end. ValueError if it cannot
        be opened."""
        return fill(self._descriptor(shard), offset, buffer)

    def close(self) -> None:
        """Close the shards that this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: str) -> int:
        if shard not in self._open:
            self._open[shard] = self._open_shard(shard)
        self._open.move_to_end(shard)
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def _open_shard(self, shard: str) -> int:
        path = self._folder / shard
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{path}: the shard cannot be opened any more ({error}); restore it, resume") from error


class RangeShards:
    """Shards of an object store, read by ranges."""

    def __init__(self, remote: RemoteFolder, shards: Iterable[ShardInfo]) -> None:
        self._remote, self._ends = remote, {shard.name: shard.bytes for shard in shards}

    def read(self, shard: str, offset: int, buffer: memoryview) -> int:
        """As ``ShardFiles.read``, in one request; ValueError if it cannot be read."""
        size = max(0, min(len(buffer), self._ends[shard] - offset))
        buffer[:size] = self._remote.read(shard, offset, size)
        return size

    def close(self) -> None:
        """Nothing is held open."""


class CacheUse(NamedTuple):
    """How shards were opened."""

    hits: int = 0
    """They were in the cache."""
    misses: int = 0
    """They had to be downloaded."""


class CachedShards(ShardFiles):
    """Shards of an object store, kept whole on this node; by ranges while the cache is full of shards in use.

    A shard that is held open is in use, and is closed after ``IN_USE`` reads of others. None is closed to make room for
    another of the same group, which would be downloaded again and again.
    """

    def __init__(self, remote: RemoteFolder, shards: Iterable[ShardInfo], cache: FileCache) -> None:
        super().__init__(cache.folder)
        self._remote, self._cache, self._max_open = remote, cache, MAX_CACHED_SHARDS
        self._wanted = {s.name: Wanted(name=f"{remote}/{s.name}", size=s.bytes, sha256=s.sha256) for s in shards}
        self._ranges, self._use = RangeShards(remote, shards), CacheUse()
        self._reads = 0
        self._last_read: dict[str, int] = {}
        self._ask_again: dict[str, int] = {}
        self._renewed: set[str] = set()
        largest = max(self._wanted.values(), key=lambda wanted: wanted.size)
        if largest.size > cache.limit:
            raise ValueError(
                f"data.cache_gib {cache.limit / 2**30:g}: {largest.name} alone has {largest.size / 2**30:.3g} GiB; "
                "expected room for the shards that all processes of a node read at a time, some dozens"
            )

    def read(self, shard: str, offset: int, buffer: memoryview) -> int:
        """As ``ShardFiles.read``; ValueError, too, if the shard cannot be downloaded or kept."""
        self._reads += 1
        self._last_read[shard] = self._reads
        oldest = next(iter(self._open), shard)
        if self._reads - self._last_read[oldest] > IN_USE:
            os.close(self._open.pop(oldest))
        if self._reads >= self._ask_again.get(shard, 0):
            try:
                return super().read(shard, offset, buffer)
            except _NoRoomError:
                self._ask_again[shard] = self._reads + IN_USE
                warnings.warn(
                    f"cache {self._cache.folder}: all of its {self._cache.limit / 2**30:g} GiB are in use, so some "
                    "shards are read by ranges; raise data.cache_gib",
                    stacklevel=2,
                )
        return self._ranges.read(shard, offset, buffer)

    def _open_shard(self, shard: str) -> int:
        wanted, missed = self._wanted[shard], False

        def download() -> Iterator[bytes]:
            nonlocal missed
            missed = True
            return self._remote.chunks(shard, wanted.size)

        fd = self._cache.open(wanted, download)
        if fd is None:
            raise _NoRoomError
        self._use = CacheUse(self._use.hits + (not missed), self._use.misses + missed)
        return fd

    def file_of(self, shard: str) -> Path | None:
        """The cache's file that a shard is read from; None while it is read by ranges."""
        return self._cache.path(self._wanted[shard]) if shard in self._open else None

    def renew(self, shard: str) -> bool:
        """Drop the cache's file of an open shard, which is then downloaded again; False if this was done before."""
        if shard in self._renewed:
            return False
        self._renewed.add(shard)
        self._cache.drop(self._wanted[shard], self._open.pop(shard))
        return True

    def take_use(self) -> CacheUse:
        """What this process opened since the last call."""
        use, self._use = self._use, CacheUse()
        return use


class _NoRoomError(Exception):
    """The cache is full of files in use."""
