"""Charts as inline SVG. Colours come from the page's style, so that they follow its light and dark theme."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dydit_scale.report.markup import Html, el, join
from dydit_scale.report.units import DASH, fixed

FloatArray = NDArray[np.float64]
WIDE, HALF = 1080, 528
LEVELS = 20
_CHARACTER = 6.4  # mean advance of an 11 px label


class Series(NamedTuple):
    """One quantity of a line chart; ``colour`` is a class of the style sheet (c-dynamic, c-evaluation ...)."""

    name: str
    x: FloatArray
    y: FloatArray
    colour: str
    kind: Literal["line", "raw", "dashed", "points"] = "line"
    latest: str = ""
    """Latest value as text, shown in the legend."""


class _Axis(NamedTuple):
    """A linear map from values to pixels; ``start`` and ``end`` are the pixels of ``low`` and ``high``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, values: FloatArray) -> FloatArray:
        share = (np.clip(values, self.low, self.high) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def at(self, value: float) -> float:
        """The pixel of one value."""
        return float(self(np.array(value)))


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in ``low``..``high``, about that many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    words = fixed(value + 0.0, max(0, -math.floor(math.log10(step) + 1e-9)))
    return words if max(ticks) >= 10_000 else words.replace(",", "")


def _text(words: str, x: float, y: float, style: str) -> Html:
    return el("text", words, x=round(x, 1), y=round(y, 1), class_=style)


def _svg(width: float, height: float, label: str, *parts: str) -> Html:
    box = f"0 0 {width:g} {height:g}"
    chart = el("svg", *parts, viewBox=box, role="img", aria_label=label, style=f"min-width:{min(width, 440):g}px")
    return el("div", chart, class_="scroll")


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    width: int = HALF,
    height: int = 270,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Html:
    """Lines over a common x axis; values outside the shown range are drawn at its edge.

    ``x_range`` may run backwards, as sampling does from timestep 1000 to 0. Without a range the data give it.
    """
    shown = [one for one in series if one.x.size]
    low, high = y_range or _range_of(shown)
    y_ticks = nice_ticks(low, high)
    left = 14 + _CHARACTER * max(len(_tick_text(value, y_ticks)) for value in y_ticks)
    right = width - 22
    first, last = x_range or (min(one.x.min() for one in shown), max(one.x.max() for one in shown))
    x_axis = _Axis(first, last, left, right) if last > first else _Axis(last, first, right, left)
    y_axis = _Axis(low, high, height - 42, 26)
    return _svg(
        width,
        height,
        label,
        _y_grid(y_axis, y_ticks, left, right),
        _x_ticks(x_axis, nice_ticks(x_axis.low, x_axis.high, 6), height - 42),
        _text(y_label, 0, 11, "axis"),
        _text(x_label, (left + right) / 2, height - 4, "axis middle"),
        *(_draw(one, x_axis, y_axis) for one in shown),
    )


def _range_of(series: Sequence[Series]) -> tuple[float, float]:
    """From the smooth lines' extremes and the middle 98 % of the raw ones: one spike does not flatten the rest."""
    ends = [
        np.quantile(one.y, [0.01, 0.99]) if one.kind == "raw" else np.array([one.y.min(), one.y.max()])
        for one in series
    ]
    low, high = float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _y_grid(axis: _Axis, ticks: Sequence[float], left: float, right: float) -> Html:
    pixels = axis(np.array(ticks))
    lines = (el("line", x1=left, x2=right, y1=round(y, 1), y2=round(y, 1), class_="grid") for y in pixels)
    words = (
        _text(_tick_text(value, ticks), left - 8, y + 4, "tick end") for value, y in zip(ticks, pixels, strict=True)
    )
    return join([*lines, *words])


def _x_ticks(axis: _Axis, ticks: Sequence[float], bottom: float) -> Html:
    baseline = el(
        "line", x1=min(axis.start, axis.end), x2=max(axis.start, axis.end), y1=bottom, y2=bottom, class_="base"
    )
    pixels = axis(np.array(ticks))
    words = [
        _text(_tick_text(value, ticks), x, bottom + 17, "tick middle") for value, x in zip(ticks, pixels, strict=True)
    ]
    return join([baseline, *words])


def _draw(series: Series, x_axis: _Axis, y_axis: _Axis) -> Html:
    x, y = x_axis(series.x), y_axis(series.y)
    if series.kind == "points" or len(x) == 1:
        return join(
            el("circle", cx=round(a, 1), cy=round(b, 1), r=3, class_=f"dot {series.colour}")
            for a, b in zip(x, y, strict=True)
        )
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    return el("path", d=path, class_=f"{series.kind} {series.colour}")


def heat_map(
    values: FloatArray, columns: Sequence[str], rows: Sequence[str], *, label: str, x_label: str, width: int = HALF
) -> Html:
    """Shares in 0..1 as cells, ``values[column, row]``; NaN cells are left empty. Small maps print the percentages."""
    names = [row if len(row) <= 22 else f"…{row[-21:]}" for row in rows]
    left = 12 + _CHARACTER * max(len(name) for name in names)
    across = (width - 2 - left) / len(columns)
    down = min(30.0, max(7.0, round(216 / len(rows))))
    bottom = 6 + down * len(rows)
    written = across >= 26 and down >= 16
    every_row, every_column = math.ceil(12 / down), math.ceil(34 / across)
    row_words = [
        _text(name, left - 8, 6 + down * (row + 0.5) + 4, "tick end")
        for row, name in enumerate(names)
        if row % every_row == 0
    ]
    column_words = [
        _text(column, left + across * (index + 0.5), bottom + 16, "tick middle")
        for index, column in enumerate(columns)
        if index % every_column == 0
    ]
    return _svg(
        width,
        bottom + 42,
        label,
        el("rect", x=left, y=6, width=across * len(columns), height=bottom - 6, class_="void"),
        _cells(values, left, across, down),
        _cell_words(values, left, across, down) if written else "",
        *row_words,
        *column_words,
        _text(x_label, (left + width) / 2, bottom + 37, "axis middle"),
    )


def _cells(values: FloatArray, left: float, across: float, down: float) -> Html:
    """One path per whole percentage, whose tooltip says it: small files even for hundreds of steps and layers."""
    percentages = np.where(np.isfinite(values), np.rint(100 * np.clip(values, 0, 1)), -1).astype(int)
    paths = []
    for value in sorted(set(percentages.ravel().tolist()) - {-1}):
        places = np.argwhere(percentages == value)
        edges = (
            f"M{left + across * column:.2f} {6 + down * row:g}h{across:.2f}v{down:g}h-{across:.2f}z"
            for column, row in places
        )
        paths.append(el("g", el("title", f"{value}\u00a0%"), el("path", d="".join(edges), class_=f"q{_level(value)}")))
    return el("g", *paths, class_="cells")


def _cell_words(values: FloatArray, left: float, across: float, down: float) -> Html:
    words = []
    for column, row in np.argwhere(np.isfinite(values)):
        value = round(100 * float(np.clip(values[column, row], 0, 1)))
        style = "low" if _level(value) < 9 else "mid" if _level(value) < 14 else "high"
        words.append(_text(str(value), left + across * (column + 0.5), 6 + down * (row + 0.5) + 4, f"cell {style}"))
    return join(words)


def _level(percentage: int) -> int:
    return round(percentage * LEVELS / 100)


def grouped_bars(
    groups: Mapping[str, Sequence[float | None]], colours: Sequence[str], *, label: str, width: int = WIDE
) -> Html:
    """Shares in 0..1 as upright bars in percent, a number on each; None leaves a gap with a dash."""
    height, left, bottom = 294, 34, 246
    y_axis = _Axis(0.0, 1.0, bottom, 30)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    across = (width - left) / len(groups)
    bar = min(34.0, across * 0.78 / len(colours))
    parts: list[Html] = [_y_percent(y_axis, ticks, left, width), _text("prompts judged right, %", 0, 11, "axis")]
    for index, (name, shares) in enumerate(groups.items()):
        middle = left + across * (index + 0.5)
        lines = textwrap.wrap(name, max(8, int(across / _CHARACTER)))[:2]
        parts += [_text(line, middle, bottom + 18 + 14 * row, "tick middle") for row, line in enumerate(lines)]
        for place, (share, colour) in enumerate(zip(shares, colours, strict=True)):
            x = middle + bar * (place - len(colours) / 2)
            top = float(y_axis(np.array(share or 0.0)))
            if share is not None:
                shape = {"x": x + 1.5, "y": top, "width": bar - 3, "height": bottom - top, "rx": 1.5}
                parts.append(el("rect", class_=f"bar {colour}", **shape))
            words = DASH if share is None else str(round(100 * share))
            parts.append(_text(words, x + bar / 2, top - 5, "number middle"))
    return _svg(width, height, label, *parts)


def _y_percent(axis: _Axis, ticks: Sequence[float], left: float, right: float) -> Html:
    pixels = axis(np.array(ticks))
    lines = (
        el("line", x1=left, x2=right, y1=y, y2=y, class_="grid" if tick else "base")
        for tick, y in zip(ticks, pixels, strict=True)
    )
    words = (_text(f"{100 * tick:.0f}", left - 8, y + 4, "tick end") for tick, y in zip(ticks, pixels, strict=True))
    return join([*lines, *words])


def lying_bars(bars: Sequence[tuple[str, float, str, str]], *, label: str, width: int = HALF) -> Html:
    """Rows of (name, length, text beside the bar, colour class), all from zero on one scale."""
    left = 12 + _CHARACTER * max(len(name) for name, *_ in bars)
    room = width - left - 12 - _CHARACTER * 1.1 * max(len(words) for _, _, words, _ in bars)
    longest = max(length for _, length, _, _ in bars)
    parts: list[Html] = []
    for row, (name, length, words, colour) in enumerate(bars):
        y, end = 4 + 38 * row, left + room * length / longest
        parts.append(_text(name, left - 10, y + 18, "tick end"))
        parts.append(el("rect", x=left, y=y, width=end - left, height=26, rx=1.5, class_=f"bar {colour}"))
        parts.append(_text(words, end + 8, y + 18, "number"))
    return _svg(width, 4 + 38 * len(bars), label, *parts)


def histogram(
    counts: Sequence[int],
    names: Sequence[str],
    *,
    label: str,
    x_label: str,
    y_label: str = "samples",
    width: int = HALF,
    colour: str = "c-dynamic",
) -> Html:
    """Upright bars; ``names`` are those of the bars or, one more of them, of the edges between the bars."""
    height, top = 280, 26
    bottom = height - 42
    high = float(max(counts)) or 1.0
    ticks = [tick for tick in nice_ticks(0.0, high, 4) if tick == round(tick)]
    left = 14 + _CHARACTER * max(len(_tick_text(tick, ticks)) for tick in ticks)
    y_axis = _Axis(0.0, high, bottom, top)
    across = (width - 22 - left) / len(counts)
    between = len(names) == len(counts) + 1
    # Labels are thinned out until they stand apart.
    every = math.ceil((10 + _CHARACTER * max(len(name) for name in names)) / across)
    words = [
        _text(name, left + across * (place if between else place + 0.5), bottom + 17, "tick middle")
        for place, name in enumerate(names)
        if place % every == 0
    ]
    # Bars with names of their own need not touch.
    bar = across - min(3.0, 0.2 * across) if between else min(0.8 * across, 64.0)
    bars = []
    for place, value in enumerate(counts):
        y = min(y_axis.at(value), bottom - 1.0) if value else bottom
        name = f"{names[place]} to {names[place + 1]}" if between else names[place]
        shape = {"x": left + across * (place + 0.5) - bar / 2, "y": y, "width": bar, "height": bottom - y}
        bars.append(el("g", el("title", f"{name}: {value:,}"), el("rect", class_=f"bar {colour}", **shape)))
    base = el("line", x1=left, x2=width - 22, y1=bottom, y2=bottom, class_="base")
    return _svg(
        width,
        height,
        label,
        _y_grid(y_axis, ticks, left, width - 22),
        *bars,
        base,
        *words,
        _text(y_label, 0, 11, "axis"),
        _text(x_label, (left + width - 22) / 2, height - 4, "axis middle"),
    )


class Spot(NamedTuple):
    """A place on a chart of spots and what lies there."""

    x: float
    y: float
    weight: int
    words: str
    """Shown under the pointer."""


def spots(
    found: Sequence[Spot],
    marks: Sequence[tuple[float, float]],
    *,
    label: str,
    x_label: str,
    y_label: str,
    width: int = HALF,
) -> Html:
    """Discs whose areas are weights over two axes of octaves, and hollow squares at ``marks``."""
    height = 280
    every = [(spot.x, spot.y) for spot in found] + list(marks)
    x_ticks, y_ticks = _octaves([x for x, _ in every]), _octaves([y for _, y in every])
    left = 14 + _CHARACTER * max(len(f"{tick:g}") for tick in y_ticks)
    x_axis = _Axis(math.log2(x_ticks[0]), math.log2(x_ticks[-1]), left, width - 22)
    y_axis = _Axis(math.log2(y_ticks[0]), math.log2(y_ticks[-1]), height - 42, 26)
    most, largest = max(spot.weight for spot in found), min(16.0, max(5.0, 130 / math.sqrt(len(found))))
    discs = []
    for spot in sorted(found, key=lambda spot: -spot.weight):
        x, y = x_axis.at(math.log2(spot.x)), y_axis.at(math.log2(spot.y))
        radius = max(1.5, largest * math.sqrt(spot.weight / most))
        disc = el("circle", cx=round(x, 1), cy=round(y, 1), r=round(radius, 1), class_="spot c-dynamic")
        discs.append(el("g", el("title", spot.words), disc))
    squares = [
        el(
            "rect",
            x=float(x_axis(np.log2(x))) - 4,
            y=float(y_axis(np.log2(y))) - 4,
            width=8,
            height=8,
            class_="mark-at",
        )
        for x, y in marks
    ]
    columns = [
        _text(f"{tick:g}", x_axis.at(math.log2(tick)), height - 25, "tick middle")
        for tick in _apart(x_ticks, x_axis, 40)
    ]
    rows = []
    for tick in _apart(y_ticks, y_axis, 20):
        line = round(y_axis.at(math.log2(tick)), 1)
        rows.append(el("line", x1=left, x2=width - 22, y1=line, y2=line, class_="grid"))
        rows.append(_text(f"{tick:g}", left - 8, line + 4, "tick end"))
    return _svg(
        width,
        height,
        label,
        *rows,
        *columns,
        *discs,
        *squares,
        _text(y_label, 0, 11, "axis"),
        _text(x_label, (left + width - 22) / 2, height - 4, "axis middle"),
    )


def _octaves(values: Sequence[float]) -> list[float]:
    """Powers of two and the numbers halfway between them, from below the least value to above the greatest."""
    first, last = math.floor(2 * math.log2(min(values)) - 0.2), math.ceil(2 * math.log2(max(values)) + 0.2)
    return [2.0 ** (half // 2) * (1.5 if half % 2 else 1.0) for half in range(first, last + 1)]


def _apart(ticks: Sequence[float], axis: _Axis, pixels: float) -> list[float]:
    """Those of ``ticks`` that leave room for a label each; powers of two first."""
    step = abs(axis.end - axis.start) / max(1e-9, axis.high - axis.low)
    octaves = [tick for tick in ticks if math.log2(tick) % 1 == 0]
    if step / 2.5 >= pixels or len(octaves) < 2:
        return list(ticks)
    return octaves[:: math.ceil(pixels / step)]
