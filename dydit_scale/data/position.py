"""Which sample is read at which position of the endless training stream: a pure function; its state is one integer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dydit_scale.diffusion.randomness import keyed_seed


class Place(NamedTuple):
    """A sample: the shard's number and the sample's row in that shard."""

    shard: int
    row: int


class _Epoch(NamedTuple):
    number: int
    shards: np.ndarray  # the shards in this epoch's order
    ends: np.ndarray  # [groups], where each group of shards ends, in samples


class _Group(NamedTuple):
    epoch: int
    number: int
    shards: np.ndarray  # the shards of the group
    ends: np.ndarray  # [shards], where each shard ends, in samples of the group
    samples: np.ndarray  # a permutation of the group's samples


class SampleOrder:
    """``order[position]`` for every position >= 0; each epoch of ``num_samples`` positions holds every sample once.

    An epoch shuffles the shards, takes groups of ``shards_per_group`` of them and shuffles the samples inside each
    group: at any time few shards are open and reads stay near one another. The order depends on the arguments alone.

    Args:
        sizes: samples in each shard, all positive.
        seed: the run's seed.
        shards_per_group: how many shards are mixed with one another; as many as there are is a full shuffle.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shards_per_group: int = 16) -> None:
        if len(sizes) == 0 or min(sizes) < 1:
            raise ValueError(
                f"sample order: expected shards with at least one sample each, got sizes {list(sizes)[:8]}"
            )
        if shards_per_group < 1:
            raise ValueError(f"sample order: shards_per_group must be at least 1, got {shards_per_group}")
        self.sizes = np.array(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        self._seed = int(seed)
        self._shards_per_group = shards_per_group
        self._epoch: _Epoch | None = None
        self._group: _Group | None = None

    def __getitem__(self, position: int) -> Place:
        if position < 0:
            raise ValueError(f"sample order: positions start at 0, got {position}")
        number, offset = divmod(int(position), self.num_samples)
        epoch = self._epoch_plan(number)
        group_number = int(np.searchsorted(epoch.ends, offset, side="right"))
        group = self._group_plan(epoch, group_number)
        group_start = int(epoch.ends[group_number - 1]) if group_number else 0
        sample = int(group.samples[offset - group_start])
        member = int(np.searchsorted(group.ends, sample, side="right"))
        return Place(int(group.shards[member]), sample - (int(group.ends[member - 1]) if member else 0))

    def _epoch_plan(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            shards = _permutation(len(self.sizes), self._seed, "shards", number)
            starts = np.arange(0, len(shards), self._shards_per_group)
            ends = np.cumsum(np.add.reduceat(self.sizes[shards], starts))
            self._epoch = _Epoch(number, shards, ends)
        return self._epoch

    def _group_plan(self, epoch: _Epoch, number: int) -> _Group:
        if self._group is None or (self._group.epoch, self._group.number) != (epoch.number, number):
            first = number * self._shards_per_group
            shards = epoch.shards[first : first + self._shards_per_group]
            ends = np.cumsum(self.sizes[shards])
            samples = _permutation(int(ends[-1]), self._seed, "samples", epoch.number, number)
            self._group = _Group(epoch.number, number, shards, ends, samples)
        return self._group


def _permutation(count: int, seed: int, *key: int | str) -> np.ndarray:
    # numpy freezes the stream of RandomState for good (NEP 19); that of default_rng may change between versions.
    word = keyed_seed(seed, *key)
    return np.random.RandomState([word & 0xFFFFFFFF, word >> 32]).permutation(count)
