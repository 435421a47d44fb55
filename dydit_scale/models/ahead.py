"""The modulation of coming steps, computed together.

At batch 1 a modulation layer is a product of one row with a matrix of 6 dim^2 weights: nearly no arithmetic, but half
as much memory to read as for all else in the block. A sampler's timesteps are planned and its conditions stay: one
product serves many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 64 * 2**20
"""What the stored modulations may take; as many steps are computed at once as fit."""

Embed = Callable[[Shaped[Tensor, " batch_t"]], Float[Tensor, "batch dim"]]
Layers = tuple[nn.Module, ...]


class Ready(NamedTuple):
    """What was computed for a step."""

    timestep: float
    modulations: list[Tensor]
    """[blocks]"""


class AheadModulation:
    """Modulations of the steps of a packed plan, for the conditions that were seen last.

    Args:
        layers: [steps][blocks], each block's modulation layers.
        timesteps: of the steps.
    """

    def __init__(self, layers: Sequence[Sequence[Layers]], timesteps: Float[Tensor, " steps"]) -> None:
        self.layers, self.timesteps = layers, timesteps.tolist()
        self._conditions: tuple[tuple[Any, int | None], ...] = ()
        self._steps: set[int] = set()
        self._ready: dict[int, Ready] = {}
        self._came: dict[int, float] = {}

    def at(
        self,
        step: int,
        value: float,
        timestep: Shaped[Tensor, " batch_t"],
        conditions: Sequence[Any],
        temb: Float[Tensor, "batch dim"],
        embed: Embed,
    ) -> list[Float[Tensor, "batch modulation"]] | None:
        """The modulations [blocks] at a step, those of a block's layers side by side; or None where the blocks must
        compute them.

        Nothing is computed ahead before the same condition tensors have come with a second step: that is a sampler.
        What was computed for a timestep other than the one that comes is not used; a timestep that a pipeline rounds
        to half precision is foreseen from the second picture on.

        Args:
            value: the timestep, the same for all samples, which ``timestep`` holds.
            conditions: what ``embed`` depends on beside the timestep; tensors are compared by identity.
            temb: of this step.
            embed: ``temb`` of another timestep.
        """
        self._came[step] = value
        if any(isinstance(x, Tensor) and x.is_inference() for x in conditions):
            return None  # such tensors do not tell whether they were changed
        seen = tuple((x, x._version if isinstance(x, Tensor) else None) for x in (*conditions, len(temb), temb.dtype))
        if not _same(seen, self._conditions):
            self._conditions, self._steps, self._ready = seen, set(), {}
        self._steps.add(step)
        if len(self._steps) > 1 and step not in self._ready:
            self._ready = self._compute(step, value, timestep, temb, embed)
        found = self._ready.get(step)
        return found.modulations if found is not None and found.timestep == value else None

    def _compute(self, step: int, value: float, timestep: Tensor, temb: Tensor, embed: Embed) -> dict[int, Ready]:
        layers: Sequence[Any] = self.layers[step]
        a_step = sum(layer.out_features for block in layers for layer in block) * len(temb) * temb.element_size()
        last = min(step + max(1, BYTES // a_step), len(self.timesteps))
        is_rounded = timestep.is_floating_point() and timestep.itemsize < 4
        foreseen = {} if is_rounded else dict(enumerate(self.timesteps))
        foreseen |= self._came
        # TD-LoRA in a modulation layer makes it another one at each step.
        steps = [s for s in range(step, last) if s in foreseen and _alike(self.layers[s], layers)]
        if len(steps) < 2:
            return {}
        tembs = [temb if s == step else embed(torch.full_like(timestep, foreseen[s])) for s in steps]
        stacked = F.silu(torch.cat(tembs))
        each = [torch.cat([layer(stacked) for layer in block], dim=1).split(len(temb)) for block in layers]
        return {s: Ready(foreseen[s], [rows[i] for rows in each]) for i, s in enumerate(steps)}


def _alike(a: Sequence[Layers], b: Sequence[Layers]) -> bool:
    return all(x is y for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


def _same(a: tuple[tuple[Any, int | None], ...], b: tuple[tuple[Any, int | None], ...]) -> bool:
    return len(a) == len(b) and all(
        (x is y if isinstance(x, Tensor) else x == y) and v == w for (x, v), (y, w) in zip(a, b, strict=True)
    )
