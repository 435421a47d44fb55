"""Counter-based randomness: every draw is a pure function of (seed, key), never of global state or of who asks."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed from ``seed`` and any number of integers or short words, e.g. ``keyed_seed(0, "noise", step,
    position)``.

    Stable over Python, numpy and torch versions (BLAKE2b of the written-out key).
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator started at ``keyed_seed(seed, *key)``."""
    return torch.Generator().manual_seed(keyed_seed(seed, *key))
