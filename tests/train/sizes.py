"""Micro-batches of several sizes, made by hand: what a loader with buckets gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from dydit_scale.data.reader import Batch
from dydit_scale.diffusion.flow import sample_noise

CAPTIONS = ("a red circle", "", "two rings", "a blue square")
SIZES = ((8, 16), (16, 8), (20, 12), (16, 16), (8, 24))
"""Heights and widths, of 8, 8, 15, 16 and 12 tokens of 4x4 pixels."""


def batch_of(positions: range, height: int, width: int, *frames: int) -> Batch:
    """Noise for pixels and a caption, functions of the position; clips with ``frames``."""
    noise = sample_noise(7, torch.tensor(positions), (*frames, 3, height, width), "pixels")
    captions = tuple(CAPTIONS[position % len(CAPTIONS)] for position in positions)
    return Batch(torch.tensor(positions), noise.tanh(), captions, tuple(map(str, positions)))


class SizedLoader:
    """In the place of what ``make_loader`` returns: the size changes with every micro-batch, also from rank to rank.
    With ``data.frames``, clips and single pictures take turns."""

    def __init__(
        self, config: Any, index: Any, *, rank: int, world_size: int, micro_batch: int, consumed: int, **others: Any
    ) -> None:
        self.shapes = SIZES if config.frames == 1 else ((16, 16, config.frames), (16, 16))
        self.micro_batch = micro_batch
        self.starts = range(consumed + rank * micro_batch, sys.maxsize, world_size * micro_batch)

    def counts(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        for start in self.starts:
            shape = self.shapes[start // self.micro_batch % len(self.shapes)]
            yield batch_of(range(start, start + self.micro_batch), *shape)
