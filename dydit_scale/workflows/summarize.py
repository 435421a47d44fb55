"""``dydit data summarize``: a page about a data set, and the same in a few lines."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dydit_scale.data.index import load_index
from dydit_scale.data.loader import DataConfig
from dydit_scale.data.summary import Summary, Use, summarize_index, use_of
from dydit_scale.report.dataset import render_dataset
from dydit_scale.report.layout import write_page
from dydit_scale.report.units import count, percent, with_prefix
from dydit_scale.train.recipe import load_recipe

PAGE = "summary.html"


def summarize(
    folder: Path,
    *,
    out: Path | None = None,
    recipes: Sequence[Path] = (),
    image_size: int | None = None,
    buckets: bool = False,
) -> list[str]:
    """Write the page of a folder of indexed shards and return its text summary, line by line.

    Args:
        out: the file to write, ``summary.html`` in the folder if None.
        recipes: what the sizes and frames in their ``data`` make of the samples is shown; their paths do not matter.
        image_size, buckets: the same for a recipe with these values.

    Raises ValueError for a folder without a fitting index, or a broken recipe, before anything is read.
    """
    if buckets and image_size is None:
        raise ValueError("--buckets: of which size? add --image-size, e.g. --image-size 1024")
    configs = {}
    for path in recipes:
        for number, own in enumerate(parts := load_recipe(path).data.split()):
            configs[f"{path}, source {number}" if len(parts) > 1 else str(path)] = own
    if image_size is not None:
        name = f"{image_size} pixels, {'aspect buckets' if buckets else 'squares'}"
        configs[name] = DataConfig(path=str(folder), image_size=image_size, buckets=buckets)
    summary = summarize_index(load_index(folder))
    uses = [use_of(summary, name, config) for name, config in configs.items()]
    page = render_dataset(summary, uses, folder.resolve().name, datetime.date.today())
    written = write_page(page, folder / PAGE if out is None else out)
    return [*_lines(summary), *(line for use in uses for line in _use_lines(use)), f"page: {written}"]


def _lines(summary: Summary) -> list[str]:
    index, captions, good = summary.index, summary.captions, int(summary.good.sum())
    lines = [
        f"{count(index.num_samples)} samples in {count(len(index.shards))} shards, "
        f"{with_prefix(summary.shard_bytes, 'B')}, digest {index.digest[:12]}"
    ]
    if good:
        sides = [np.quantile(summary.column(side), (0, 0.5, 1)).astype(int) for side in ("width", "height")]
        least, middle, most = (f"{width} × {height}" for width, height in zip(*sides, strict=True))
        lines.append(f"pictures: {middle} in the median, sides from {least} to {most}")
    if summary.clips is not None and len(summary.clips):
        lines.append(f"clips: {count(len(summary.clips))}, of {summary.clips.min()} to {summary.clips.max()} frames")
    if captions.read:
        lines.append(
            f"captions: {count(captions.present)}, {np.median(captions.words):.0f} words in the median "
            f"(of {count(captions.read)} read, {count(captions.empty)} of them empty)"
        )
        if captions.compared > captions.distinct:
            lines.append(f"captions that come again: {count(captions.compared - captions.distinct)}")
    if index.encoding is not None:
        lines.append("examples: none, these are latents; summarize the shards that they were made of")
    if good > captions.present:
        lines.append(f"without a caption: {count(good - captions.present)}")
    if index.labels is not None:
        held = index.labels[summary.good]
        lines.append(f"labels: {count(len(np.unique(held[held >= 0])))} classes, {count((held < 0).sum())} without one")
    lines += [f"unusable: {count(number)} × {reason} (e.g. {name})" for reason, number, name in summary.reasons[:10]]
    lines += [f"left out: {reason}" for reason in index.broken.values()]
    if summary.changed:
        lines.append(f"changed since indexed: {len(summary.changed)} of those drawn, first {summary.changed[0]}")
    return lines


def _use_lines(use: Use) -> list[str]:
    total = sum(one.samples for one in use.buckets)
    held = sorted((one for one in use.buckets if one.samples), key=lambda one: -one.samples)
    lines = [f"{use.name}: {len(held)} of {len(use.buckets)} buckets have samples"] if len(use.buckets) > 1 else []
    lines += [
        f"{use.name}: {one.bucket.width} × {one.bucket.height}: {count(one.samples)} samples, "
        f"{count(one.enlarged)} enlarged, {percent(one.kept, 1)} of the area kept"
        for one in held
    ]
    kept = f"{use.name}: {count(total - use.short)} of {count(total)} good samples are used"
    return [*lines, kept + (f"; {count(use.short)} have too few frames" if use.short else "")]
