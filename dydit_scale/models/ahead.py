"""The modulation of coming steps, computed together.

At batch 1 a modulation layer is a product of one row with a matrix of 6 dim^2 weights: nearly no arithmetic, but half
as much memory to read as for all else in the block. A sampler's timesteps are planned and its conditions stay, or two
take turns where the branches of guidance run one after the other: one product serves many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 64 * 2**20
"""What the modulations stored for a branch may take; as many steps are computed at once as fit."""
BRANCHES = 2
"""Of guidance: as many conditions are remembered."""

Embed = Callable[[Shaped[Tensor, " batch_t"]], Float[Tensor, "batch dim"]]
Layers = tuple[nn.Module, ...]
_Seen = tuple[tuple[Any, int | None], ...]
"""Conditions, tensors with their versions."""


class Ready(NamedTuple):
    """What was computed for a step."""

    timestep: float
    modulations: list[Tensor]
    """[blocks]"""


@dataclass(eq=False)
class _Branch:
    """What was seen and computed with some conditions."""

    conditions: _Seen
    steps: set[int] = field(default_factory=set)
    ready: dict[int, Ready] = field(default_factory=dict)


class AheadModulation:
    """Modulations of the steps of a packed plan, for the conditions that were seen last.

    Args:
        layers: [steps][blocks], each block's modulation layers.
        timesteps: of the steps.
    """

    def __init__(self, layers: Sequence[Sequence[Layers]], timesteps: Float[Tensor, " steps"]) -> None:
        self.layers, self.timesteps = layers, timesteps.tolist()
        self._branches: list[_Branch] = []  # the one that came last is the first
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
        branch = self._branch_of(seen)
        branch.steps.add(step)
        if len(branch.steps) > 1 and step not in branch.ready:
            branch.ready = self._compute(step, value, timestep, temb, embed)
        found = branch.ready.get(step)
        return found.modulations if found is not None and found.timestep == value else None

    def _branch_of(self, seen: _Seen) -> _Branch:
        branch = next((b for b in self._branches if _same(b.conditions, seen)), None) or _Branch(seen)
        others = [b for b in self._branches if b is not branch]
        self._branches = [branch, *others][:BRANCHES]
        return branch

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


def _same(a: _Seen, b: _Seen) -> bool:
    return len(a) == len(b) and all(
        (x is y if isinstance(x, Tensor) else x == y) and v == w for (x, v), (y, w) in zip(a, b, strict=True)
    )
