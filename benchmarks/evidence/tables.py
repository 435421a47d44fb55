"""Numbers of the evidence as Markdown: means over seeds, spreads, and what differs by more than they do."""

from __future__ import annotations

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
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    written = style.format(np.mean(values))
    return written if style in ("{:,.0f}", "{:.2f}") and deviation < 0.005 else f"{written} ± {style.format(deviation)}"


def difference(units: Sequence[Row], one: str, other: str, measure: str) -> str:
    """In words, how ``one`` compares to ``other``, by a paired t-test: runs of a seed share data, noise and prompts."""
    a, b = np.array(of(units, one, measure)), np.array(of(units, other, measure))
    gap = float(a.mean() - b.mean())
    style = MEASURES[measure][1]
    name = MEASURES[measure][0]
    written = f"{name} {style.format(a.mean())} against {style.format(b.mean())}"
    apart = a - b
    error = float(apart.std(ddof=1)) / len(a) ** 0.5 if len(a) > 1 else 0.0
    if not gap:
        return written
    better = "better" if (gap > 0) == (measure in HIGHER_IS_BETTER) else "worse"
    if error < 1e-9 * abs(gap):
        return f"{written}: {better} by as much with every seed" if len(a) > 1 else written
    t = gap / error
    if abs(t) < CRITICAL[min(len(a) - 1, max(CRITICAL))]:
        return f"{written}: not told apart (t = {t:.1f})"
    return f"{written}: {better} (t = {t:.1f})"
