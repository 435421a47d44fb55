"""Noise levels for training: spread evenly over the global batch, then shaped by a density."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dydit_scale.diffusion.randomness import keyed_generator

_GOLDEN = (math.sqrt(5) - 1) / 2


def stratified_uniform(seed: int, step: int, index: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Numbers in (0, 1), fp32, for the given places in the global batch of one step.

    A golden-ratio lattice with a random start per step: each number is uniform by itself, and every run of neighbouring
    places (a rank's share, a micro-batch) covers the interval evenly, whatever the number of ranks.
    """
    start = torch.rand((), generator=keyed_generator(seed, "timestep", step), dtype=torch.float64)
    u = torch.remainder(start + index.double() * _GOLDEN, 1.0)
    return u.clamp(1e-5, 1 - 1e-5).float()


def logit_normal(
    u: Float[Tensor, " batch"], *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float[Tensor, " batch"]:
    """Noise levels s in (0, 1): ``sigmoid(mean + std * normal)`` by inverse transform of ``u``, then shifted.

    ``shift`` = e^mu moves mass to noisier levels, ``s' = shift * s / (1 + (shift - 1) * s)`` (Esser et al., 2024, eq.
    23).
    """
    return shifted(torch.sigmoid(mean + std * torch.special.ndtri(u.double())).float(), shift)


def shifted(s: Float[Tensor, " batch"], shift: float) -> Float[Tensor, " batch"]:
    """``shift * s / (1 + (shift - 1) * s)``: 0 and 1 stay, everything between moves towards noise."""
    return shift * s / (1 + (shift - 1) * s)
