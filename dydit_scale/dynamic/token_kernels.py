"""The two Triton kernels of an MLP on chosen tokens. Imported only where Triton is: see ``fused_tokens``.

The up-projection reads the chosen rows where they lie, the down-projection adds to the residual where they lie, so that
no gathered copy of the tokens, no separate activation and no separate scatter touch memory. Rows are unique: no two
programs write the same element, and no atomics are needed. Sums are in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor

TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in [
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 32, 4, 4),
        (64, 128, 64, 4, 4),
        (64, 256, 32, 4, 4),
        (32, 128, 64, 4, 5),
    ]
]
"""What the autotuner chooses from."""
SIZES = ["rows_about", "width_about", "inner_about"]
"""The next powers of two, so that it chooses a few times, not for each count of rows and width of a packed model."""
COUNTS = ["n_rows", "all_rows", *SIZES]
_bench = partial(triton.testing.do_bench, warmup=5, rep=20)  # milliseconds
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter runs here (TRITON_INTERPRET=1). It cannot tune, and it multiplies the bits of bf16 as if they
were integers."""


@triton.jit
@no_type_check
def _tile(n_rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Places in the list of rows, and columns, of this program; GROUP tiles of rows share the weight in the cache."""
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    height = min(tl.cdiv(n_rows, BLOCK_M) - first, GROUP)
    within = program % (GROUP * across)
    place = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return place.to(tl.int64), within // height * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
@no_type_check
def _gelu(x, TANH: tl.constexpr):
    if TANH:  # (1 + tanh u) / 2 = sigmoid 2u
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * share


@triton.jit
@no_type_check
def _affine(total, bias_at, scale_at, cols, width, BIASED: tl.constexpr, SCALED: tl.constexpr):
    """The weight's scale per output channel, then the bias."""
    if SCALED:
        total *= tl.load(scale_at + cols, mask=cols < width, other=0).to(tl.float32)[None, :]
    if BIASED:
        total += tl.load(bias_at + cols, mask=cols < width, other=0).to(tl.float32)[None, :]
    return total


@triton.jit
@no_type_check
def _dot(a, weight, total):
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), weight.to(tl.float32), total)
    else:
        total = tl.dot(a, weight.to(a.dtype), total)  # exact for 8-bit weights
    return total


