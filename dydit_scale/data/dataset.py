"""The indexes of all that a run reads: of one folder of shards, or of several sources."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dydit_scale.data.cache import FileCache
from dydit_scale.data.config import DataConfig
from dydit_scale.data.encoded import Encoding
from dydit_scale.data.index import ShardIndex, load_index
from dydit_scale.data.remote import RemoteFolder


@dataclass(frozen=True, eq=False)
class DataSet:
    """What a run reads."""

    indexes: tuple[ShardIndex, ...]
    """In the order of the sources."""

    @property
    def digest(self) -> str:
        """Of all samples: of one source its index's own, of several SHA-256 (hex) over theirs in turn."""
        digests = [index.digest for index in self.indexes]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def encodings(self) -> dict[int, tuple[Path | RemoteFolder, Encoding]]:
        """Of the sources that are encoded, by number: where they are, and how they were."""
        return {n: (index.home, index.encoding) for n, index in enumerate(self.indexes) if index.encoding is not None}

    @property
    def num_samples(self) -> int:
        """Of all sources together, bad ones included."""
        return sum(index.num_samples for index in self.indexes)


def load_data(config: DataConfig) -> DataSet:
    """The indexes of the sources, checked against the shards on disk as ``load_index`` does."""
    cache = FileCache(Path(config.cache), int(config.cache_gib * 2**30)) if config.cache else None
    return DataSet(tuple(load_index(source.path, cache) for source in config.split()))
