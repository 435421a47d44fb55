"""One self-contained HTML page for a data set."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dydit_scale.data.summary import Example, Summary, Use
from dydit_scale.report.charts import Spot, histogram, nice_ticks, spots
from dydit_scale.report.layout import Column, Figure, document, figures, masthead, section, table, tile
from dydit_scale.report.markup import Html, el, join
from dydit_scale.report.pictures import is_small, picture_uri
from dydit_scale.report.units import DASH, count, fixed, percent, with_prefix

_MANY_SIZES = 300
NO_PICTURES = "None: encoded samples are latents, not pictures. Summarize the shards that they were made of."
_CLASSES = 64
_LISTED = 12
_CAPTION, _SHOT_CAPTION = 160, 90


class Bins(NamedTuple):
    """A histogram: the numbers in its bars, and the names of the bars or of their edges."""

    counts: list[int]
    names: list[str]
    note: str = ""


def render_dataset(summary: Summary, uses: Sequence[Use], name: str, date: datetime.date) -> Html:
    """The page as text; ``uses`` say what recipes make of the samples."""
    sections = {
        "examples": _examples(summary),
        "pictures": _pictures(summary, uses),
        "captions": _captions(summary),
        "labels": _labels(summary),
        "buckets": _buckets(uses, int(summary.good.sum())),
        "unusable": _unusable(summary),
    }
    shown = {link: part for link, part in sections.items() if part}
    facts = [f"digest {summary.index.digest[:12]}", f"summary of {date.isoformat()}"]
    head = masthead("data set", name, facts, list(shown))
    return document(f"{name} · dydit_scale data", head, _tiles(summary), _notices(summary), *shown.values())


def _tiles(summary: Summary) -> Html:
    index, captions = summary.index, summary.captions
    good = int(summary.good.sum())
    clips = 0 if summary.clips is None else len(summary.clips)
    kinds = ", ".join(_some(number, what) for number, what in ((clips, "clip"), (good - clips, "picture")) if number)
    middle = f"{np.median(captions.characters):.0f} characters" if captions.read else "no caption"
    labelled = 0 if index.labels is None else int((index.labels[summary.good] >= 0).sum())
    share = f"{percent(labelled / good)} with a label" if labelled and good else "no labels"
    return el(
        "div",
        tile("Samples", count(index.num_samples), kinds or "none is usable"),
        tile("Size", with_prefix(summary.shard_bytes, "B"), f"in {_some(len(index.shards), 'shard')}"),
        tile("Median picture", _median_size(summary), f"{with_prefix(_median(summary, 'image_bytes'), 'B')} each"),
        tile("With a caption", percent(captions.present / good if good else None), f"{middle}; {share}"),
        tile("Unusable", count(len(index.bad)), f"and {_some(len(index.broken), 'shard')} left out"),
        class_="tiles",
    )


def _median(summary: Summary, field: str) -> float:
    values = summary.column(field)
    return float(np.median(values)) if len(values) else math.nan


def _median_size(summary: Summary) -> str:
    width, height = (_median(summary, side) for side in ("width", "height"))
    return DASH if math.isnan(width) else f"{width:.0f} × {height:.0f}"


def _notices(summary: Summary) -> Html:
    if not summary.changed:
        return Html("")
    named = "; ".join(summary.changed[:3]) + (" …" if len(summary.changed) > 3 else "")
    words = f"{_some(len(summary.changed), 'sample')} drawn for this page changed since indexed: {named}. "
    return el("p", words, el("code", f"dydit data check {summary.index.folder}"), " finds all.", class_="notice")


def _examples(summary: Summary) -> Html:
    if summary.index.encoding is not None:
        return section("examples", "Examples", NO_PICTURES)
    if not summary.examples:
        return Html("")
    lead = f"{_some(len(summary.examples), 'sample')}, drawn by lot and the same each time."
    if any(example.frames for example in summary.examples):
        lead += " Of clips the first frame."
    return section("examples", "Examples", lead, el("div", *map(_shot, summary.examples), class_="shots"))


def _shot(example: Example) -> Html:
    height, width = example.picture.shape[:2]
    picture = el(
        "img",
        src=picture_uri(example.picture),
        alt=example.caption or example.name,
        title=example.name,
        class_="crisp" if is_small(height, width) else None,
        loading="lazy",
    )
    facts = [f"{example.size[0]} × {example.size[1]}"]
    facts += [f"{example.frames} frames"] if example.frames else []
    facts += [f"label {example.label}"] if example.label is not None else []
    caption = "(no caption)" if example.caption is None else _cut(example.caption, _SHOT_CAPTION) or "(empty caption)"
    return el("figure", picture, el("figcaption", caption, el("span", ", ".join(facts))))


def _pictures(summary: Summary, uses: Sequence[Use]) -> Html:
    width, height = summary.column("width"), summary.column("height")
    if not len(width):
        return Html("")
    found, note = _sizes(width, height)
    marks = sorted({(float(one.bucket.width), float(one.bucket.height)) for use in uses for one in use.buckets})
    legend = [("swatch disc c-dynamic", "area: samples")] + ([("swatch hollow", "bucket of a recipe")] if marks else [])
    swatches = el("div", *(el("span", el("i", class_=style), words) for style, words in legend), class_="legend")
    resolutions = partial(
        spots, found, marks, label="Width and height of the pictures", x_label="width in pixels", y_label="height"
    )
    parts = [
        Figure("Resolutions", lambda wide: resolutions(width=wide), swatches, note),
        _figure("Aspect ratios", _aspect_bins(width / height), "width / height", "c-supervision"),
        _figure("File sizes", _size_bins(summary.column("image_bytes")), "bytes of a picture or clip", "c-control"),
    ]
    if summary.clips is not None and len(summary.clips):
        parts.append(_figure("Frames", _number_bins(summary.clips), "frames of a clip", "c-evaluation"))
    return section("pictures", "Pictures", "As stored, upright; unusable samples are left out.", figures(parts))


def _figure(title: str, bins: Bins, x_label: str, colour: str) -> Figure:
    draw = partial(histogram, bins.counts, bins.names, label=title, x_label=x_label, colour=colour)
    return Figure(title, lambda width: draw(width=width), note=bins.note)


def _sizes(width: np.ndarray, height: np.ndarray) -> tuple[list[Spot], str]:
    """The different resolutions; where there are too many, those within a twelfth of an octave as one."""
    pairs, counts = _pairs(width, height)
    note = ""
    if len(pairs) > _MANY_SIZES:
        note = f"{count(len(pairs))} different sizes; those within 6 % of one another are drawn as one."
        pairs, counts = _pairs(*(np.rint(2 ** (np.rint(12 * np.log2(side)) / 12)) for side in (width, height)))
    found = [
        Spot(float(w), float(h), int(number), f"{w:.0f} × {h:.0f}: {count(number)}")
        for (w, h), number in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return found, note


def _pairs(width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[different, 2] widths and heights, and how often each comes."""
    joined, counts = np.unique((width.astype(np.int64) << 32) | height.astype(np.int64), return_counts=True)
    return np.stack([joined >> 32, joined & 0xFFFFFFFF], axis=1), counts


