"""Delivery of the timestep embedding to layers deep inside a block that depend on it (TD-LoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int64
from torch import Tensor


class TimestepState:
    """The timestep embedding that is current for one model; one forward at a time per model.

    It is empty outside a scope, so a layer that reads it at the wrong moment fails instead of using a stale value.
    """

    def __init__(self) -> None:
        self._emb: Float[Tensor, "batch dim"] | None = None
        self._samples: Int64[Tensor, " rows"] | None = None

    @property
    def emb(self) -> Float[Tensor, "batch dim"] | None:
        """The pure timestep embedding in fp32, or None outside a scope."""
        return self._emb

    @property
    def samples(self) -> Int64[Tensor, " rows"] | None:
        """The sample of each row, ascending, where layers get single tokens [rows, dim]; None where they get whole
        samples."""
        return self._samples

    @contextmanager
    def scope(
        self, emb: Float[Tensor, "batch dim"] | None, samples: Int64[Tensor, " rows"] | None = None
    ) -> Iterator[None]:
        """Make ``emb`` (and ``samples``) current inside the ``with``; blocks open it themselves, so that recomputation
        is right too."""
        before, (self._emb, self._samples) = (self._emb, self._samples), (emb, samples)
        try:
            yield
        finally:
            self._emb, self._samples = before
