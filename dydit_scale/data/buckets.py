"""Buckets: the pixel sizes of one area in which pictures of all aspect ratios are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dydit_scale.data.index import ShardIndex
from dydit_scale.data.loader import DataConfig


class Bucket(NamedTuple):
    """A pixel size."""

    height: int
    width: int


def make_buckets(image_size: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """The square of ``image_size`` and the rectangles beside it, from the tallest to the widest."""
    lying = []
    for height in range(image_size - step, 0, -step):
        width = image_size**2 // height // step * step
        if width > max_aspect * height:
            break
        lying.append(Bucket(height, width))
    standing = [Bucket(width, height) for height, width in reversed(lying)]
    return (*standing, Bucket(image_size, image_size), *lying)


def config_buckets(config: DataConfig) -> tuple[Bucket, ...]:
    """The pixel sizes that data are read in; one, the square, without ``data.buckets``."""
    if config.buckets:
        return make_buckets(config.image_size, config.bucket_step, config.max_aspect)
    return (Bucket(config.image_size, config.image_size),)


def bucket_numbers(index: ShardIndex, buckets: Sequence[Bucket]) -> np.ndarray | None:
    """[num_samples], the bucket of each sample; None if there is one bucket only."""
    if len(buckets) == 1:
        return None
    aspects = np.array([bucket.width / bucket.height for bucket in buckets])
    shown = np.maximum(1, index.samples["width"]) / np.maximum(1, index.samples["height"])
    return np.searchsorted(np.sqrt(aspects[:-1] * aspects[1:]), shown)


def bucket_counts(index: ShardIndex, config: DataConfig) -> dict[Bucket, int]:
    """How many samples each bucket has, bad ones left out."""
    buckets = config_buckets(config)
    numbers = bucket_numbers(index, buckets)
    good = np.ones(index.num_samples, dtype=bool)
    good[list(index.bad)] = False
    counts = [good.sum()] if numbers is None else np.bincount(numbers[good], minlength=len(buckets))
    return {bucket: int(count) for bucket, count in zip(buckets, counts, strict=True)}
