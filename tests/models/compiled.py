"""Compile the repeated blocks of each dynamic class and compare; prints the names of those that are right."""

from __future__ import annotations

import torch

from tests.models.tiny import scramble
from tests.models.tiny_families import FAMILIES, Family


@torch.no_grad()
def check(family: Family) -> None:
    """Compiled blocks compute what eager ones do, and packing still cuts them."""
    model, x = scramble(family.make()), family.x(0.5)
    masked = model(**x).sample
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(backend="aot_eager")
    torch.testing.assert_close(model(**x).sample, masked, atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plan = model.pack(family.steps(0.5))
    assert plan.bytes > 0 and all(block._compiled_call_impl is None for block in plan.blocks[0])
    torch.testing.assert_close(model(**x).sample, masked, atol=1e-5, rtol=0)


if __name__ == "__main__":
    for each in FAMILIES:
        check(each)
        print(each.name)
