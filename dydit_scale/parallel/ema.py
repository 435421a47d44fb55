"""The exponential moving average of the trainable weights, kept in the pieces that the engine keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dydit_scale.parallel.engine import Engine, check_state, copy_pieces


class Ema:
    """average = d * average + (1 - d) * weights with d = min((1 + s) / (10 + s), decay) after s updates.

    The warm-up makes early averages follow the weights instead of the initial values (as diffusers' EMAModel).
    """

    def __init__(self, engine: Engine, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay: expected 0 <= decay < 1, got {decay}")
        self.engine, self.decay, self.updates = engine, decay, 0
        self.local = {name: tensor.clone() for name, tensor in engine.local_parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an applied step; no communication."""
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        for name, tensor in self.engine.local_parameters().items():
            self.local[name].lerp_(tensor, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def adopt(self, names: Iterable[str]) -> None:
        """Let the averages of these parameters be what they are now; no communication."""
        live = self.engine.local_parameters()
        for name in names:
            if name in live:
                self.local[name].copy_(live[name])

    def state(self) -> dict[str, Tensor]:
        """Full fp32 CPU averages under canonical names on rank 0, {} elsewhere. Collective."""
        return self.engine.gather(self.local)

    def load(self, full: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a ``state`` of any engine; every rank passes the full tensors. ValueError if one differs."""
        check_state("ema state", full, self.engine.shapes)
        copy_pieces(full, self.local, self.engine.pieces)
        self.updates = updates

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the ``with`` the module computes with the averages; afterwards the weights are back, bit for bit.

        Only for forwards without gradient. Collective.
        """
        kept = {name: tensor.clone() for name, tensor in self.engine.local_parameters().items()}
        self._write(self.local)
        self.engine.refresh()
        try:
            yield
        finally:
            self._write(kept)
        # after an error nobody computes any more, and the other ranks may be elsewhere
        self.engine.refresh()

    @torch.no_grad()
    def _write(self, local: Mapping[str, Tensor]) -> None:
        for name, tensor in self.engine.local_parameters().items():
            tensor.copy_(local[name])
