"""What can go wrong, for those who only have to know it by name."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank alike."""
