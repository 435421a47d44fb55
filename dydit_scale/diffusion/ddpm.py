"""The DDPM of DiT and Latte: noise prediction at integer timesteps, with or without a learned variance.

DDPM: Ho et al., arXiv 2006.11239. Learned variance and hybrid loss: Nichol and Dhariwal, arXiv 2102.09672. Channels
stand in dimension 1; what follows them (rows and columns, or frames too) is of no concern here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dydit_scale.diffusion.flow import per_sample_mse

BOUND_WEIGHT = 1e-3
"""Lambda of the hybrid loss, which multiplies the bound summed over all timesteps (2102.09672, section 3.1)."""
_HALF_BIN, _LAST_BIN = 1 / 255, 0.999
"""Half the width of one of 256 values in [-1, 1], and where the outermost of them begin, which have no far edge."""


class DDPMLosses(NamedTuple):
    """Terms of the loss per sample, in fp32."""

    mse: Float[Tensor, " batch"]
    """Mean squared error of the predicted noise."""
    bound: Float[Tensor, " batch"]
    """The weighted variational bound, which trains the variance alone; zero where no variance is learned."""

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Their sum, the loss that DiT trains with."""
        return self.mse + self.bound


class _Tables(NamedTuple):
    """Coefficients of all timesteps, computed in fp64 and rounded to fp32."""

    signal: Float[Tensor, " steps"]
    """sqrt(abar), of the picture in x_t"""
    noise: Float[Tensor, " steps"]
    """sqrt(1 - abar), of the noise in x_t"""
    mean_per_noise: Float[Tensor, " steps"]
    """How far the posterior mean moves per unit of predicted noise: beta / sqrt(alpha (1 - abar))"""
    log_smallest: Float[Tensor, " steps"]
    """Log of the posterior variance, q(x_{t-1} | x_t, x_0); at t = 0, where that is 0, the one of t = 1"""
    log_largest: Float[Tensor, " steps"]
    """log(beta)"""


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """The forward process ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`` and the losses of models of its noise."""

    steps: int = 1000
    """Timesteps, from 0, the least noisy."""
    beta_start: float = 1e-4
    """Variance that timestep 0 adds; linear in between."""
    beta_end: float = 0.02
    """Variance that the last timestep adds."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"DDPM: steps must be 2 or more; got {self.steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"DDPM: expected 0 < beta_start <= beta_end < 1; got {self.beta_start} and {self.beta_end}"
            )

    def timesteps(self, u: Float[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Timesteps from numbers in (0, 1), such as those of ``stratified_uniform``."""
        return (u * self.steps).long().clamp(0, self.steps - 1)

    def noisy(
        self,
        x0: Float[Tensor, "batch channels *shape"],
        noise: Float[Tensor, "batch channels *shape"],
        t: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels *shape"]:
        """``x_t``, in the dtype of ``x0``."""
        tables = _tables(self)
        return (_at(tables.signal, t, x0) * x0 + _at(tables.noise, t, x0) * noise).to(x0.dtype)

    def log_variance(
        self, coefficient: Float[Tensor, "batch channels *shape"], t: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels *shape"]:
        """Log variance of ``p(x_{t-1} | x_t)``: the coefficient, from -1 to 1, runs from the posterior's to beta
        (2102.09672, eq. 15)."""
        tables = _tables(self)
        share = (coefficient.float() + 1) / 2
        return share * _at(tables.log_largest, t, share) + (1 - share) * _at(tables.log_smallest, t, share)

    def losses(
        self,
        output: Float[Tensor, "batch out_channels *shape"],
        x0: Float[Tensor, "batch channels *shape"],
        noise: Float[Tensor, "batch channels *shape"],
        t: Int64[Tensor, " batch"],
    ) -> DDPMLosses:
        """Losses of the model's output at ``noisy(x0, noise, t)``.

        With twice the channels of ``x0`` the second half is the coefficient of :meth:`log_variance`, and the hybrid
        loss applies: the bound at one timestep in bits per dimension, times ``BOUND_WEIGHT * steps`` for the sum over
        timesteps, which is 1 in DiT. Its mean is detached, so that only the variance learns from it.

        Raises:
            ValueError: the output has neither the channels of ``x0`` nor twice as many.
        """
        channels = x0.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"DDPM.losses: expected an output of {channels} channels (noise) or {2 * channels} (noise and "
                f"variance); got {output.shape[1]}"
            )
        predicted, coefficient = output[:, :channels], output[:, channels:]
        mse = per_sample_mse(predicted, noise)
        if not coefficient.shape[1]:
            return DDPMLosses(mse, torch.zeros_like(mse))
        # Both means are linear in the noise, with the same term of x_t, so only the noises' difference counts.
        off = noise.float() - predicted.detach().float()
        off = off * _at(_tables(self).mean_per_noise, t, off)  # predicted mean - true mean
        bits = self._bound(off, self.log_variance(coefficient, t), x0.float(), t).flatten(1).mean(1) / math.log(2)
        return DDPMLosses(mse, BOUND_WEIGHT * self.steps * bits)

    def _bound(
        self,
        off: Float[Tensor, "batch channels *shape"],
        log_variance: Float[Tensor, "batch channels *shape"],
        x0: Float[Tensor, "batch channels *shape"],
        t: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels *shape"]:
        """The timestep's term of the variational bound, in nats (2006.11239, eq. 5)."""
        true = _at(_tables(self).log_smallest, t, off)
        kl = 0.5 * (log_variance - true - 1 + torch.exp(true - log_variance) + off.square() * torch.exp(-log_variance))
        nll = -_log_likelihood(x0, x0 + off, log_variance)  # the posterior's mean at t = 0 is x0
        return torch.where((t == 0).reshape(-1, *[1] * (off.ndim - 1)), nll, kl)


def _log_likelihood(
    x: Float[Tensor, "batch *shape"], mean: Float[Tensor, "batch *shape"], log_variance: Float[Tensor, "batch *shape"]
) -> Float[Tensor, "batch *shape"]:
    """Log of the probability that a Gaussian gives to the bin of ``x``, one of 256 in [-1, 1] (2006.11239, eq. 13)."""
    scale = torch.exp(-0.5 * log_variance)
    lower = ((x - mean - _HALF_BIN) * scale).masked_fill(x < -_LAST_BIN, -torch.inf)
    upper = ((x - mean + _HALF_BIN) * scale).masked_fill(x > _LAST_BIN, torch.inf)
    # In the upper tail both are near 1 and their difference is lost, so that one is mirrored into the lower.
    lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
    return torch.log((torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12))


def _at(table: Tensor, t: Int64[Tensor, " batch"], like: Float[Tensor, "batch *shape"]) -> Tensor:
    """Entries of a table at the timesteps, [batch, 1, ...] to multiply ``like`` with."""
    return table.to(like.device)[t.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))


def _tables(ddpm: DDPM) -> _Tables:
    return _Tables(**{name: torch.tensor(numbers) for name, numbers in _numbers(ddpm).items()})


@functools.cache
def _numbers(ddpm: DDPM) -> dict[str, np.ndarray]:
    """Of the tables. Arrays, because a tensor that is first asked for while a plan is made has no contents, ever."""
    beta = np.linspace(ddpm.beta_start, ddpm.beta_end, ddpm.steps)
    alpha = 1 - beta
    abar = alpha.cumprod()
    posterior = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    exact = dict(
        signal=np.sqrt(abar),
        noise=np.sqrt(1 - abar),
        mean_per_noise=beta / np.sqrt(alpha * (1 - abar)),
        log_smallest=np.log(np.concatenate([posterior[:1], posterior])),
        log_largest=np.log(beta),
    )
    return {name: table.astype(np.float32) for name, table in exact.items()}
