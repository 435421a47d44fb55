"""Fixed numbers of tokens for each layer and step, so that shapes are known before a sampler starts.

Token gates at inference are a threshold, whose count differs from picture to picture and must be read by the host.
With a capacity each block takes its highest-scoring tokens instead: no wait for the device, static shapes, CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dydit_scale.dynamic.masks import DynamicMasks


@dataclass(frozen=True, eq=False)
class TokenCapacity:
    """How many tokens of each sample a layer works on at a step."""

    timesteps: Float[Tensor, " steps"]
    counts: Int64[Tensor, "steps layers"]

    @classmethod
    def from_masks(
        cls, timesteps: Sequence[float], masks: Sequence[DynamicMasks], *, multiple: int = 64
    ) -> TokenCapacity:
        """The mean numbers that a calibration pass kept, rounded up to a multiple of ``multiple`` (a tile of the matrix
        product), at most all.

        Args:
            timesteps: of each forward of the pass; forwards of one timestep are taken together.
            masks: of each forward.

        Raises:
            ValueError: no forward, or not one mask for each.
        """
        if not masks or len(masks) != len(timesteps) or multiple < 1:
            raise ValueError(
                f"capacity: expected masks for each of 1 or more timesteps and a multiple of at least 1; got "
                f"{len(masks)} masks, {len(timesteps)} timesteps, multiple {multiple}"
            )
        rates: dict[float, list[Tensor]] = {}
        for t, each in zip(timesteps, masks, strict=True):
            rates.setdefault(float(t), []).append(each.tokens.float().sum(-1).cpu())  # [layers, batch]
        total = masks[0].tokens.shape[-1]
        means = torch.stack([torch.cat(found, dim=1).mean(1) for found in rates.values()])
        slack = 1e-4  # a mean of fp32 may lie so little above a multiple that it is
        counts = (means / multiple - slack).ceil().clamp(min=1).long() * multiple
        return cls(torch.tensor(list(rates)), counts.clamp(max=total))

    def at(self, timesteps: Float[Tensor, " steps"], layers: int, tolerance: float) -> Int64[Tensor, "steps layers"]:
        """The counts for a sampler's timesteps.

        Raises:
            ValueError: it was calibrated for other timesteps or another number of layers.
        """
        if self.counts.shape[1] != layers:
            raise ValueError(f"capacity: calibrated for {self.counts.shape[1]} layers; the model has {layers}")
        rows = []
        for t in timesteps.tolist():
            distance = (self.timesteps - t).abs()
            nearest = int(distance.argmin())
            if float(distance[nearest]) > tolerance * max(abs(t), 1e-3):
                raise ValueError(
                    f"capacity: not calibrated at timestep {t:g}; it knows "
                    f"{', '.join(f'{known:g}' for known in self.timesteps.tolist())}; calibrate with this sampler"
                )
            rows.append(self.counts[nearest])
        return torch.stack(rows)
