"""Every dynamic class at toy size, with inputs for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import test_class_latte as class_latte
from tests.models import test_latte as latte
from tests.models import test_pixart as pixart
from tests.models import tiny, tiny_dit


@dataclass(frozen=True)
class Family:
    """A dynamic class at toy size."""

    name: str
    make: Callable[..., Any]
    inputs: Callable[[list[Any]], dict[str, Tensor]]
    attention: str
    """Its self-attention, in a block."""
    unit: int
    """Timesteps go from 0 to this."""

    def x(self, *timesteps: float, seed: int = 1) -> dict[str, Tensor]:
        """A batch at timesteps in 0..1."""
        levels = [t if self.unit == 1 else int(t * self.unit) for t in timesteps]
        return self.inputs(levels, seed=seed)

    def steps(self, *timesteps: float) -> Tensor:
        """The schedule to pack for."""
        return torch.tensor([t * self.unit for t in timesteps])

    @property
    def adapted(self) -> str:
        return rf".*transformer_blocks\.\d+\.{self.attention}\.(to_q|to_v)"


FAMILIES = [
    Family("flux", tiny.tiny_dynamic, tiny.inputs, "attn", 1),
    Family("dit", tiny_dit.tiny_dynamic, tiny_dit.inputs, "attn1", 1000),
    Family("latte", latte.tiny_dynamic, latte.inputs, "attn1", 1000),
    Family("latte-classes", class_latte.tiny_dynamic, class_latte.inputs, "attn1", 1000),
    Family("pixart", pixart.tiny_dynamic, pixart.inputs, "attn1", 1000),
]
RELEASED = replace(FAMILIES[0], name="flux, released", make=partial(tiny.tiny_dynamic, single_bypass="attn_out+mlp"))
"""Skipped tokens of its single blocks ask for no attention."""
STEPS = (0.9, 0.5, 0.2)
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def counted(model: Any, part: str = "") -> Counter[int]:
    """Calls of each block's token router, or of ``part``; packed blocks share the router."""
    calls: Counter[int] = Counter()
    for i, block in enumerate(model.dynamic_blocks()):
        block.get_submodule(part or "dy_token").register_forward_hook(lambda *_, i=i: calls.update([i]))
    return calls
