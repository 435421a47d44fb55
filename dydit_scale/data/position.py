"""Which sample is read at which position of the endless training stream: a pure function; its state is one integer."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from dydit_scale.diffusion.randomness import keyed_seed

T = TypeVar("T")

_REMEMBERED = 2
"""Plans of each kind that an order holds: a unit may begin in one group, or epoch, and end in the next."""


class Place(NamedTuple):
    """A sample: the shard's number and the sample's row in that shard."""

    shard: int
    row: int


class Turns(NamedTuple):
    """A shuffled row in which some parts take turns."""

    parts: np.ndarray
    """[places], the number of the part whose turn it is."""
    turns: np.ndarray
    """[places], how many turns that part had before, in this row."""


class _Epoch(NamedTuple):
    number: int
    shards: np.ndarray  # the shards in this epoch's order
    ends: np.ndarray  # [buckets, groups], where each group of shards ends in the epoch, in samples of each bucket
    units: np.ndarray  # [groups + 1, buckets], units of each bucket that begin before each group, since the first epoch


class _Group(NamedTuple):
    shards: np.ndarray  # the shards of the group
    ends: np.ndarray  # [shards], where each shard ends, in samples of the group
    samples: np.ndarray  # a permutation of the group's samples, sorted by bucket
    starts: np.ndarray  # [buckets], where each bucket starts in ``samples``


class SampleOrder:
    """``order[position]`` for every position >= 0.

    An epoch shuffles the shards, takes groups of ``shards_per_group`` of them and shuffles the samples inside each
    group: at any time few shards are open and reads stay near one another. The order depends on the arguments alone.

    Without ``buckets`` each epoch of ``num_samples`` positions holds every sample once. With them, each bucket has such
    a stream of its own, which is the epoch's order without the samples of other buckets, and epoch follows on epoch in
    it without a gap. The positions are cut in units of ``unit``, each of which continues the stream of one bucket. So
    nothing is dropped or repeated to fill a batch: a unit that an epoch's last samples do not fill takes the first of
    the next epoch. Units come in the order of the groups in which they begin, those of one group shuffled.

    Args:
        sizes: samples in each shard, all positive.
        seed: the run's seed.
        shards_per_group: how many shards are mixed with one another; as many as there are is a full shuffle.
        buckets: unsigned integers [samples], the bucket of each sample, shard by shard; None puts all in one.
        unit: consecutive positions, from a multiple of it, that hold samples of one bucket.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        shards_per_group: int = 16,
        *,
        buckets: np.ndarray | None = None,
        unit: int = 1,
    ) -> None:
        if len(sizes) == 0 or min(sizes) < 1:
            raise ValueError(
                f"sample order: expected shards with at least one sample each, got sizes {list(sizes)[:8]}"
            )
        if shards_per_group < 1 or unit < 1:
            raise ValueError(
                f"sample order: shards_per_group and unit must be at least 1, got {shards_per_group} and {unit}"
            )
        self.sizes = np.array(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if buckets is not None and (buckets.shape != (self.num_samples,) or buckets.dtype.kind != "u"):
            raise ValueError(
                f"sample order: expected unsigned bucket numbers of {self.num_samples} samples, "
                f"got {buckets.dtype} {list(buckets.shape)}"
            )
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._seed, self._shards_per_group, self._unit = int(seed), shards_per_group, unit
        self._buckets = buckets
        self._counts = self.sizes[:, None] if buckets is None else self._count(buckets)  # [shards, buckets]
        self._totals = [int(total) for total in self._counts.sum(0)]
        self._epochs: OrderedDict[Hashable, _Epoch] = OrderedDict()
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        self._turns: OrderedDict[Hashable, Turns] = OrderedDict()
        self._last = (-1, 0, 0)  # a unit, its bucket, its number among the units of that bucket

    def __getitem__(self, position: int) -> Place:
        return self._run(int(position), 1)[0]

    def places(self, positions: range) -> list[Place]:
        """``[order[position] for position in positions]`` of consecutive positions, several times as fast."""
        found: list[Place] = []
        while len(found) < len(positions):
            found += self._run(positions.start + len(found), len(positions) - len(found))
        return found

    def bucket_of(self, sample: int) -> int:
        """The bucket of a sample, by its number in the order of ``sizes``."""
        return 0 if self._buckets is None else int(self._buckets[sample])

    def sample_of(self, bucket: int, number: int) -> int:
        """Sample ``number`` of those of a bucket, counted round and round from the first shard's first."""
        number %= self._totals[bucket]
        if self._buckets is None:
            return number
        ends = np.cumsum(self._counts[:, bucket])
        shard = int(np.searchsorted(ends, number, side="right"))
        start = int(self._starts[shard])
        rows = np.flatnonzero(self._buckets[start : start + int(self.sizes[shard])] == bucket)
        return start + int(rows[number - (int(ends[shard]) - len(rows))])

    def _count(self, buckets: np.ndarray) -> np.ndarray:
        """[shards, buckets], how many samples of each bucket a shard has."""
        kinds = int(buckets.max()) + 1
        return np.stack([np.bincount(part, minlength=kinds) for part in np.split(buckets, self._starts[1:])])

    def _find_unit(self, unit: int) -> tuple[int, int]:
        """The unit's bucket, and its number among the units of that bucket."""
        # Of T samples in B buckets, epoch e begins with unit e * T / unit at the earliest and less than B units later.
        first = max(0, (unit - len(self._totals)) * self._unit // self.num_samples)
        last = unit * self._unit // self.num_samples
        number = first - 1 + bisect_right(range(first, last + 1), unit, key=self._units_before)
        epoch = self._epoch_plan(number)
        ends = epoch.units.sum(1)
        group = int(np.searchsorted(ends, unit, side="right")) - 1
        turns = self._turns_plan(epoch, group)
        place = unit - int(ends[group])
        bucket = int(turns.parts[place])
        return bucket, int(epoch.units[group, bucket]) + int(turns.turns[place])

    def _units_before(self, epoch: int) -> int:
        """Units that begin before an epoch; one that begins in it may end in a later one."""
        return sum(-(-epoch * total // self._unit) for total in self._totals)

    def _run(self, position: int, most: int) -> list[Place]:
        """The places from a position on, at most so many: those of its unit in one group."""
        if position < 0:
            raise ValueError(f"sample order: positions start at 0, got {position}")
        bucket, number = 0, position
        if len(self._totals) > 1:
            unit, row = divmod(position, self._unit)
            if unit != self._last[0]:
                self._last = (unit, *self._find_unit(unit))
            _, bucket, before = self._last
            number, most = before * self._unit + row, min(most, self._unit - row)
        epoch_number, offset = divmod(number, self._totals[bucket])
        epoch = self._epoch_plan(epoch_number)
        ends = epoch.ends[bucket]
        group_number = int(ends.searchsorted(offset, side="right"))
        group = self._group_plan(epoch, group_number)
        most = min(most, int(ends[group_number]) - offset)
        first = int(group.starts[bucket]) + offset - (int(ends[group_number - 1]) if group_number else 0)
        samples = group.samples[first : first + most]
        members = group.ends.searchsorted(samples, side="right")
        shards = group.shards[members]
        rows = samples - (group.ends[members] - self.sizes[shards])
        return list(map(Place, shards.tolist(), rows.tolist()))

    def _epoch_plan(self, number: int) -> _Epoch:
        def make() -> _Epoch:
            shards = permutation(len(self.sizes), self._seed, "shards", number)
            starts = np.arange(0, len(shards), self._shards_per_group)
            ends = np.cumsum(np.add.reduceat(self._counts[shards], starts), axis=0)
            before = np.concatenate([np.zeros_like(ends[:1]), ends]) + number * np.array(self._totals)
            return _Epoch(number, shards, np.ascontiguousarray(ends.T), -(-before // self._unit))

        return _remembered(self._epochs, number, make)

    def _group_plan(self, epoch: _Epoch, number: int) -> _Group:
        def make() -> _Group:
            first = number * self._shards_per_group
            shards = epoch.shards[first : first + self._shards_per_group]
            ends = np.cumsum(self.sizes[shards])
            samples = permutation(int(ends[-1]), self._seed, "samples", epoch.number, number)
            if self._buckets is not None:
                starts = self._starts[shards]
                sizes = self.sizes[shards]
                held = [self._buckets[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]
                samples = samples[np.argsort(np.concatenate(held)[samples], kind="stable")]
            counts = self._counts[shards].sum(0)
            return _Group(shards, ends, samples, np.cumsum(counts) - counts)

        return _remembered(self._groups, (epoch.number, number), make)

    def _turns_plan(self, epoch: _Epoch, group: int) -> Turns:
        def make() -> Turns:
            counts = epoch.units[group + 1] - epoch.units[group]
            return shuffled_turns(counts, self._seed, "units", epoch.number, group)

        return _remembered(self._turns, (epoch.number, group), make)


def shuffled_turns(counts: np.ndarray, seed: int, *key: int | str) -> Turns:
    """A row in which part ``p`` has ``counts[p]`` turns, in an order of ``keyed_seed(seed, *key)``."""
    total = int(counts.sum())
    parts = np.repeat(np.arange(len(counts)), counts)[permutation(total, seed, *key)]
    turns = np.empty_like(parts)
    turns[np.argsort(parts, kind="stable")] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return Turns(parts, turns)


def permutation(count: int, seed: int, *key: int | str) -> np.ndarray:
    """The numbers below ``count`` in an order of ``keyed_seed(seed, *key)``."""
    # numpy freezes the stream of RandomState for good (NEP 19); that of default_rng may change between versions.
    word = keyed_seed(seed, *key)
    return np.random.RandomState([word & 0xFFFFFFFF, word >> 32]).permutation(count)


def _remembered(plans: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    if key not in plans:
        plans[key] = make()
    plans.move_to_end(key)
    if len(plans) > _REMEMBERED:
        plans.popitem(last=False)
    return plans[key]
