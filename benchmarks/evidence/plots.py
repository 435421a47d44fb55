"""The evidence as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.evidence.claims import CLAIMS, LORA
from benchmarks.evidence.sizes import Trial
from benchmarks.evidence.tables import MEASURES, Row, of
from benchmarks.evidence.tempo import STEPS
from benchmarks.evidence.units import VARIANTS, Place, Unit
from dydit_scale.report.inputs import Missing, read_run

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "evidence", "font.size": 9}
OURS, STATIC, PEERS, PARTS = "#0072b2", "#666666", "#e69f00", "#009e73"
STYLES: dict[str, tuple[str, str]] = {
    "base": (STATIC, "o"), "static": (STATIC, "s"), "narrow": (PEERS, "v"), "uniform": (PEERS, "D"),
    "random": (PEERS, "X"), "width": (PARTS, "<"), "tokens": (PARTS, ">"), "complete": ("#cc79a7", "P"),
    "alone": ("#cc79a7", "*"), "dynamic-0.7": (OURS, "o"), "dynamic-0.5": (OURS, "o"), "dynamic-0.3": (OURS, "o"),
}  # fmt: skip
"""Colour and mark of each variant."""


def save(figure: Figure, file: Path) -> None:
    """Write a figure; equal numbers give equal files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def half(found: dict[str, list[Row]], trials: dict[str, Trial], file: Path) -> None:
    """Quality against MACs, a column for each family."""
    measures = ("score", "mse")
    figure = Figure(figsize=(3.1 * len(found), 6.4), layout="constrained")
    grid = figure.subplots(len(measures), len(found), squeeze=False)
    for column, (trial, units) in enumerate(found.items()):
        for line, measure in enumerate(measures):
            axes = grid[line][column]
            _against_macs(axes, units, measure)
            if not line:
                axes.set_title(trials[trial].title, loc="left")
            if not column:
                axes.set_ylabel(f"{MEASURES[measure][0]}, {'higher' if measure == 'score' else 'lower'} is better")
            if line == len(measures) - 1:
                axes.set_xlabel("MACs, share of the static model")
    shown = [v for v in STYLES if any(of(units, v, "mse") for units in found.values())]
    figure.legend(handles=[_mark(v) for v in shown if v not in ("dynamic-0.7", "dynamic-0.3")],
                  loc="outside upper center", ncols=4, frameon=False)  # fmt: skip
    save(figure, file)


def _mark(variant: str) -> Line2D:
    colour, marker = STYLES[variant]
    line = "-" if variant == "dynamic-0.5" else ""
    title = "dynamic, lambda 0.3, 0.5, 0.7" if line else VARIANTS[variant].title
    return Line2D([], [], color=colour, marker=marker, ls=line, label=title)


def _against_macs(axes: Any, units: Sequence[Row], measure: str) -> None:
    for variant, (colour, marker) in STYLES.items():
        x, y = of(units, variant, "ratio"), of(units, variant, measure)
        if y:
            axes.plot(x, y, marker, color=colour, ms=3, alpha=0.35, ls="")
            axes.plot(np.mean(x), np.mean(y), marker, color=colour, ms=7, ls="")
    line = [v for v in ("dynamic-0.3", "dynamic-0.5", "dynamic-0.7") if of(units, v, measure)]
    means = [(np.mean(of(units, v, "ratio")), np.mean(of(units, v, measure))) for v in line]
    axes.plot(*zip(*means, strict=True), "-", color=OURS, lw=1.2)
    if of(units, "static", measure):
        axes.axhline(np.mean(of(units, "static", measure)), color=STATIC, lw=0.8, ls="--", zorder=0)
    axes.set_xlim(0.2, 1.05)
    if measure == "mse":
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")
    _clean(axes)


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def td_lora(units: Sequence[Row], file: Path) -> None:
    """A line of dots for each adapter."""
    rows = [*LORA, "dynamic-0.5"]
    measures = ("score", "frechet", "mse")
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        for place, variant in enumerate(rows):
            colour = OURS if variant.startswith("td") else PEERS if variant == "lora" else PARTS
            values = of(units, variant, measure)
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, ms=4)
            axes.plot(np.mean(values), place, "|", color=colour, ms=16, mew=2.5)
        static = of(units, "static", measure)
        axes.axvline(np.mean(static), color=STATIC, ls="--", lw=0.8)
        axes.set_xlabel(MEASURES[measure][0])
        axes.set_yticks(range(len(rows)), [*(VARIANTS[v].title for v in LORA), "all weights"])
        axes.invert_yaxis() if measure == measures[0] else None
        _clean(axes)
    figure.legend(handles=[Line2D([], [], color=STATIC, ls="--", label="static, fine-tuned, all MACs")],
                  loc="outside upper right", frameon=False)  # fmt: skip
    save(figure, file)


