"""Masks and gates over the channels and tokens of a tensor, with little traffic: the products of a backward stay in
the cache, and nothing is kept for masks that do not learn. Written out, autograd would make and keep each product
whole, and that is what a masked step would cost beyond the static one. torch.compile joins such products by itself and
is given them plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1 << 18
"""Elements that a CPU takes at a time; other devices take all, for each of their steps costs a launch."""


def masked(
    x: Float[Tensor, "batch tokens channels"],
    channels: Float[Tensor, "batch_m channels"],
    tokens: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """``x * channels * tokens``, with the gradients of all three; ``batch_m`` is the batch, or 1 for all."""
    return _Masked.apply(x, channels.to(x.dtype), None if tokens is None else tokens.to(x.dtype))


def masked_gelu(
    x: Float[Tensor, "batch tokens channels"], approximate: str, channels: Float[Tensor, "batch_m channels"]
) -> Float[Tensor, "batch tokens channels"]:
    """``masked(gelu(x), channels)``; the GELU is computed again in the backward and not kept."""
    if torch.compiler.is_compiling():
        return masked(F.gelu(x, approximate=approximate), channels)
    return _MaskedGELU.apply(x, approximate, channels.to(x.dtype))


def masked_cat(
    a: Float[Tensor, "batch tokens channels_a"],
    of_a: Float[Tensor, "batch_a channels_a"] | None,
    b: Float[Tensor, "batch tokens channels_b"],
    of_b: Float[Tensor, "batch_b channels_b"] | None,
    tokens: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """``masked(a, of_a)`` and ``masked(b, of_b, tokens)`` side by side; without a mask all channels work."""
    if of_a is None and of_b is None and tokens is None:
        return torch.cat([a, b], dim=2)
    of_a, of_b = (x.new_ones(1, x.shape[2]) if mask is None else mask for x, mask in ((a, of_a), (b, of_b)))
    if torch.compiler.is_compiling():
        return torch.cat([masked(a, of_a), masked(b, of_b, tokens)], dim=2)
    return _MaskedCat.apply(a, of_a.to(a.dtype), b, of_b.to(b.dtype), None if tokens is None else tokens.to(b.dtype))


def gated_add(
    stream: Float[Tensor, "batch tokens channels"],
    gate: Float[Tensor, "batch channels"],
    x: Float[Tensor, "batch tokens channels"],
    tokens: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """``stream + gate * x``, on kept tokens only; exact where all are kept."""
    if torch.compiler.is_compiling():
        return stream + _product(x, gate, tokens)
    return _GatedAdd.apply(stream, x, gate, tokens)


def modulate(
    x: Float[Tensor, "batch tokens channels"],
    scale: Float[Tensor, "batch channels"],
    shift: Float[Tensor, "batch channels"],
) -> Float[Tensor, "batch tokens channels"]:
    """``x * (1 + scale) + shift``."""
    if torch.compiler.is_compiling():
        return x * (1 + scale[:, None]) + shift[:, None]
    return _Modulate.apply(x, 1 + scale, shift)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: Tensor, tokens: Tensor | None) -> Tensor:
        ctx.save_for_backward(_kept(x, ctx, 1), channels, tokens)
        return _product(x, channels, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, channels, tokens = ctx.saved_tensors
        return _gradients(grad, x, channels, tokens, grad.dtype)


class _MaskedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, channels: Tensor) -> Tensor:
        ctx.save_for_backward(x, channels)
        ctx.approximate, ctx.learns = approximate, ctx.needs_input_grad[2]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for at in _chunks(x):
            torch.mul(F.gelu(x[:, at], approximate=approximate), channels[:, None], out=out[:, at])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, channels = ctx.saved_tensors
        for_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for_channels = _zeros(x)
        for at in _chunks(x):
            if ctx.learns:
                part = F.gelu(x[:, at], approximate=ctx.approximate).mul_(grad[:, at])
                for_channels += part.sum(1, dtype=for_channels.dtype)
            part = grad[:, at] * channels[:, None]
            torch.ops.aten.gelu_backward.grad_input(
                part, x[:, at], approximate=ctx.approximate, grad_input=for_x[:, at]
            )
        return for_x, None, _summed(for_channels, channels) if ctx.learns else None


class _MaskedCat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor, tokens: Tensor | None) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, of_a, _kept(b, ctx, 3), of_b, tokens)
        ctx.sizes = [a.shape[2], b.shape[2]]
        out = a.new_empty(*a.shape[:2], sum(ctx.sizes))
        left, right = out.split(ctx.sizes, dim=2)
        torch.mul(a, of_a[:, None], out=left)
        torch.mul(b, of_b[:, None], out=right)
        if tokens is not None:
            right *= tokens[..., None]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, of_a, b, of_b, tokens = ctx.saved_tensors
        left, right = grad.split(ctx.sizes, dim=2)
        for_a, for_of_a, _ = _gradients(left, a, of_a, None, grad.dtype)
        return for_a, for_of_a, *_gradients(right, b, of_b, tokens, grad.dtype)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, x: Tensor, gate: Tensor, tokens: Tensor | None) -> Tensor:
        ctx.save_for_backward(_kept(x, ctx, 2), gate, tokens)
        out = _product(x, gate, tokens)
        ctx.dtypes = out.dtype, x.dtype
        return out.add_(stream) if stream.dtype == out.dtype else stream + out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_product, of_x = ctx.dtypes
        x, gate, tokens = ctx.saved_tensors
        return grad, *_gradients(grad.to(of_product), x, gate, tokens, of_x)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(_kept(x, ctx, 1), factor)
        ctx.of_x, ctx.of_shift = x.dtype, shift.dtype
        out = _product(x, factor, None)
        return out.add_(shift[:, None]) if shift.dtype == out.dtype else out + shift[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        for_x, for_factor, _ = _gradients(grad, x, factor, None, ctx.of_x)
        return for_x, for_factor, grad.sum(1).to(ctx.of_shift) if ctx.needs_input_grad[2] else None


def _kept(x: Tensor, ctx: Any, masks: int) -> Tensor | None:
    """``x`` if one of the inputs from number ``masks`` on, the masks, learns from it."""
    return x if any(ctx.needs_input_grad[masks:]) else None


def _product(x: Tensor, channels: Tensor, tokens: Tensor | None) -> Tensor:
    out = x * channels[:, None]
    return out if tokens is None else out.mul_(tokens[..., None])


def _gradients(
    grad: Tensor, x: Tensor | None, channels: Tensor, tokens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of ``_product``: of ``x``, in its ``dtype``, and without ``x`` of nothing else."""
    for_x = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    for_channels = _zeros(grad)
    for_tokens = None if tokens is None else torch.empty_like(tokens)
    for at in _chunks(grad):
        part = torch.mul(grad[:, at], channels[:, None], out=for_x[:, at])
        if tokens is not None:
            part *= tokens[:, at, None]
        if x is not None:
            product = grad[:, at] * x[:, at]  # batch rows channels
            if for_tokens is not None and tokens is not None:
                for_tokens[:, at] = (product * channels[:, None]).sum(-1)
                product *= tokens[:, at, None]
            for_channels += product.sum(1, dtype=for_channels.dtype)
    if x is None:
        return for_x, None, None
    return for_x, _summed(for_channels, channels), for_tokens


def _chunks(x: Tensor) -> Iterator[slice]:
    """Of the tokens."""
    rows = max(1, _CHUNK // (len(x) * x.shape[2])) if x.device.type == "cpu" else x.shape[1]
    return (slice(start, start + rows) for start in range(0, x.shape[1], rows))


def _zeros(x: Tensor) -> Tensor:
    """[batch, channels], to sum up in."""
    return torch.zeros(len(x), x.shape[2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float))


def _summed(found: Tensor, channels: Tensor) -> Tensor:
    return found.sum_to_size(channels.shape).to(channels.dtype)
