"""Several sources of samples mixed by weight into one stream, of which every position is a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dydit_scale.data.position import Turns, shuffled_turns

MAX_ROUND = 1000
"""Units after which every source had its share exactly."""
TOLERANCE = 0.05
"""How far a share may be from the one that is asked for, relative to it."""


class Draw(NamedTuple):
    """Where a position of the mixture is read."""

    source: int
    position: int
    """In the source's own stream."""


class Mixture:
    """``mixture[position]`` for every position >= 0: units of ``unit`` positions, each of which continues one source.

    Rounds of at most ``MAX_ROUND`` units hold each source as often as its weight says, in an order of their own. With
    one source the mixture is that source's stream.

    Args:
        weights: of the sources, positive; their proportions count.
        unit: consecutive positions, from a multiple of it, that come from one source.
        seed: the run's seed.
    """

    def __init__(self, weights: Sequence[float], unit: int, seed: int) -> None:
        self.shares = np.array(whole_shares(weights))
        self._unit, self._seed = unit, int(seed)
        self._round = (-1, Turns(np.zeros(0), np.zeros(0)))

    def __getitem__(self, position: int) -> Draw:
        if len(self.shares) == 1:
            return Draw(0, position)
        unit, row = divmod(position, self._unit)
        number, place = divmod(unit, int(self.shares.sum()))
        if number != self._round[0]:
            self._round = (number, shuffled_turns(self.shares, self._seed, "sources", number))
        turns = self._round[1]
        source = int(turns.parts[place])
        before = number * int(self.shares[source]) + int(turns.turns[place])
        return Draw(source, before * self._unit + row)


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The positive integers of a sum of at most ``MAX_ROUND`` whose proportions are nearest to those of ``weights``;
    the smallest of those equally near.

    Raises ValueError, with weights that are possible, if a share is further than ``TOLERANCE`` from what is asked for.
    """
    if not 1 <= len(weights) <= MAX_ROUND:
        raise ValueError(f"data.sources: expected 1 to {MAX_ROUND} sources, got {len(weights)}")
    if len(weights) == 1:
        return (1,)
    exact = np.array(weights, dtype=np.float64) / sum(weights)
    candidates = [np.maximum(1, np.rint(exact * total)).astype(int) for total in range(len(weights), MAX_ROUND + 1)]
    allowed = [shares for shares in candidates if shares.sum() <= MAX_ROUND]
    errors = [round(float(abs(shares / shares.sum() - exact).max()), 9) for shares in allowed]
    nearest = allowed[int(np.argmin(errors))]
    off = nearest / nearest.sum() / exact - 1
    if abs(off).max() > TOLERANCE:
        worst = int(np.argmax(abs(off)))
        raise ValueError(
            f"data.sources[{worst}]: its weight {weights[worst]:g} asks for {100 * exact[worst]:.3g} % of the samples, "
            f"but {100 * nearest[worst] / nearest.sum():.3g} % is the nearest possible (shares are whole numbers of a "
            f"sum of at most {MAX_ROUND}); set the weights to {', '.join(map(str, nearest))}, or join small sources "
            "into one"
        )
    return tuple(nearest.tolist())
