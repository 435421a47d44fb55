"""The files of a sample: in one read where they lie side by side, held against their checksums."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # zlib's, many times faster

from dydit_scale.data.decode import BadSampleError
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.records import Part
from dydit_scale.data.storage import CachedShards, CacheUse, open_shards

GAP = 1 << 16
"""Bytes between the files of a sample that are read along with them; behind more, the second is read by itself."""
TOGETHER = 1 << 25
"""Files of more bytes in all are read one by one, each into memory of its own."""
LOOKED_AT = 1 << 12
"""After so many samples the index gives its pages back; by then most are of shards that are done."""


class Files(NamedTuple):
    """A sample's bytes, until ``SampleFiles.forget``."""

    image: memoryview
    """Picture or clip; of an encoded sample its tensors."""
    caption: memoryview | None
    """Of an encoded sample its entry."""
    caption_is_json: bool


class SampleFiles:
    """Reads samples of an index by number. Copies in other processes open files of their own."""

    def __init__(self, index: ShardIndex) -> None:
        self._index, self._shards, self._memory = index, open_shards(index), _Memory()
        self._count = 0

    def read(self, sample: int) -> Files:
        """The files of a sample that has an image; BadSampleError if their bytes are not those that were indexed.

        A shard that was damaged in the cache is downloaded again, once.
        """
        self._count += 1
        if self._count % LOOKED_AT == 0:
            self._index.release()
        shard = self._index.shards[self._index.shard_of(sample)].name
        while True:
            try:
                return self._checked(sample, shard)
            except BadSampleError as error:
                if not isinstance(self._shards, CachedShards) or (file := self._shards.file_of(shard)) is None:
                    raise
                if not self._shards.renew(shard):
                    raise BadSampleError(f"{error}; read from {file}, downloaded twice: is that disk sound?") from error
                warnings.warn(f"{file} ({shard}): {error}; downloading it again. Is that disk sound?", stacklevel=3)

    def _checked(self, sample: int, shard: str) -> Files:
        image, caption, is_json = self._index.record(sample)
        parts = (image, caption) if caption.offset else (image,)
        views = self._together(shard, parts)
        for part, view in zip(parts, views, strict=True):
            if len(view) != part.bytes or crc32(view) != part.crc:
                raise BadSampleError(_fault("caption" if part is caption else self._kind(sample), part, view))
        return Files(views[0], views[1] if caption.offset else None, is_json)

    def forget(self) -> None:
        """The memory of all that was read may be used again."""
        self._memory.forget()

    def take_use(self) -> CacheUse:
        """What was opened since the last call."""
        return self._shards.take_use() if isinstance(self._shards, CachedShards) else CacheUse()

    def close(self) -> None:
        """Close the shards that this process holds open."""
        self._shards.close()

    def _kind(self, sample: int) -> str:
        return "video" if self._index.frames is not None and self._index.frames[sample] else "image"

    def _together(self, shard: str, parts: tuple[Part, ...]) -> list[memoryview]:
        """The bytes of the parts, fewer where the shard ends before."""
        first, last = min(parts), max(parts)  # by offset
        start, stop = first.offset, last.offset + last.bytes
        if len(parts) > 1 and not stop - start <= min(TOGETHER, GAP + first.bytes + last.bytes):
            return [self._together(shard, (part,))[0] for part in parts]
        data = self._memory.take(stop - start)
        data = data[: self._shards.read(shard, start, data)]
        return [data[part.offset - start : part.offset - start + part.bytes] for part in parts]


def _fault(name: str, part: Part, view: memoryview) -> str:
    """What is wrong with the bytes of a part."""
    if len(view) != part.bytes:
        return f"{name} has {len(view)} bytes, expected {part.bytes}: the shard was cut off since it was indexed"
    return f"{name} checksum (CRC32) differs from the index: its bytes changed since"


class _Memory:
    """Room for the bytes of a micro-batch, used again for the next: fresh pages cost several times the reading."""

    def __init__(self) -> None:
        self._room, self._used = np.empty(0, np.uint8), 0

    def take(self, size: int) -> memoryview:
        if size > TOGETHER:
            return np.empty(size, np.uint8).data
        if self._used + size > len(self._room):
            self._room, self._used = np.empty(max(size, 2 * len(self._room)), np.uint8), 0
        start = self._used
        self._used += -(-size // 64) * 64  # tensors lie at multiples of their items
        return self._room.data[start : start + size]

    def forget(self) -> None:
        self._used = 0
