"""``dydit sample``: what is timed, and what it says of packing."""

from __future__ import annotations

from typing import Any

import pytest

from dydit_scale.workflows import sample
from tests.models.tiny import scramble
from tests.models.tiny_families import FAMILIES


def test_each_pair_draws_from_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []
    monkeypatch.setattr(sample, "generate", lambda pipe, prompts, config, first: drawn.append((pipe, first)))
    config: Any = None
    static, dynamic = (sample.drawer(pipe, ["a", "b"], config) for pipe in ("static", "dynamic"))
    sample.timed_pairs(static, dynamic, pairs=2, progress=False)
    assert drawn == [(pipe, first) for first in (0, 2, 4) for pipe in ("static", "dynamic")]


def test_the_packed_line_says_where_memory_made_packing_slower() -> None:
    family = next(family for family in FAMILIES if family.name == "dit")
    model, steps = scramble(family.make()), family.steps(0.9, 0.5, 0.2)
    roomy = model.pack(steps)
    parts = roomy.stored["own"]
    assert roomy.stored == {"own": parts} and sample.packed_line(roomy).endswith("MiB of copies")
    tight = model.pack(steps, max_bytes=int(0.8 * roomy.bytes))
    slower = {kind: n for kind, n in tight.stored.items() if kind != "own"}
    assert slower and sum(tight.stored.values()) == parts and tight.bytes < roomy.bytes
    line = sample.packed_line(tight)
    assert all(f"{n} of {parts} parts {kind}" in line for kind, n in slower.items())
