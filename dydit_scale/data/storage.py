"""Where the bytes of shards come from: files of a folder, read at any place."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from dydit_scale.data.tar import read_at

MAX_OPEN_SHARDS = 64


class ShardFiles:
    """Shards in a local folder. Copies in other processes open files of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh inherits no descriptors.
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a shard from ``offset`` on, fewer if it ends before; ValueError if it cannot be opened."""
        return read_at(self._descriptor(shard), offset, size)

    def close(self) -> None:
        """Close the shards that this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: str) -> int:
        if shard not in self._open:
            path = self._folder / shard
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