def calibration(units: Sequence[Row], file: Path) -> None:
    """For each temperature the ratio in training and the one by threshold, a pair for each seed."""
    figure = Figure(figsize=(5.4, 2.4), layout="constrained")
    axes = figure.subplots()
    temperatures = {"dynamic-0.5": "1", "tau-2": "2", "tau-5": "5"}
    for place, variant in enumerate(temperatures):
        pairs = zip(of(units, variant, "ratio_training"), of(units, variant, "ratio"), strict=True)
        for n, (training, sampling) in enumerate(pairs):
            y = place + 0.18 * (n - 1)
            axes.plot([training, sampling], [y, y], "-", color="#bbbbbb", lw=1, zorder=0)
            axes.plot(training, y, "o", mfc="white", mec=OURS, ms=6)
            axes.plot(sampling, y, "o", color=OURS, ms=6)
    axes.axvline(0.5, color="#bbbbbb", lw=0.8, ls="--", zorder=0)
    axes.set_yticks(range(len(temperatures)), list(temperatures.values()))
    axes.invert_yaxis()
    axes.set_ylabel("temperature")
    axes.set_xlabel("cost ratio, target 0.5")
    marks = [
        Line2D([], [], marker="o", mfc="white", mec=OURS, ls="", label="in training, gates drawn"),
        Line2D([], [], marker="o", color=OURS, ls="", label="by threshold, as sampled"),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=2, frameon=False)
    _clean(axes)
    save(figure, file)


def gates(place: Place, file: Path) -> None:
    """For each family: width over timestep and layer, and over the picture the share of tokens that work."""
    names = CLAIMS["gates"].trials
    figure = Figure(figsize=(12.4, 2.15 * len(names)), layout="constrained")
    rows = figure.subfigures(len(names), 1)
    for row, name in zip(np.atleast_1d(rows), names, strict=True):
        run = read_run(place.run(Unit(name, "dynamic-0.5", place.size.seeds[0])))
        widths, maps = run.widths, run.tokens
        if isinstance(widths, Missing) or isinstance(maps, Missing):
            raise ValueError(f"{name}: the run was not evaluated; run the claim gates first")
        axes = row.subplots(1, 2 + 3 + 4, width_ratios=[0.62, 2, 2, 2, 0.15, 1, 1, 1, 1])
        axes[0].axis("off")
        axes[0].text(0, 0.5, place.size.trials[name].title.replace(" (", "\n("), va="center", fontsize=10)
        axes[4].axis("off")
        panels = (("heads", widths.heads), ("MLP channels", widths.groups), ("tokens", widths.tokens))
        for axis, (title, shares) in zip(axes[1:4], panels, strict=True):
            image = axis.imshow(shares.T, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_xticks([0, len(shares) - 1], ["noise", "picture"], fontsize=8)  # as the sampler goes
            axis.set_yticks(range(len(widths.names)), [str(i + 1) for i in range(len(widths.names))], fontsize=7)
        axes[1].set_ylabel("layer", fontsize=8)
        row.colorbar(image, ax=axes[3], shrink=0.9)
        axes[5].imshow(maps.pictures[0])
        axes[5].set_title("drawn", fontsize=9, loc="left")
        shown = [0, maps.keep.shape[1] // 2, maps.keep.shape[1] - 1]
        for axis, step in zip(axes[6:], shown, strict=True):
            axis.imshow(maps.keep[0, step], vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            axis.set_title(f"t = {maps.timesteps[step]:.0f}", fontsize=9, loc="left")
        for axis in axes[5:]:
            axis.set_xticks([]), axis.set_yticks([])
    save(figure, file)


def tempo(rows: Sequence[Row], file: Path) -> None:
    """Quality against seconds a picture; the number of steps beside each dot."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    colours = {"static": STATIC, "dynamic-0.7": "#56b4e9", "dynamic-0.5": OURS, "dynamic-0.3": "#003f66"}
    for axes, measure in zip(figure.subplots(1, 2), ("frechet", "score"), strict=True):
        for variant, colour in colours.items():
            plain = [r for r in rows if r["variant"] == variant and r["cache"] is None]
            plain.sort(key=lambda r: STEPS.index(r["steps"]))
            x, y = ([1000 * r["seconds"] for r in plain], [r[measure] for r in plain])
            label = "static, fine-tuned" if variant == "static" else VARIANTS[variant].title
            axes.plot(x, y, "o-", color=colour, ms=5, label=label)
            for a, b, r in zip(x, y, plain, strict=True):
                axes.annotate(str(r["steps"]), (a, b), (4, 4), textcoords="offset points", fontsize=7, color=colour)
            cached = [r for r in rows if r["variant"] == variant and r["cache"] is not None]
            if cached:
                axes.plot([1000 * r["seconds"] for r in cached], [r[measure] for r in cached], "x", color=colour,
                          ms=7, mew=2, label=f"{label}, FirstBlockCache")  # fmt: skip
        axes.set_xlabel("milliseconds a picture, text encoding and decoding included")
        axes.set_ylabel(f"{MEASURES[measure][0]}, {'higher' if measure == 'score' else 'lower'} is better")
        axes.set_xlim(left=0)
        _clean(axes)
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def pictures(place: Place, trial: str, variants: Sequence[str], real: np.ndarray | None, file: Path) -> None:
    """The first pictures of each variant and seed 0 below each other, from the same noise and prompts."""
    rows = [] if real is None else [("real", real)]
    rows += [
        (VARIANTS[v].title, np.load(place.pictures(Unit(trial, v, place.size.seeds[0])))["arr_0"]) for v in variants
    ]
    shown = min(12, *(len(p) for _, p in rows))
    figure = Figure(figsize=(9.6, 0.66 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), shown + 1, squeeze=False, width_ratios=[3.2, *[1] * shown])
    for line, (title, drawn) in zip(grid, rows, strict=True):
        for axes in line:
            axes.axis("off")
        line[0].text(1, 0.5, title, ha="right", va="center", fontsize=8)
        for axes, picture in zip(line[1:], drawn, strict=False):
            axes.imshow(picture if picture.ndim == 3 else picture[len(picture) // 2], interpolation="nearest")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
