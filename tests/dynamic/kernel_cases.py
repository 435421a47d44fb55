"""The kernels of fused_tokens beside the plain path, in a process of its own: Triton reads TRITON_INTERPRET once.

    TRITON_INTERPRET=1 python -m tests.dynamic.kernel_cases cpu
    python -m tests.dynamic.kernel_cases cuda

Prints one JSON object: for each case the relative errors of both paths against fp64, how many rows were changed, and
whether all of these were meant.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from dydit_scale.dynamic import fused_tokens
from dydit_scale.dynamic.fused_tokens import mlp_on_rows

SMALL = {"batch": 2, "tokens": 21, "dim": 24, "hidden": 40, "chosen": 19}
XL = {"batch": 8, "tokens": 256, "dim": 1152, "hidden": 2592, "chosen": 1001, "padding": 23}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "fp32, compiled": {**SMALL, "dtype": torch.float32, "compiled": True},
        "odd widths": {**SMALL, "dtype": torch.float32, "dim": 33, "hidden": 19, "chosen": 42},
        "one row": {**SMALL, "dtype": torch.float32, "chosen": 1, "padding": 0},
        "no row": {**SMALL, "dtype": torch.float32, "chosen": 0, "padding": 0},
        "padding alone": {**SMALL, "dtype": torch.float32, "chosen": 0, "padding": 40},
        "no bias, exact GELU": {**SMALL, "dtype": torch.float32, "bias": False, "activation": "gelu"},
        "modulated": {**SMALL, "dtype": torch.float32, "modulated": True},
        "bf16, modulated": {**SMALL, "dtype": torch.bfloat16, "modulated": True},
        "fp16": {**SMALL, "dtype": torch.float16},
        "int8": {**SMALL, "dtype": torch.bfloat16, "weights": torch.int8},
        "fp8": {**SMALL, "dtype": torch.bfloat16, "weights": torch.float8_e4m3fn},
    },
    "cuda": {
        "DiT-XL, compiled": {**XL, "dtype": torch.bfloat16, "compiled": True},
        "DiT-XL, modulated": {**XL, "dtype": torch.float16, "modulated": True},
        "DiT-XL, int8": {**XL, "dtype": torch.bfloat16, "weights": torch.int8},
        "FLUX": {"batch": 1, "tokens": 4608, "dim": 3072, "hidden": 7424, "chosen": 2000, "dtype": torch.bfloat16},
        "odd widths": {"batch": 3, "tokens": 64, "dim": 384, "hidden": 1003, "chosen": 101, "dtype": torch.bfloat16},
    },
}


def measure(
    batch: int, tokens: int, dim: int, hidden: int, chosen: int, dtype: torch.dtype, device: str, padding: int = 3,
    bias: bool = True, modulated: bool = False, weights: torch.dtype | None = None,
    activation: Any = "gelu-approximate", compiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One case. Weights and gate are slices of something larger, as in a packed model."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    up, down = normal(hidden, dim) / dim**0.5, (normal(dim, hidden + 8) / hidden**0.5)[:, 4:-4]
    x, residual, gate = normal(batch, tokens, dim), normal(batch, tokens, dim), normal(batch, 2 * dim)[:, dim:]
    rows = torch.cat(
        [torch.randperm(batch * tokens, generator=draw)[:chosen].sort().values, torch.full((padding,), -1)]
    )
    options: dict[str, Any] = {"activation": activation}
    if modulated:
        options |= {"shift": normal(batch, dim), "scale": normal(batch, 3 * dim)[:, dim:-dim]}
    if weights is not None:
        options |= {"up_scale": normal(hidden).abs(), "down_scale": normal(dim).abs()}
        up, down = (up * 30).to(weights), (down * 30).to(weights)
    biases = (normal(hidden, 2)[:, 1], normal(dim)) if bias else (None, None)
    given = (x, rows.to(device), up, biases[0], down, biases[1], gate)

    def run(fused: bool, call: Any = mlp_on_rows, as_: torch.dtype | None = None) -> Tensor:
        fused_tokens._is_fused = lambda x, *weights: fused and fused_tokens._capability(x.device) >= (8, 0)  # type: ignore[assignment]
        cast = [t.to(as_) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
        named = {name: t.to(as_) if isinstance(t, Tensor) else t for name, t in options.items()}
        with torch.no_grad():
            return call(*cast, residual=residual.clone().to(as_), **named)

    def error(out: Tensor) -> float:
        return float((out.double() - exact).norm() / (exact - residual.double()).norm().clamp_min(1e-30))

    fused, plain = run(fused=True), run(fused=False)
    exact = run(fused=False, as_=torch.float64)
    if compiled:
        torch.compiler.reset()
        graph = torch.compile(mlp_on_rows, backend="aot_eager", fullgraph=True)
        assert torch.equal(run(fused=True, call=graph), fused)
    changed = (fused != residual).any(2).flatten()
    return {
        "fused": error(fused),
        "plain": error(plain),
        "changed": int(changed.sum()),
        "expected": chosen,
        "as meant": set(changed.nonzero().flatten().tolist()) == set(rows[:chosen].tolist()),
    }


def main() -> None:
    (device,) = sys.argv[1:]
    if device == "cpu":  # what decides on the kernels asks the GPU
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
    print(json.dumps({name: measure(**case, device=device) for name, case in CASES[device].items()}))


if __name__ == "__main__":
    main()
