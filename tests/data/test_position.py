"""The order of samples: a permutation in every epoch, the same for ever."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit_scale.data.position import Place, SampleOrder

SIZES = [100, 37, 250, 1, 64, 64, 93]
GOLDEN = {
    1: "7769ade2b9a7fd3271a26b28141768ba655ef3be804188fafcfceeaa627769d9",
    3: "a315cf03fedc2ae8b4182eb7a61d20f445c8d8cc9599fc9660c6d8fcc309e658",
    16: "932e7229889bcd521d37c5a57063123a2b4392c13a660991d4cf7b19e8294c90",
}


def flat(order: SampleOrder, positions: range) -> list[int]:
    starts = np.concatenate([[0], np.cumsum(order.sizes)])
    return [int(starts[place.shard]) + place.row for place in map(order.__getitem__, positions)]


@pytest.mark.parametrize("shards_per_group", sorted(GOLDEN))
def test_order_never_drifts(shards_per_group: int) -> None:
    order = SampleOrder(SIZES, 7, shards_per_group)
    for places in (map(order.__getitem__, range(10_000)), order.places(range(10_000))):
        text = "".join(f"{shard}:{row}\n" for shard, row in places)
        assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN[shards_per_group]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    seed=st.integers(0, 2**40),
    shards_per_group=st.integers(1, 10),
    consumed=st.integers(0, 400),
)
def test_each_sample_comes_floor_or_ceil_times(
    sizes: list[int], seed: int, shards_per_group: int, consumed: int
) -> None:
    total = sum(sizes)
    counts = Counter(flat(SampleOrder(sizes, seed, shards_per_group), range(consumed)))
    assert set(counts) <= set(range(total))
    assert {counts[sample] for sample in range(total)} <= {consumed // total, -(-consumed // total)}
    assert sum(counts.values()) == consumed


def test_order_is_a_function_of_position_alone() -> None:
    expected = flat(SampleOrder(SIZES, 7, 2), range(2000))
    asked = np.random.RandomState(0).permutation(2000)[:300].tolist()
    order = SampleOrder(SIZES, 7, 2)
    assert [flat(order, range(p, p + 1))[0] for p in asked] == [expected[p] for p in asked]
    assert flat(pickle.loads(pickle.dumps(order)), range(2000)) == expected


def test_epochs_and_seeds_differ() -> None:
    total = sum(SIZES)
    first, second = flat(SampleOrder(SIZES, 7), range(total)), flat(SampleOrder(SIZES, 7), range(total, 2 * total))
    other = flat(SampleOrder(SIZES, 8), range(total))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(total))
    assert first != second and first != other and first != sorted(first)


def test_a_group_is_read_before_the_next_begins() -> None:
    order = SampleOrder([10] * 12, 3, shards_per_group=4)
    groups = [{order[position].shard for position in range(start, start + 40)} for start in (0, 40, 80)]
    assert [len(group) for group in groups] == [4, 4, 4]
    assert set.union(*groups) == set(range(12))
    assert groups[0] != {0, 1, 2, 3}
    assert len({order[position].shard for position in range(10)}) > 1


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one sample each"):
        SampleOrder([3, 0], 0)
    with pytest.raises(ValueError, match="shards_per_group and unit must be at least 1"):
        SampleOrder([3], 0, 0)
    with pytest.raises(ValueError, match="positions start at 0, got -1"):
        SampleOrder([3], 0)[-1]
    assert SampleOrder([1], 0)[12] == Place(0, 0)
