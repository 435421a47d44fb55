"""The modulation of coming steps, computed together.

At batch 1 a modulation layer is a product of one row with a matrix of 6 dim^2 weights: nearly no arithmetic, but half
as much memory to read as for all else in the block. A sampler's timesteps are planned and its labels stay: one product
serves many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 64 * 2**20
"""What the stored modulations may take; as many steps are computed at once as fit."""

Embed = Callable[[float], Float[Tensor, "batch dim"]]


class AheadModulation:
    """Modulations of the steps of a packed plan, for the conditions that were seen last.

    Args:
        layers: [steps][layers], each block's modulation layer.
        timesteps: of the steps.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module]], timesteps: Sequence[float]) -> None:
        self.layers, self.timesteps = layers, timesteps
        self._conditions: tuple[tuple[Any, int | None], ...] = ()
        self._steps: set[int] = set()
        self._ready: dict[int, list[Tensor]] = {}

    def at(
        self, step: int, conditions: Sequence[Any], temb: Float[Tensor, "batch dim"], embed: Embed
    ) -> list[Float[Tensor, "batch dim6"]] | None:
        """The modulations [layers] at a step, or None where the layers must compute them.

        Nothing is computed ahead before the same condition tensors have come with a second step: that is a sampler.

        Args:
            conditions: what ``embed`` depends on beside the timestep; tensors are compared by identity.
            temb: of this step.
            embed: ``temb`` of another timestep.
        """
        seen = tuple((x, x._version if isinstance(x, Tensor) else None) for x in conditions)
        if not _same(seen, self._conditions):
            self._conditions, self._steps, self._ready = seen, set(), {}
        self._steps.add(step)
        if len(self._steps) < 2 and step not in self._ready:
            return None
        if step not in self._ready:
            self._ready = self._compute(step, temb, embed)
        return self._ready.get(step)

    def _compute(self, step: int, temb: Float[Tensor, "batch dim"], embed: Embed) -> dict[int, list[Tensor]]:
        layers: Sequence[Any] = self.layers[step]
        a_step = sum(layer.out_features for layer in layers) * len(temb) * temb.element_size()
        last = min(step + max(1, BYTES // a_step), len(self.timesteps))
        # TD-LoRA in a modulation layer makes it another one at each step.
        steps = [s for s in range(step, last) if all(a is b for a, b in zip(self.layers[s], layers, strict=True))]
        if len(steps) < 2:
            return {}
        stacked = F.silu(torch.cat([temb if s == step else embed(self.timesteps[s]) for s in steps]))
        each = [layer(stacked).split(len(temb)) for layer in layers]
        return {s: [rows[i] for rows in each] for i, s in enumerate(steps)}


def _same(a: tuple[tuple[Any, int | None], ...], b: tuple[tuple[Any, int | None], ...]) -> bool:
    return len(a) == len(b) and all(
        (x is y if isinstance(x, Tensor) else x == y) and v == w for (x, v), (y, w) in zip(a, b, strict=True)
    )
