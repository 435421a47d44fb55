"""Buckets: their sizes, which sample belongs to which, and an order whose units are of one bucket."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit_scale.data.buckets import Bucket, bucket_counts, bucket_numbers, make_buckets, nearest_bucket
from dydit_scale.data.config import DataConfig
from dydit_scale.data.index import ShardIndex, ShardInfo
from dydit_scale.data.position import SampleOrder
from dydit_scale.data.records import SAMPLE, pack

SIZES = [100, 37, 250, 1, 64, 64, 93]


def index_of(sizes: Sequence[tuple[int, int]], bad: dict[int, str] | None = None) -> ShardIndex:
    """An index of samples of some widths and heights, whose bytes nobody reads."""
    samples = np.zeros(len(sizes), SAMPLE)
    samples["width"], samples["height"] = np.array(sizes).T
    shard = ShardInfo(name="a.tar", bytes=0, sha256="", count=len(sizes))
    keys = np.zeros(0, np.uint8)
    return ShardIndex(
        folder=Path("x"), shards=(shard,), digest="", columns=pack(samples), key_bytes=keys, bad=bad or {}
    )


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_one_area() -> None:
    assert make_buckets(512, 64, 2.0) == (
        (640, 384), (576, 448), (512, 512), (448, 576), (384, 640),
    )  # fmt: skip
    assert make_buckets(64, 16, 4.0) == ((128, 32), (80, 48), (64, 64), (48, 80), (32, 128))
    assert make_buckets(64, 64, 9.0) == make_buckets(64, 16, 1.0) == ((64, 64),)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 64), st.floats(1, 8))
def test_sizes_keep_to_step_area_and_aspect(times: int, step: int, max_aspect: float) -> None:
    side = times * step
    buckets = make_buckets(side, step, max_aspect)
    assert (side, side) in buckets and len(set(buckets)) == len(buckets)
    assert sorted((width, height) for height, width in buckets) == sorted(buckets)
    aspects = [bucket.width / bucket.height for bucket in buckets]
    assert aspects == sorted(set(aspects)) and aspects[-1] <= max_aspect
    for height, width in buckets:
        short, long = sorted((height, width))
        assert height % step == width % step == 0
        assert short * long <= side**2 < short * (long + step)


@pytest.mark.parametrize("buckets", [make_buckets(512, 64, 2.0), make_buckets(96, 8, 4.0), (Bucket(32, 32),)])
def test_nearest_is_the_nearest_by_proportion(buckets: tuple[Bucket, ...]) -> None:
    def distance(bucket: Bucket, width: int, height: int) -> float:
        return abs(math.log(width / height) - math.log(bucket.width / bucket.height))

    for width in range(10, 600):
        distances = [distance(bucket, width, 97) for bucket in buckets]
        assert distances[nearest_bucket(width, 97, buckets)] <= min(distances) + 1e-9, width


def test_numbers_of_an_index_and_their_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dydit_scale.data.buckets._ROWS", 3)  # in several parts
    buckets = make_buckets(64, 16, 4.0)
    sizes = [(64, 64), (100, 99), (10, 500), (500, 10), (80, 48), (48, 80), (30, 31), (0, 0)]
    index = index_of(sizes, bad={3: "broken", 7: "unknown"})
    numbers = bucket_numbers(index, buckets)
    assert numbers is not None and numbers.dtype == np.uint8
    assert numbers.tolist() == [2, 2, 0, 2, 3, 1, 2, 2]  # the bad ones are in the fullest
    good = [sample for sample in range(8) if sample not in index.bad]
    assert all(numbers[sample] == nearest_bucket(*sizes[sample], buckets) for sample in good)
    config = DataConfig(path="x", image_size=64, buckets=True, bucket_step=16, max_aspect=4.0)
    counts = bucket_counts(index, config)
    assert counts == {(128, 32): 1, (80, 48): 1, (64, 64): 3, (48, 80): 1, (32, 128): 0}
    assert sum(counts.values()) + len(index.bad) == index.num_samples
    assert bucket_counts(index, DataConfig(path="x", image_size=40)) == {(40, 40): 6}
    assert bucket_numbers(index, (Bucket(40, 40),)) is None


def test_more_sizes_than_a_byte_counts() -> None:
    buckets = make_buckets(1024, 2, 4.0)
    assert len(buckets) > 256
    numbers = bucket_numbers(index_of([(4000, 1000), (1000, 4000)]), buckets)
    assert numbers is not None and numbers.tolist() == [len(buckets) - 1, 0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 500}, r"image_size 500: .* data.bucket_step 64; take 448 or 512, or another step"),
        ({"image_size": 32}, r"image_size 32: .*take 64, or another step"),
        ({"bucket_step": 0}, "data.bucket_step and data.bucket_batch must be at least 1, got 0 and 8"),
        ({"bucket_batch": 0}, "data.bucket_step and data.bucket_batch must be at least 1, got 64 and 0"),
        ({"max_aspect": 0.5}, "data.max_aspect must be a number of at least 1"),
        ({"max_aspect": math.nan}, "data.max_aspect must be a number of at least 1"),
    ],
)
def test_settings_are_checked(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"path": "x", "image_size": 512, "buckets": True, **setting})


# --- order ----------------------------------------------------------------------------------------------------------


def random_buckets(sizes: Sequence[int], seed: int, kinds: int) -> np.ndarray:
    """Some more common than others."""
    random = np.random.RandomState(seed)
    return np.minimum(random.geometric(0.5, sum(sizes)) - 1, kinds - 1).astype(np.uint8)


def flat(order: SampleOrder, positions: range) -> list[int]:
    starts = np.cumsum(order.sizes) - order.sizes
    return [int(starts[place.shard]) + place.row for place in map(order.__getitem__, positions)]


orders = st.tuples(
    st.lists(st.integers(1, 12), min_size=1, max_size=9),  # sizes
    st.integers(0, 2**40),  # seed
    st.integers(1, 10),  # shards a group
    st.integers(1, 6),  # kinds of buckets
    st.integers(1, 9),  # unit
)


def make_order(given: tuple[list[int], int, int, int, int]) -> tuple[SampleOrder, SampleOrder, np.ndarray, int]:
    """The order with buckets, the one without, the buckets and the unit."""
    sizes, seed, shards_per_group, kinds, unit = given
    buckets = random_buckets(sizes, seed % 1000, kinds)
    plain = SampleOrder(sizes, seed, shards_per_group)
    return SampleOrder(sizes, seed, shards_per_group, buckets=buckets, unit=unit), plain, buckets, unit


@settings(max_examples=100, deadline=None)
@given(orders, st.integers(1, 60))
def test_units_continue_the_streams_of_their_buckets(given: tuple, units: int) -> None:
    """What a bucket gives is the order without buckets, less all samples of others: so nothing is lost or doubled."""
    order, plain, buckets, unit = make_order(given)
    read = np.array(flat(order, range(units * unit))).reshape(units, unit)
    assert (buckets[read] == buckets[read[:, :1]]).all(), "a unit of several buckets"
    epochs = units * unit  # more than enough
    for bucket in set(buckets[read[:, 0]].tolist()):
        got = read[buckets[read[:, 0]] == bucket].ravel().tolist()
        stream = (sample for sample in flat_epochs(plain, epochs) if buckets[sample] == bucket)
        assert got == list(islice(stream, len(got)))
        members = np.flatnonzero(buckets == bucket)
        counts = np.bincount(got, minlength=len(buckets))[members]
        assert set(counts.tolist()) <= {len(got) // len(members), -(-len(got) // len(members))}


def flat_epochs(order: SampleOrder, epochs: int) -> Iterator[int]:
    for epoch in range(epochs):
        yield from flat(order, range(epoch * order.num_samples, (epoch + 1) * order.num_samples))


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(1, 6))
def test_every_epoch_holds_every_sample(given: tuple, epochs: int) -> None:
    """After the units that begin in so many epochs, each bucket is at most one unit ahead, and none is behind."""
    order, _, buckets, unit = make_order(given)
    totals = np.bincount(buckets)
    units = sum(-(-epochs * int(total) // unit) for total in totals)
    counts = np.bincount(flat(order, range(units * unit)), minlength=len(buckets))
    assert counts.min() >= epochs
    ahead = np.bincount(buckets, weights=counts) - epochs * totals
    assert (ahead >= 0).all() and (ahead < unit).all()
    common = totals[buckets] >= unit
    assert counts[common].max(initial=epochs) <= epochs + 1
    # One unit less, and some bucket has not given all of its samples yet.
    fewer = np.bincount(flat(order, range((units - 1) * unit)), minlength=len(buckets))
    assert (np.bincount(buckets, weights=fewer) < epochs * totals).any() or unit == 1


@settings(max_examples=60, deadline=None)
@given(orders)
def test_units_come_in_the_order_of_the_groups_in_which_they_begin(given: tuple) -> None:
    order, plain, buckets, unit = make_order(given)
    shards, per_group = len(given[0]), given[2]
    group_of = {}  # (epoch, shard): the number of its group, counted through the epochs
    for position in range(8 * plain.num_samples):
        epoch = position // plain.num_samples
        met = len(group_of) - epoch * shards  # shards of this epoch
        group_of.setdefault((epoch, plain[position].shard), epoch * shards + met // per_group)
    seen: Counter[int] = Counter()
    last = -1
    starts = np.cumsum(plain.sizes) - plain.sizes
    totals = np.bincount(buckets)
    while min(seen[b] // total for b, total in enumerate(totals) if total) < 3:
        position = sum(seen.values())
        shard, row = order[position]
        bucket = int(buckets[starts[shard] + row])
        epoch = seen[bucket] // int(totals[bucket])
        if epoch >= 8:
            break
        assert group_of[epoch, shard] >= last
        last = group_of[epoch, shard]
        seen[bucket] += unit
    assert sum(seen.values()) >= plain.num_samples


@settings(max_examples=30, deadline=None)
@given(orders)
def test_one_bucket_is_the_order_without_buckets(given: tuple) -> None:
    sizes, seed, shards_per_group, _, unit = given
    one = SampleOrder(sizes, seed, shards_per_group, buckets=np.zeros(sum(sizes), np.uint8), unit=unit)
    assert flat(one, range(100)) == flat(SampleOrder(sizes, seed, shards_per_group), range(100))


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 400), st.integers(0, 300))
def test_places_are_those_of_each_position(given: tuple, start: int, count: int) -> None:
    order, plain, _, _ = make_order(given)
    positions = range(start, start + count)
    assert order.places(positions) == [order[position] for position in positions]
    assert plain.places(positions) == [plain[position] for position in positions]


def test_order_is_a_function_of_position_alone() -> None:
    order = SampleOrder(SIZES, 7, 2, buckets=random_buckets(SIZES, 0, 4), unit=8)
    expected = flat(order, range(4000))
    asked = np.random.RandomState(0).permutation(4000)[:300].tolist()
    again = pickle.loads(pickle.dumps(order))
    assert [flat(again, range(p, p + 1))[0] for p in asked] == [expected[p] for p in asked]
    assert order[10**9] == SampleOrder(SIZES, 7, 2, buckets=random_buckets(SIZES, 0, 4), unit=8)[10**9]


def test_units_of_one_group_are_shuffled() -> None:
    buckets = random_buckets(SIZES, 0, 3)
    order = SampleOrder(SIZES, 7, buckets=buckets, unit=4)
    kinds = buckets[flat(order, range(0, 600, 1))][::4]
    changes = int((kinds[1:] != kinds[:-1]).sum())
    assert 60 < changes < 149, "neither in blocks nor in turn"


def test_samples_of_a_bucket_by_number() -> None:
    buckets = random_buckets(SIZES, 0, 4)
    order = SampleOrder(SIZES, 7, buckets=buckets, unit=8)
    for bucket in range(4):
        members = np.flatnonzero(buckets == bucket)
        assert [order.sample_of(bucket, n) for n in range(len(members))] == members.tolist()
        assert order.sample_of(bucket, len(members) * 10**15 + 1) == members[1]
        assert {order.bucket_of(int(sample)) for sample in members} == {bucket}
    assert [SampleOrder([3, 4], 0).sample_of(0, n) for n in (0, 6, 7)] == [0, 6, 0]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unit must be at least 1, got 16 and 0"):
        SampleOrder([3], 0, unit=0)
    for wrong in (np.zeros(2, np.uint8), np.zeros(3, np.int64)):
        with pytest.raises(ValueError, match=rf"unsigned bucket numbers of 3 samples, got {wrong.dtype} \["):
            SampleOrder([3], 0, buckets=wrong)