def _aspect_bins(aspects: np.ndarray) -> Bins:
    """A bar for each sixth of an octave around the square."""
    steps = np.clip(np.rint(6 * np.log2(aspects)), -15, 15).astype(int)
    reach = max(3, int(np.abs(steps).max()))
    counts = np.bincount(steps + reach, minlength=2 * reach + 1).tolist()
    names = [fixed(2 ** (step / 6), 2) for step in range(-reach, reach + 1)]
    return Bins(counts, names, "The outermost bars hold all beyond them." if reach == 15 else "")


def _size_bins(sizes: np.ndarray) -> Bins:
    low, high = max(1, int(sizes.min())), int(sizes.max())
    if high < 8 * low:
        return _linear_bins(sizes, _bytes)
    round_sizes = np.outer(10.0 ** np.arange(12), (1, 1.5, 2, 3, 5, 7)).ravel()
    first, last = np.searchsorted(round_sizes, low, "right") - 1, np.searchsorted(round_sizes, high, "right")
    edges = round_sizes[first : last + 1]
    return Bins(np.histogram(sizes, edges)[0].tolist(), [_bytes(edge) for edge in edges.tolist()])


def _bytes(value: float) -> str:
    """A round number of bytes: 500 B, 1.5 kB, 20 kB."""
    power = min(4, int(math.log10(max(1.0, value)) // 3))
    return f"{value / 1000**power:.4g}\u00a0{('', 'k', 'M', 'G', 'T')[power]}B"


def _number_bins(values: np.ndarray) -> Bins:
    """A bar for each number if they are few."""
    different, counts = np.unique(values, return_counts=True)
    if len(different) <= 16:
        return Bins(counts.tolist(), [count(value) for value in different])
    return _linear_bins(values, count)


def _linear_bins(values: np.ndarray, name: Callable[[float], str]) -> Bins:
    """Bars of equal, round width from the least value on; the last one also holds the largest half per cent."""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    about = nice_ticks(low, max(high, low + 20), 20)
    step = max(1.0, about[1] - about[0])
    edges = step * np.arange(math.floor(low / step), math.floor(high / step) + 2)
    counts = np.histogram(np.minimum(values, edges[-1]), edges)[0].tolist()
    note = f"The last bar also holds those up to {name(float(values.max()))}." if values.max() > edges[-1] else ""
    return Bins(counts, [name(edge) for edge in edges.tolist()], note)


def _captions(summary: Summary) -> Html:
    captions = summary.captions
    if not captions.read:
        return Html("")
    all_read = captions.read == captions.present
    lead = f"{'All' if all_read else f'{count(captions.read)}, drawn evenly, of'} {count(captions.present)} captions."
    parts = [
        _figure("Length in characters", _linear_bins(captions.characters, count), "characters", "c-dynamic"),
        _figure("Length in words", _linear_bins(captions.words, count), "words", "c-supervision"),
    ]
    return section("captions", "Captions", lead, figures(parts), _caption_facts(summary), _repeated(summary))


def _caption_facts(summary: Summary) -> Html:
    captions = summary.captions
    without = int(summary.good.sum()) - captions.present
    rows = [
        ("good samples without a caption", count(without), ""),
        ("empty captions", count(captions.empty), f"of {count(captions.read)} read"),
        ("shortest, median, longest in words", _spread(captions.words), f"of {count(captions.read)} read"),
    ]
    if captions.compared:
        again = captions.compared - captions.distinct
        kinds = f"of {count(captions.compared)} in .txt files, compared by length and CRC32"
        rows.append(("captions that come again", count(again), kinds))
    else:
        rows.append(("captions that come again", DASH, "captions in .json files are not compared"))
    names, values, notes = zip(*rows, strict=True)
    return table([Column("", names, "left"), Column("samples", values), Column("", notes, "left")])


def _spread(values: np.ndarray) -> str:
    return f"{values.min()}, {np.median(values):.0f}, {values.max()}"


def _repeated(summary: Summary) -> Html:
    repeated = summary.captions.repeated
    if not repeated:
        return Html("")
    columns = [
        Column("most frequent captions", [_cut(one.caption) or "(empty)" for one in repeated], "left"),
        Column("samples", [count(one.samples) for one in repeated]),
    ]
    return table(columns)


def _labels(summary: Summary) -> Html:
    if summary.index.labels is None:
        return Html("")
    held = summary.index.labels[summary.good]
    classes, counts = np.unique(held[held >= 0], return_counts=True)
    if not len(classes):
        return Html("")
    lead = f"{_some(len(classes), 'class', 'es')} with {count(counts.min())} to {count(counts.max())} samples each."
    without = int((held < 0).sum())
    lead += f" {_some(without, 'good sample')} without a label." if without else ""
    if len(classes) <= _CLASSES:
        bins = Bins(counts.tolist(), [str(label) for label in classes])
        part = _figure("Samples of each class", bins, "label", "c-dynamic")
    else:
        drawn = _linear_bins(counts, count)
        draw = partial(
            histogram,
            drawn.counts,
            drawn.names,
            label="Classes by size",
            x_label="samples of a class",
            y_label="classes",
        )
        part = Figure("Classes by size", lambda width: draw(width=width), note=drawn.note)
    return section("labels", "Labels", lead, figures([part]))


def _buckets(uses: Sequence[Use], good: int) -> Html:
    if not uses:
        return Html("")
    lead = (
        "How the good samples fall into the pixel sizes of each recipe. Bucketing loses none of them: what does not "
        "fill a batch carries over to the next epoch."
    )
    return section("buckets", "Buckets", lead, *(_use(use, good) for use in uses))


def _use(use: Use, good: int) -> Html:
    held = [one for one in use.buckets if one.samples] or list(use.buckets)
    columns = [
        Column("width × height", [f"{one.bucket.width} × {one.bucket.height}" for one in held], "left"),
        Column("samples", [count(one.samples) for one in held]),
        Column("share", [percent(one.samples / good if good else None, 1) for one in held]),
        Column("enlarged", [count(one.enlarged) for one in held]),
        Column("area kept", [percent(one.kept, 1) for one in held]),
    ]
    words = [f"{count(sum(one.samples for one in use.buckets) - use.short)} of {count(good)} good samples are used"]
    unused = len(use.buckets) - len(held)
    words += [f"{_some(unused, 'bucket')} of {len(use.buckets)} without samples"] if unused else []
    words += [f"{count(use.short)} have too few frames and are replaced by others"] if use.short else []
    return el("div", el("h3", use.name), table(columns), el("p", "; ".join(words) + ".", class_="note"), class_="use")


def _unusable(summary: Summary) -> Html:
    index = summary.index
    if not index.bad and not index.broken:
        return Html("")
    lead = "Unusable samples keep their place; when one is due, another is read in its stead."
    parts = []
    if summary.reasons:
        shown = summary.reasons[:_LISTED]
        columns = [
            Column("reason", [reason for reason, _, _ in shown], "left"),
            Column("samples", [count(number) for _, number, _ in shown]),
            Column("for example", [name for _, _, name in shown], "left"),
        ]
        parts.append(el("div", table(columns), class_="wrapped"))
        more = len(summary.reasons) - len(shown)
        parts.append(el("p", f"{_some(more, 'more reason')}.", class_="note") if more else Html(""))
    if index.broken:
        broken = list(index.broken.items())[:_LISTED]
        columns = [
            Column("shard left out", [name for name, _ in broken], "left"),
            Column("reason", [_cut(reason) for _, reason in broken], "left"),
        ]
        parts.append(el("div", table(columns), class_="wrapped"))
    return section("unusable", "Unusable", lead, join(parts))


def _some(number: int, what: str, plural: str = "s") -> str:
    return f"{count(number)} {what}{'' if number == 1 else plural}"


def _cut(text: str, limit: int = _CAPTION) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