@triton.autotune(TILES, key=SIZES, do_bench=_bench)
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def up_kernel(
    x_at, rows_at, weight_at, weight_scale_at, bias_at, shift_at, scale_at, hidden_at,
    x_stride, weight_stride, shift_stride, scale_stride, hidden_stride,
    n_rows, all_rows, rows_about, width_about, inner_about, tokens, width, inner_width,
    SCALED: tl.constexpr, BIASED: tl.constexpr, MODULATED: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden[i] = gelu(weight_scale * (W x[rows[i]]) + bias), x modulated by its sample's scale and shift."""
    place, cols = _tile(n_rows, width, BLOCK_M, BLOCK_N, GROUP)
    row = tl.load(rows_at + place, mask=place < n_rows, other=-1)
    chosen = (row >= 0) & (row < all_rows)
    if tl.max(chosen.to(tl.int32)) == 0:
        return
    row = tl.where(chosen, row, 0)
    sample = row // tokens
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = inner < inner_width
        of_x = chosen[:, None] & inside[None, :]
        x = tl.load(x_at + row[:, None] * x_stride + inner[None, :], mask=of_x, other=0)
        if MODULATED:
            scale = tl.load(scale_at + sample[:, None] * scale_stride + inner[None, :], mask=of_x, other=0)
            shift = tl.load(shift_at + sample[:, None] * shift_stride + inner[None, :], mask=of_x, other=0)
            x = (x.to(tl.float32) * (1 + scale.to(tl.float32)) + shift.to(tl.float32)).to(x.dtype)
        of_weight = inside[:, None] & (cols < width)[None, :]
        weight = tl.load(weight_at + cols[None, :] * weight_stride + inner[:, None], mask=of_weight, other=0.0)
        total = _dot(x, weight, total)
    total = _gelu(_affine(total, bias_at, weight_scale_at, cols, width, BIASED, SCALED), TANH)
    at = hidden_at + place[:, None] * hidden_stride + cols[None, :]
    tl.store(at, total.to(hidden_at.dtype.element_ty), mask=chosen[:, None] & (cols < width)[None, :])


@triton.autotune(TILES, key=SIZES, do_bench=_bench, restore_value=["out_at"])
@triton.jit(do_not_specialize=COUNTS)
@no_type_check
def down_kernel(
    hidden_at, rows_at, weight_at, weight_scale_at, bias_at, gate_at, out_at,
    hidden_stride, weight_stride, gate_stride, out_stride,
    n_rows, all_rows, rows_about, width_about, inner_about, tokens, width, inner_width,
    SCALED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[rows[i]] += gate of the row's sample * (weight_scale * (W hidden[i]) + bias)."""
    place, cols = _tile(n_rows, width, BLOCK_M, BLOCK_N, GROUP)
    row = tl.load(rows_at + place, mask=place < n_rows, other=-1)
    chosen = (row >= 0) & (row < all_rows)
    if tl.max(chosen.to(tl.int32)) == 0:
        return
    row = tl.where(chosen, row, 0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = inner < inner_width
        of_hidden = chosen[:, None] & inside[None, :]
        hidden = tl.load(hidden_at + place[:, None] * hidden_stride + inner[None, :], mask=of_hidden, other=0)
        of_weight = inside[:, None] & (cols < width)[None, :]
        weight = tl.load(weight_at + cols[None, :] * weight_stride + inner[:, None], mask=of_weight, other=0.0)
        total = _dot(hidden, weight, total)
    total = _affine(total, bias_at, weight_scale_at, cols, width, BIASED, SCALED)
    of_out = chosen[:, None] & (cols < width)[None, :]
    gate = tl.load(gate_at + (row // tokens)[:, None] * gate_stride + cols[None, :], mask=of_out, other=0)
    at = out_at + row[:, None] * out_stride + cols[None, :]
    out = tl.load(at, mask=of_out, other=0).to(tl.float32) + gate.to(tl.float32) * total
    tl.store(at, out.to(out_at.dtype.element_ty), mask=of_out)


def run(
    x: Tensor, rows: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None,
    gate: Tensor, out: Tensor, *, tokens: int, tanh: bool, shift: Tensor | None, scale: Tensor | None,
    up_scale: Tensor | None, down_scale: Tensor | None,
) -> None:  # fmt: skip
    """Add to ``out`` [batch*tokens, dim] in place; every matrix has neighbouring elements in its last axis."""
    hidden = x.new_empty(len(rows), len(up_weight))
    with torch.cuda.device_of(x):
        _launch(
            up_kernel,
            x, rows, up_weight, up_scale, up_bias, shift, scale, hidden,
            x.stride(0), up_weight.stride(0), 0 if shift is None else shift.stride(0),
            0 if scale is None else scale.stride(0), hidden.stride(0),
            **_sizes(rows, out, up_weight), tokens=tokens,
            SCALED=up_scale is not None, BIASED=up_bias is not None, MODULATED=shift is not None, TANH=tanh,
        )  # fmt: skip
        _launch(
            down_kernel,
            hidden, rows, down_weight, down_scale, down_bias, gate, out,
            hidden.stride(0), down_weight.stride(0), gate.stride(0), out.stride(0),
            **_sizes(rows, out, down_weight), tokens=tokens,
            SCALED=down_scale is not None, BIASED=down_bias is not None,
        )  # fmt: skip


def _sizes(rows: Tensor, out: Tensor, weight: Tensor) -> dict[str, int]:
    width, inner_width = weight.shape
    about = (triton.next_power_of_2(size) for size in (len(rows), width, inner_width))
    counts = {"n_rows": len(rows), "all_rows": len(out), "width": width, "inner_width": inner_width}
    return {**counts, **dict(zip(SIZES, about, strict=True))}


def _launch(kernel: Any, *args: Any, n_rows: int, width: int, **options: Any) -> None:
    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(n_rows, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)

    options |= {"n_rows": n_rows, "width": width}
    if INTERPRETED:
        kernel.fn[grid](*args, **options, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)
    else:
        kernel[grid](*args, **options)
