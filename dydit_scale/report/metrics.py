"""metrics.jsonl as curves over steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_POINTS = 1200


class Curve(NamedTuple):
    """One quantity over optimiser steps, finite and sorted by step."""

    steps: FloatArray  # [points]
    values: FloatArray  # [points]

    @property
    def last(self) -> float | None:
        """The latest value, or None when there is none."""
        return float(self.values[-1]) if self.values.size else None


class Metrics(NamedTuple):
    """What a run logged, and how much of the file could not be used."""

    curves: dict[str, Curve]
    skipped: tuple[int, ...]
    """Numbers, from 1, of the lines that are no JSON object with a step."""
    not_finite: int
    """Values left out because they are NaN or infinite."""

    def curve(self, key: str) -> Curve:
        """The curve of ``key``, empty when the run did not log it."""
        return self.curves.get(key, Curve(np.zeros(0), np.zeros(0)))


def read_metrics(path: Path) -> Metrics:
    """Read one JSON object per line; lines that cannot be read are skipped and counted.

    A training line whose step goes backwards means a resumed run: what was logged from that step on is forgotten.
    """
    points: dict[str, dict[int, float]] = {}
    skipped: list[int] = []
    not_finite, newest = 0, -1
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = _record(line)
            if record is None:
                skipped.append(number)
                continue
            step = int(record.pop("step"))
            if "loss" in record:
                if step < newest:
                    _forget(points, step)
                newest = step
            for key, value in record.items():
                if math.isfinite(value):
                    points.setdefault(key, {})[step] = value
                else:
                    not_finite += 1
    return Metrics({key: _curve(found) for key, found in points.items()}, tuple(skipped), not_finite)


def _record(line: str) -> dict[str, float] | None:
    """The numbers of one line, or None when it is no JSON object with a whole step from 0 on."""
    try:
        found = json.loads(line, parse_int=float)
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    if not isinstance(step, float) or not step.is_integer() or step < 0:
        return None
    return {key: value for key, value in found.items() if isinstance(value, float)}


def _forget(points: dict[str, dict[int, float]], step: int) -> None:
    for found in points.values():
        for stale in [known for known in found if known >= step]:
            del found[stale]


def _curve(found: dict[int, float]) -> Curve:
    ordered = sorted(found.items())
    return Curve(np.array([step for step, _ in ordered], float), np.array([value for _, value in ordered], float))


def thin(curve: Curve, points: int = _POINTS) -> Curve:
    """At most about ``points`` points: means over equal runs of neighbours."""
    if len(curve.steps) <= points:
        return curve
    starts = np.linspace(0, len(curve.steps), points, endpoint=False).astype(int)
    lengths = np.diff(np.append(starts, len(curve.steps)))
    return Curve(np.add.reduceat(curve.steps, starts) / lengths, np.add.reduceat(curve.values, starts) / lengths)


def extremes(curve: Curve, points: int = _POINTS) -> Curve:
    """At most about ``points`` points that keep the lowest and highest value of each neighbourhood: spikes stay."""
    if len(curve.steps) <= points:
        return curve
    chosen = [
        chunk[index]
        for chunk in np.array_split(np.arange(len(curve.steps)), points // 2)
        for index in sorted({int(curve.values[chunk].argmin()), int(curve.values[chunk].argmax())})
    ]
    return Curve(curve.steps[chosen], curve.values[chosen])


def smooth(curve: Curve, share: float = 0.05) -> Curve:
    """Thinned, then averaged with a Hann window over that share of the run, normalised at both ends."""
    thinned = thin(curve)
    half = round(len(thinned.steps) * share / 2)
    if half < 1:
        return thinned
    window = np.hanning(2 * half + 3)[1:-1]
    weight = np.convolve(np.ones_like(thinned.values), window, mode="same")
    return Curve(thinned.steps, np.convolve(thinned.values, window, mode="same") / weight)
