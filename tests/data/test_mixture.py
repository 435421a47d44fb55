"""Mixtures of sources, and the order of all that is read, which stays the same for ever."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit_scale.data.config import DataConfig, SourceConfig
from dydit_scale.data.mixture import Draw, Mixture, whole_shares
from dydit_scale.data.position import SampleOrder

SIZES = [100, 37, 250, 1, 64, 64, 93]
GOLDEN = {
    "one bucket": "bc32126431054ce2f179bb846e7730b4e26e5a555a1b46aaa7bfc2eb03f81823",
    "several buckets": "3d5a5b72c35af3659a72bafd37393091bb72d3c6d76bc9059e5078ddd4f7ae20",
    "mixture": "6befa9b0ca84d1b8372c493192f964bc1bf2a910cbdfa5dfd672d8ee14b2055f",
}


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([5.0], (1,)),
        ([0.7, 0.3], (7, 3)),
        ([2, 2, 2], (1, 1, 1)),
        ([1, 1e-3], (999, 1)),
        ([1234567, 4321, 98765], (575, 2, 46)),
        ([3, 1], (3, 1)),
        ([0.333, 0.667], (333, 667)),
    ],
)
def test_shares_are_the_nearest_whole_numbers(weights: list[float], shares: tuple[int, ...]) -> None:
    assert whole_shares(weights) == shares


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_shares_are_near_the_weights_or_refused(weights: list[float]) -> None:
    exact = np.array(weights) / sum(weights)
    try:
        shares = np.array(whole_shares(weights))
    except ValueError as error:
        assert exact.min() < 0.012, "half a thousandth is a twentieth of a hundredth"
        assert "the nearest possible" in str(error)
        return
    assert shares.min() >= 1 and shares.sum() <= 1000
    assert (abs(shares / shares.sum() - exact) <= 0.05 * exact * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1, 1e-4), r"data\.sources\[1\]: its weight 0\.0001 asks for 0\.01 % .* 0\.1 % is .* the weights to 999, 1,"),
        ((5e-4, 1), r"data\.sources\[0\]: its weight 0\.0005 asks for 0\.05 % .* 0\.1 % is .* the weights to 1, 999,"),
        ((0.001,) * 3 + (5,), r"data\.sources\[0\]: .* asks for 0\.02 % .* the weights to 1, 1, 1, 997,"),
    ],
)
def test_weights_that_cannot_be_met_are_refused_with_those_that_can(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said) as told:
        DataConfig(sources=tuple(SourceConfig(path=f"{n}", weight=weight) for n, weight in enumerate(weights)))
    nearest = [int(word) for word in re.findall(r"\d+", str(told.value).split("weights to ")[1].split(", or")[0])]
    assert whole_shares(nearest) == tuple(nearest)


def test_too_many_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 1000 sources, got 1001"):
        whole_shares([1.0] * 1001)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 100)
)
def test_sources_are_continued_by_whole_units(weights: list[int], unit: int, seed: int, units: int) -> None:
    mixture, again = Mixture(weights, unit, seed), Mixture(weights, unit, seed)
    total = int(mixture.shares.sum())
    given_by: Counter[int] = Counter()
    for number in range(units):
        draws = [mixture[number * unit + row] for row in range(unit)]
        source = draws[0].source
        assert draws == [Draw(source, given_by[source] + row) for row in range(unit)]
        given_by[source] += unit
        if (number + 1) % total == 0:
            rounds = (number + 1) // total
            assert [given_by[n] for n in range(len(weights))] == [rounds * unit * int(n) for n in mixture.shares]
    backwards = [again[number * unit] for number in reversed(range(units))]
    assert backwards[::-1] == [mixture[number * unit] for number in range(units)]


def test_rounds_and_seeds_differ() -> None:
    def sources(seed: int, units: range) -> list[int]:
        mixture = Mixture([0.6, 0.4], 4, seed)
        return [mixture[4 * unit].source for unit in units]

    rounds = [sources(1, range(start, start + 5)) for start in range(0, 50, 5)]
    assert all(sorted(one) == [0, 0, 0, 1, 1] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3
    assert sources(1, range(50)) != sources(2, range(50))


# --- the same for ever ----------------------------------------------------------------------------------------------


def lines(kind: str) -> list[str]:
    """The first 10,000 positions."""
    buckets = np.minimum(np.random.RandomState(0).geometric(0.5, sum(SIZES)) - 1, 3).astype(np.uint8)
    several = SampleOrder(SIZES, 7, 3, buckets=buckets, unit=8)
    orders = {"one bucket": SampleOrder(SIZES, 7, 3), "several buckets": several}
    if kind in orders:
        return [f"{shard}:{row}" for shard, row in map(orders[kind].__getitem__, range(10_000))]
    draws = map(Mixture([2.0, 1.0, 0.5], 8, 7).__getitem__, range(10_000))
    sources = [several, SampleOrder([30, 20, 10], 8), SampleOrder([5], 9)]
    return [f"{source}:{shard}:{row}" for source, place in draws for shard, row in [sources[source][place]]]


def golden_hash(kind: str) -> str:
    return hashlib.sha256("\n".join(lines(kind)).encode()).hexdigest()


@pytest.mark.parametrize("kind", sorted(GOLDEN))
def test_order_never_drifts(kind: str) -> None:
    assert len(set(lines(kind))) == {"one bucket": 609, "several buckets": 609, "mixture": 609 + 60 + 5}[kind]
    assert golden_hash(kind) == GOLDEN[kind]


def test_order_does_not_depend_on_the_seed_of_hashes() -> None:
    code = f"""
import runpy
names = runpy.run_path({str(Path(__file__).resolve())!r})
print(*[names["golden_hash"](kind) for kind in names["GOLDEN"]])
"""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": root}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == list(GOLDEN.values())
