"""Compile the repeated blocks of each dynamic class and compare; prints the names of those that are right."""

from __future__ import annotations

import torch

from dydit_scale.adapters.td_lora import add_td_lora
from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.sampling import execution
from dydit_scale.sampling.execution import Execution
from tests.adapters.tiny import flux_config, shake
from tests.models.tiny import inputs, scramble, tiny_dynamic
from tests.models.tiny_families import FAMILIES, RELEASED, Family


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


@torch.no_grad()
def check_execution(family: Family, *, fixed: bool) -> None:
    """Packed sub-networks share compiled code, and compute what they do op by op; ``fixed``: with a capacity."""
    model, times = scramble(family.make()), (0.9, 0.7, 0.5, 0.3)
    runs, steps = [family.x(t) for t in times], family.steps(*times)
    capacity = None
    if fixed:
        counts = torch.randint(1, 6, (len(times), len(model.dynamic_blocks())), generator=torch.manual_seed(0))
        capacity = TokenCapacity(steps, counts)
    plan = model.pack(steps, capacity=capacity, kernel_layout=False)
    expected = [model(**x).sample for x in runs]
    torch._dynamo.reset()
    compiled = 0
    with Execution(model, "compile") as run:
        for _ in range(2):
            for x, out in zip(runs, expected, strict=True):
                torch.testing.assert_close(model(**x).sample, out, atol=1e-5, rtol=1e-4)
            assert compiled in (0, run.recompilations), "the second round compiles nothing"
            compiled = run.recompilations
        assert 0 < compiled < 2 * plan.distinct and run.warmup_seconds > 0 and run.op_by_op is None
    assert "forward" not in vars(model)


@torch.no_grad()
def check_limit(family: Family) -> None:
    """What needs more codes than are allowed runs op by op, and that is told; nothing of it is left for the next."""
    model, times = scramble(family.make()), (0.9, 0.5)
    runs, steps = [family.x(t) for t in times], family.steps(*times)
    model.pack(steps, kernel_layout=False)
    expected = [model(**x).sample for x in runs]
    torch._dynamo.reset()
    allowed = execution.RECOMPILE_LIMIT
    for limit in (1, allowed):
        execution.RECOMPILE_LIMIT = limit
        with Execution(model, "compile") as run:
            for x, out in zip(runs, expected, strict=True):
                torch.testing.assert_close(model(**x).sample, out, atol=1e-5, rtol=1e-4)
        told = None if limit == allowed else "more than 1 codes of a function would be needed"
        assert run.op_by_op == told and run.recompilations > (limit == allowed)


def check_adapted(gate_scope: str) -> None:
    """Compiled blocks with TD-LoRA compute and learn what eager ones do, without a break in the graph."""
    runs = []
    for compiled in (False, True):
        model = add_td_lora(tiny_dynamic(), flux_config(gate_scope=gate_scope))
        shake(model).train()
        torch._dynamo.reset()
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        for times in ([0.2, 0.8], [0.3, 0.5]):
            model(gates="open", **inputs(times)).sample.square().mean().backward()
        runs.append({n: p.grad for n, p in model.named_parameters() if ".td_" in n})
    assert runs[0] and all(grad.any() for grad in runs[0].values())
    for name, grad in runs[0].items():
        torch.testing.assert_close(runs[1][name], grad, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    for number, each in enumerate(FAMILIES):
        check(each)
        print(each.name)
        check_execution(each, fixed=bool(number % 2))  # both of all would take ten minutes
        print(f"{each.name} execution")
    for fixed in (False, True):
        check_execution(RELEASED, fixed=fixed)
    print(f"{RELEASED.name} execution")
    check_limit(FAMILIES[1])
    print("limit")
    for scope in ("layer", "network"):
        check_adapted(scope)
        print(f"td_lora {scope}")
