"""Build the kernels of fused_tokens for GPUs that need not be there; prints a JSON object: GPU and weights -> the
assembler's instruction for products of matrices, of both kernels.

    python -m tests.dynamic.kernel_builds
"""

from __future__ import annotations

import json
import re
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dydit_scale.dynamic.token_kernels import COUNTS, TILES, down_kernel, up_kernel

BUILDS = [(80, "bf16"), (80, "i8"), (90, "fp16"), (90, "bf16"), (90, "i8"), (90, "fp8e4nv"), (100, "bf16")]
OPTIONAL = {"weight_scale_at": "SCALED", "shift_at": "MODULATED", "scale_at": "MODULATED"}


def build(kernel: Any, capability: int, weights: str) -> str:
    """Modulated for bf16, as the only difference in one build for each GPU."""
    tiles = TILES[1]
    flags = {"SCALED": weights in ("i8", "fp8e4nv"), "BIASED": True, "MODULATED": weights == "bf16", "TANH": True}
    flags |= tiles.kwargs
    of_x = "fp16" if weights == "fp16" else "bf16"
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.fn.arg_names):
        absent = name in OPTIONAL and not flags[OPTIONAL[name]]
        if absent or name in flags:
            signature[name], constants[(place,)] = "constexpr", None if absent else flags[name]
            continue
        types = {"rows_at": "*i64", "weight_at": f"*{weights}"}
        signature[name] = types.get(name, f"*{of_x}" if name.endswith("_at") else "i32")
        if name not in COUNTS:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel.fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", built.asm["ptx"])
    return found.group() if found else "none"


if __name__ == "__main__":
    print(json.dumps({f"{c} {w}": [build(up_kernel, c, w), build(down_kernel, c, w)] for c, w in BUILDS}))
