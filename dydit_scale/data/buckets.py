"""Buckets: the pixel sizes of one area in which pictures of all aspect ratios are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dydit_scale.data.config import DataConfig
from dydit_scale.data.index import ShardIndex

_ROWS = 1 << 18
"""Samples whose aspects are computed at a time."""


class Bucket(NamedTuple):
    """A pixel size."""

    height: int
    width: int


def make_buckets(image_size: int, step: int, max_aspect: float) -> tuple[Bucket, ...]:
    """The square of ``image_size`` and, standing and lying, the rectangles beside it, from the tallest to the widest.

    The shorter side is a multiple of ``step`` below ``image_size``, the longer one the greatest multiple with which the
    area is not larger than the square's, as long as their ratio is not larger than ``max_aspect``.
    """
    assert step > 0 and image_size % step == 0, f"image_size {image_size} is no multiple of the step {step}"
    lying = []
    for height in range(image_size - step, 0, -step):
        width = image_size**2 // height // step * step
        if width > max_aspect * height:
            break
        lying.append(Bucket(height, width))
    standing = [Bucket(width, height) for height, width in reversed(lying)]
    return (*standing, Bucket(image_size, image_size), *lying)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> int:
    """The number of the bucket whose aspect ratio is nearest, in proportion, to that of a picture."""
    return int(_nearest(np.array([width]), np.array([height]), buckets)[0])


def _nearest(width: np.ndarray, height: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    aspects = np.array([bucket.width / bucket.height for bucket in buckets])
    # Halfway between two logarithms is the geometric mean; square roots, unlike logarithms, are equal everywhere.
    return np.searchsorted(np.sqrt(aspects[:-1] * aspects[1:]), width / height)


def config_buckets(config: DataConfig) -> tuple[Bucket, ...]:
    """The pixel sizes that data are read in; one, the square, without ``data.buckets``."""
    if config.buckets:
        return make_buckets(config.image_size, config.bucket_step, config.max_aspect)
    return (Bucket(config.image_size, config.image_size),)


def bucket_numbers(index: ShardIndex, buckets: Sequence[Bucket]) -> np.ndarray | None:
    """uint8 or uint16 [num_samples], the bucket of each sample; None if there is one bucket only.

    Bad samples, of which the size may be unknown, count as of the bucket that has most good ones: there is always one
    to take their place.
    """
    if len(buckets) == 1:
        return None
    numbers = np.empty(index.num_samples, np.uint8 if len(buckets) <= 256 else np.uint16)
    for start in range(0, len(numbers), _ROWS):
        rows = index.columns.sizes[start : start + _ROWS]
        # The size of a bad sample may be zero.
        numbers[start : start + _ROWS] = _nearest(np.maximum(1, rows["width"]), np.maximum(1, rows["height"]), buckets)
    bad = np.array(sorted(index.bad), dtype=np.int64)
    good = np.bincount(numbers, minlength=len(buckets)) - np.bincount(numbers[bad], minlength=len(buckets))
    numbers[bad] = good.argmax()
    return numbers


def bucket_counts(index: ShardIndex, config: DataConfig) -> dict[Bucket, int]:
    """How many samples each bucket has, bad ones left out; no other sample is: remainders carry over to the next
    epoch."""
    buckets = config_buckets(config)
    numbers = bucket_numbers(index, buckets)
    good = index.good
    counts = [good.sum()] if numbers is None else np.bincount(numbers[good], minlength=len(buckets))
    return {bucket: int(count) for bucket, count in zip(buckets, counts, strict=True)}
