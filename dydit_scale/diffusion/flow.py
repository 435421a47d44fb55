"""Rectified flow in FLUX's convention: s = 0 is the picture, s = 1 is noise; the network predicts ``noise -
picture``.

SiT runs the same path the other way: t = 0 is noise, t = 1 is the picture, and the network predicts ``picture -
noise``. Picture and noise exchanged, the same functions serve: ``interpolate(noise, x0, t)`` and ``velocity(noise,
x0)``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dydit_scale.diffusion.randomness import keyed_generator


def interpolate(
    x0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], s: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """``x_s = (1 - s) x0 + s noise``."""
    s = s.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return (1 - s) * x0 + s * noise


def velocity(x0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
    """The regression target ``noise - x0``, the same at every s."""
    return noise - x0


def per_sample_mse(a: Float[Tensor, "batch *shape"], b: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
    """Mean squared error of each sample, in fp32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def sample_noise(
    seed: int, positions: Int64[Tensor, " batch"], shape: tuple[int, ...], purpose: str = "noise"
) -> Float[Tensor, "batch *shape"]:
    """Unit Gaussian noise, fp32 on the CPU; each row depends on the seed, the purpose and its position in the data
    alone."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(seed, purpose, int(p))) for p in positions])
