"""The exit codes of ``python -m dydit_scale.train``: what a restart would be good for."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Why a training process left. torchrun and the deepspeed launcher answer 1 for every failed worker, whatever its
    code; a process that was started directly shows its own."""

    DONE = 0
    """The last step is trained and saved."""
    FAILED = 1
    """Anything not named below, such as a lost peer or a run folder in use: a restart may go better."""
    BAD_CONFIG = 64
    """A mistake in the recipe, the data or the base, found before the first step: never restart."""
    BAD_DATA = 70
    """More unusable samples than ``data.bad_samples``: repair the shards first."""
    NOT_FINITE = 71
    """Gradients not finite, or the loss spiked, twice at the same place: look at RUN/bad-batch-*.json first."""
    STUCK = 74
    """The watchdog saw no progress, or no checkpoint could be written or read: restart; look at the disk."""
    STOPPED = 75
    """Stopped as asked, the state is saved: restart with --resume."""
