"""Numbers of the evidence as Markdown: means over seeds, spreads, and what differs by more than they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.units import VARIANTS

Row = dict[str, Any]
MEASURES = {
    "ratio": ("MACs", "{:.2f}"), "score": ("judge's score", "{:.3f}"), "frechet": ("Fréchet distance", "{:.2f}"),
    "mse": ("denoising error", "{:.4f}"), "learns": ("parameters", "{:,.0f}"),
}  # fmt: skip
"""What columns are called and how their numbers are written."""
CRITICAL = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
"""Of Student's t, two-sided 5 %, by degrees of freedom."""
HIGHER_IS_BETTER = ("score",)


def of(units: Sequence[Row], variant: str, measure: str) -> list[float]:
    """The values of a variant, seed by seed."""
    return [unit[measure] for unit in units if unit["variant"] == variant and measure in unit]


def table(units: Sequence[Row], variants: Sequence[str], measures: Sequence[str]) -> str:
    """A line for each variant, mean ± standard deviation over seeds."""
    lines = [f"| | {' | '.join(MEASURES[m][0] for m in measures)} |", "|---" * (len(measures) + 1) + "|"]
    for variant in variants:
        cells = [_cell(of(units, variant, measure), MEASURES[measure][1]) for measure in measures]
        lines.append(f"| {VARIANTS[variant].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], style: str) -> str:
    if not values:
        return ""
    written = style.format(np.mean(values))
    same = style in ("{:,.0f}", "{:.2f}") and np.std(values) < 0.005
    return written if same else spread(values, style)


def spread(values: Sequence[float], style: str) -> str:
    """Mean ± standard deviation."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{style.format(np.mean(values))} ± {style.format(deviation)}"


def comparisons(units: Sequence[Row], pairs: Sequence[tuple[str, str, str]], measures: Sequence[str]) -> str:
    """A line for each pair (one, other, title) that was measured: the mean differences with their 95 % intervals by a
    paired t-test, for runs of a seed share data, noise and prompts."""
    lines = [f"| | MACs | {' | '.join(MEASURES[m][0] for m in measures)} |", "|---" * (len(measures) + 2) + "|"]
    for one, other, title in pairs:
        if of(units, one, "mse") and of(units, other, "mse"):
            ratios = " / ".join(f"{np.mean(of(units, variant, 'ratio')):.2f}" for variant in (one, other))
            cells = [difference(units, one, other, measure) for measure in measures]
            lines.append(f"| {title} | {ratios} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(units: Sequence[Row], one: str, other: str, measure: str) -> str:
    """How ``one`` differs from ``other``; "better" or "worse" where the interval leaves out zero."""
    gap, width = interval(units, one, other, measure)
    style = MEASURES[measure][1]
    said = style.replace(":", ":+").format(gap)
    if math.isfinite(width):
        said = f"{said} ± {style.format(width)}"
    if not abs(gap) > width:
        return said
    return f"**{said}** {'better' if (gap > 0) == (measure in HIGHER_IS_BETTER) else 'worse'}"


def best_of(units: Sequence[Row], variants: Sequence[str], measure: str) -> str:
    """The variant that does best on the mean of its seeds, of those that were measured."""
    sign = 1 if measure in HIGHER_IS_BETTER else -1
    return max(
        (v for v in variants if of(units, v, measure)), key=lambda v: sign * float(np.mean(of(units, v, measure)))
    )


def is_worse(units: Sequence[Row], one: str, other: str, measure: str) -> bool:
    """Whether ``one`` is, by more than the seeds' spread explains."""
    return difference(units, one, other, measure).endswith(" worse")


def interval(units: Sequence[Row], one: str, other: str, measure: str) -> tuple[float, float]:
    """Mean of ``one`` minus ``other`` over seeds, and half the width of its 95 % interval; infinite for one seed, and
    where all seeds differ by the same, as shares of a hundred pictures may by chance: it tells no spread."""
    apart = np.array(of(units, one, measure)) - np.array(of(units, other, measure))
    if len(apart) < 2 or np.ptp(apart) < 1e-12:
        return float(apart.mean()), math.inf
    error = float(apart.std(ddof=1)) / len(apart) ** 0.5
    return float(apart.mean()), error * CRITICAL[min(len(apart) - 1, max(CRITICAL))]
