"""The exit codes of ``python -m dydit_scale.train``: what a restart would be good for."""

from __future__ import annotations

import os
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

NOTES = "DYDIT_EXIT_NOTES"
"""Variable with the folder in which the ranks of a node note their exit codes, for whoever supervises a launcher."""


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


def note(code: int) -> None:
    """Note the exit code of this rank, if somebody wants to know it."""
    if folder := os.environ.get(NOTES):
        with suppress(OSError):
            (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(str(int(code)))


def verdict(folder: Path) -> int | None:
    """The code that speaks for all ranks that noted one, None if none did: what forbids a restart comes first, then
    failures, and DONE if there is nothing else."""
    codes = {int(path.read_text() or Exit.FAILED) for path in folder.glob("rank-*")}
    order = (Exit.BAD_CONFIG, Exit.BAD_DATA, Exit.NOT_FINITE, Exit.FAILED, Exit.STUCK, Exit.STOPPED, Exit.DONE)
    return next((code for code in order if code in codes), None)
