"""Delivery of the timestep embedding to layers deep inside a block that depend on it (TD-LoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor


class TimestepState:
    """The timestep embedding that is current for one model; one forward at a time per model.

    It is empty outside a scope, so a layer that reads it at the wrong moment fails instead of using a stale value.
    """

    def __init__(self) -> None:
        self._emb: Float[Tensor, "batch dim"] | None = None

    @property
    def emb(self) -> Float[Tensor, "batch dim"] | None:
        """The pure timestep embedding in fp32, or None outside a scope."""
        return self._emb

    @contextmanager
    def scope(self, emb: Float[Tensor, "batch dim"] | None) -> Iterator[None]:
        """Make ``emb`` current inside the ``with``; blocks open it themselves, so that recomputation is right too."""
        before, self._emb = self._emb, emb
        try:
            yield
        finally:
            self._emb = before
