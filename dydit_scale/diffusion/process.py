"""How a family of models mixes pictures with noise, what its transformer is told and what it must answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from dydit_scale.diffusion.ddpm import DDPM
from dydit_scale.diffusion.flow import interpolate, per_sample_mse, velocity
from dydit_scale.diffusion.timesteps import logit_normal, shifted


class Process(Protocol):
    """Levels are numbers [batch] that only the process understands; x0 and noise are [batch, ...]."""

    def training_levels(self, u: Float[Tensor, " batch"]) -> Shaped[Tensor, " batch"]:
        """Levels for training from uniform numbers in (0, 1)."""

    def even_levels(self, u: Float[Tensor, " batch"]) -> Shaped[Tensor, " batch"]:
        """Levels as a sampler visits them, whatever the density in training."""

    def noisy(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The transformer's input."""

    def timestep(self, level: Tensor) -> Tensor:
        """The level as the transformer takes it."""

    def answer(self, output: Tensor, x0: Tensor) -> Tensor:
        """What of the transformer's output is learnt and distilled."""

    def loss(self, answer: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Float[Tensor, " batch"]:
        """What each sample adds to the loss in training."""

    def error(self, answer: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Float[Tensor, " batch"]:
        """Mean squared error of the answer, for evaluation."""


@dataclass(frozen=True, kw_only=True)
class FlowProcess:
    """Rectified flow: a straight line between picture and noise. FLUX (arXiv 2403.03206) and SiT (2401.08740)."""

    density: str = "logit_normal"
    """Of levels in training: sigmoid(mean + std * normal), or ``uniform``; shifted."""
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    data_last: bool = False
    """SiT's direction: the transformer is told 0 at noise and 1 at the picture, and answers with picture - noise."""

    def training_levels(self, u: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Noise levels s in (0, 1), 1 is noise."""
        if self.density == "uniform":
            return self.even_levels(u)
        return logit_normal(u, mean=self.mean, std=self.std, shift=self.shift)

    def even_levels(self, u: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """As an Euler sampler with this shift visits them."""
        return shifted(u, self.shift)

    def noisy(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """``(1 - s) x0 + s noise``."""
        return interpolate(x0, noise, level)

    def timestep(self, level: Tensor) -> Tensor:
        """s, or 1 - s for models that count from noise."""
        return 1 - level if self.data_last else level

    def answer(self, output: Tensor, x0: Tensor) -> Tensor:
        """The velocity: the first half where there are twice the channels, of which SiT leaves the others unused.

        Raises ValueError if there are neither the channels of ``x0`` nor twice as many.
        """
        found, channels = output.shape[1], x0.shape[1]
        if found == channels:
            return output
        if found != 2 * channels:
            raise ValueError(
                f"FlowProcess.answer: expected an output of {channels} channels (velocity) or {2 * channels} (and as "
                f"many that are not used); got {found}"
            )
        return output[:, :channels]

    def loss(self, answer: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Float[Tensor, " batch"]:
        """Mean squared error of the velocity."""
        target = velocity(x0, noise)
        return per_sample_mse(answer, -target if self.data_last else target)

    error = loss


@dataclass(frozen=True, kw_only=True)
class DDPMProcess:
    """Noise prediction at integer timesteps, with a learned variance where the transformer answers for one. DiT, Latte.

    Levels are timesteps from 0, the least noisy.
    """

    ddpm: DDPM = field(default_factory=DDPM)

    def training_levels(self, u: Float[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Uniform timesteps."""
        return self.ddpm.timesteps(u)

    even_levels = training_levels

    def noisy(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """``x_t``."""
        return self.ddpm.noisy(x0, noise, level)

    def timestep(self, level: Tensor) -> Tensor:
        """The level itself."""
        return level

    def answer(self, output: Tensor, x0: Tensor) -> Tensor:
        """All of it: noise, and the variance where there is one."""
        return output

    def loss(self, answer: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Float[Tensor, " batch"]:
        """The hybrid loss."""
        return self.ddpm.losses(answer, x0, noise, level).total

    def error(self, answer: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Float[Tensor, " batch"]:
        """Mean squared error of the noise."""
        return self.ddpm.losses(answer, x0, noise, level).mse
