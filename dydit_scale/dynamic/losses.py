"""The loss that steers the cost ratio to its target (DyDiT section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TargetSchedule:
    """The target ratio over the run: 1 at first, then down a straight line to ``target``. Release: 100 and 1,000
    steps."""

    target: float
    """lambda: MACs dynamic / static to reach."""
    hold_steps: int = 0
    """Steps at a target of 1."""
    ramp_steps: int = 1000
    """Steps from 1 to the target."""

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target ratio: expected a number in (0, 1]; got {self.target}")
        if self.hold_steps < 0 or self.ramp_steps < 0:
            raise ValueError(
                f"target schedule: steps must not be negative; got {self.hold_steps} and {self.ramp_steps}"
            )

    def at(self, step: int) -> float:
        """The target ratio at a step counted from 0."""
        done = (
            min(1.0, max(0.0, (step - self.hold_steps) / self.ramp_steps))
            if self.ramp_steps
            else float(step >= self.hold_steps)
        )
        return 1.0 + (self.target - 1.0) * done


def cost_loss(ratio: Float[Tensor, ""], target: float) -> Float[Tensor, ""]:
    """``(ratio - target)^2``. ``ratio`` is the mean over the *global* batch: squared per rank instead, the loss would
    also punish the variance between small local batches. The recipe's weight is 2."""
    return (ratio - target).square()
