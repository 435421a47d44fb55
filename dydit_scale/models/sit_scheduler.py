"""Sampling along SiT's linear path, t = 0 noise to t = 1 picture: the ODE by Euler or Heun, or the SDE.

diffusers' flow matching schedulers run the other way, end their grid at t = 0.999 and have no SDE with a diffusion
coefficient of its own; hence this one, used as any of diffusers'. SiT: arXiv 2401.08740.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

SAMPLERS = ("euler", "heun", "sde")
SDE_LAST_STEP = 0.04
"""Length of the SDE's last step, which adds no noise, as SiT has it."""


class SiTScheduler(SchedulerMixin, ConfigMixin):
    """Steps of a velocity model on ``x_t = t picture + (1 - t) noise``.

    Args:
        sampler: ``euler`` and ``heun`` integrate ``dx = v dt`` on an even grid; ``heun`` is of second order and calls
            the model twice a step. ``sde`` integrates ``dx = (v + w score) dt + sqrt(2 w) dW`` by Euler-Maruyama, with
            SiT's coefficient sigma, ``w = 1 - t`` (on this path its linear coefficient is the same).
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, sampler: str = "sde") -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"SiTScheduler: sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        self.timesteps: Float[Tensor, " calls"] = torch.empty(0)
        self._grid: Float[Tensor, " points"] = torch.empty(0)
        self._call = 0
        self._before: tuple[Tensor, Tensor] | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Start anew: ``timesteps`` are then the times, 0..1, of the calls of the model, in order.

        Raises:
            ValueError: less than one step, or than two with the SDE, whose last one is no random step.
        """
        sampler = self.config["sampler"]
        least = 2 if sampler == "sde" else 1
        if num_inference_steps < least:
            raise ValueError(
                f"SiTScheduler: {sampler} takes {least} steps or more; got num_inference_steps = {num_inference_steps}"
            )
        if sampler == "sde":
            self._grid = torch.cat([torch.linspace(0, 1 - SDE_LAST_STEP, num_inference_steps), torch.ones(1)])
        else:
            self._grid = torch.linspace(0, 1, num_inference_steps + 1)
        calls = self._grid[:-1]
        if sampler == "heun":
            calls = torch.stack([calls, self._grid[1:]], dim=1).flatten()
        self.timesteps = calls.to(device)
        self._call, self._before = 0, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is; other schedulers of diffusers scale it."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, "batch *shape"],
        timestep: float | Tensor,
        sample: Float[Tensor, "batch *shape"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at which the model is to be called next, or the result after the last call.

        Args:
            model_output: the velocity, ``picture - noise``, at ``timestep`` and ``sample``.
            generator: of the SDE's noise; one, or one for each sample.

        Raises:
            ValueError: called out of order, or more often than there are timesteps.
        """
        call = self._call
        if call >= len(self.timesteps) or float(timestep) != float(self.timesteps[call]):
            due = float(self.timesteps[call]) if call < len(self.timesteps) else "no further one, set_timesteps"
            raise ValueError(f"SiTScheduler.step: the next timestep is {due}; got {float(timestep)}")
        self._call += 1
        sampler, v, x = self.config["sampler"], model_output, sample
        step = call // 2 if sampler == "heun" else call
        t, dt = float(self._grid[step]), float(self._grid[step + 1] - self._grid[step])
        if sampler == "sde":
            w = 1 - t
            x = x + dt * (v + w * score(v, x, t))
            if step + 1 < len(self.timesteps):
                x = x + (2 * w * dt) ** 0.5 * randn_tensor(x.shape, generator, x.device, x.dtype)
        elif self._before is not None:
            (x, first), self._before = self._before, None
            x = x + dt * (first + v) / 2
        else:
            self._before = (x, v) if sampler == "heun" else None
            x = x + dt * v
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


def score(
    velocity: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"], t: float
) -> Float[Tensor, "batch *shape"]:
    """Gradient of the log density at x_t: minus the expected noise, ``x - t v``, over its deviation ``1 - t``."""
    return (t * velocity - x) / (1 - t)
