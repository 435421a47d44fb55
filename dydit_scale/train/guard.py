"""What a run does about steps that go wrong: leave them out, go back to the last checkpoint, in the end give up."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from dydit_scale.data.loader import Batch

WINDOW = 64
"""Losses that the median is taken over."""
ENOUGH = 16
"""Losses that must be there before one counts as a spike."""


class NotFiniteError(RuntimeError):
    """The run went back to a checkpoint, came to grief again before the next one, and gave up."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a run goes back to its last checkpoint. The data go on behind the bad window, which is left out so."""

    refused: int = 10
    """Steps in a row whose gradients are not finite. Each of them is left out by itself; weights stay as they are."""
    spike: float | None = None
    """A loss that many times above the median of the last 64; null for no such check."""

    def __post_init__(self) -> None:
        if self.refused < 1:
            raise ValueError(f"guard.refused: expected 1 or more; got {self.refused}")
        if self.spike is not None and not self.spike > 1:
            raise ValueError(f"guard.spike: expected more than 1, or null for none; got {self.spike}")


class Suspect(NamedTuple):
    """What one rank read in a step that went wrong."""

    step: int
    loss: float  # of this rank
    positions: list[int]
    keys: list[str]


class Guard:
    """Judges steps from numbers that are equal on all ranks, so that all of them judge alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.refused = 0
        """Refused steps in a row, up to now."""
        self.rollbacks: list[dict[str, int]] = []
        self.suspects: list[Suspect] = []
        """Of the steps in a row that went wrong."""
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """True if a step's mean loss lies that far above those before it."""
        if self.config.spike is None or len(self._losses) < ENOUGH or not math.isfinite(loss):
            return False
        return loss > self.config.spike * median(self._losses)

    def went_well(self, loss: float) -> None:
        """A step was applied."""
        self.refused = 0
        self.suspects.clear()
        if math.isfinite(loss):
            self._losses.append(loss)

    def went_wrong(self, step: int, loss: float, batches: list[Batch], *, refused: bool) -> None:
        """A step was left out; ``loss`` and ``batches`` are those of this rank."""
        self.refused += refused
        positions = [position for batch in batches for position in batch.positions.tolist()]
        self.suspects.append(Suspect(step, loss, positions, [key for batch in batches for key in batch.keys]))

    @property
    def must_go_back(self) -> bool:
        """True after too many refused steps in a row."""
        return self.refused >= self.config.refused

    def came_back_before(self, step: int) -> bool:
        """True if the last time the run went back, it was to the same checkpoint."""
        return bool(self.rollbacks) and self.rollbacks[-1]["to"] == step

    def go_back(self, *, at: int, to: int, consumed: int, state: dict[str, Any] | None) -> None:
        """The run went from step ``at`` back to the checkpoint of step ``to``, whose ``state`` this was, and goes on
        with the sample ``consumed``."""
        rollbacks = [*self.rollbacks, {"at": at, "to": to, "consumed": consumed}]
        self.load(state)
        self.refused, self.rollbacks = 0, rollbacks
        self.suspects.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON's values."""
        losses = list(self._losses) if self.config.spike is not None else []
        return {"refused": self.refused, "rollbacks": self.rollbacks, "losses": losses}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a ``state``; None, of a checkpoint without one, is a fresh start."""
        state = state or {"refused": 0, "rollbacks": [], "losses": []}
        self.refused, self.rollbacks = state["refused"], list(state["rollbacks"])
        self._losses = deque(state["losses"], maxlen=WINDOW)
