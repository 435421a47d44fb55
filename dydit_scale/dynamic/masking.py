"""Masks over the channels and tokens of a tensor, with little traffic: the products of a backward stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 1 << 18
"""Elements that a CPU takes at a time; other devices take all, for each of their steps costs a launch."""


def masked(
    x: Float[Tensor, "batch tokens channels"],
    channels: Float[Tensor, "batch_m channels"],
    tokens: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """``x * channels * tokens``, with the gradients of all three; ``batch_m`` is the batch, or 1 for all.

    Written out, autograd would make and keep each product whole. These are as large as the MLP's hidden layer, and are
    what a masked step costs beyond the static one.
    """
    return _Masked.apply(x, channels.to(x.dtype), None if tokens is None else tokens.to(x.dtype))


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: Tensor, tokens: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, channels, tokens)
        out = x * channels[:, None]
        return out if tokens is None else out.mul_(tokens[..., None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, channels, tokens = ctx.saved_tensors
        for_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        learns = any(ctx.needs_input_grad[1:])
        for_channels = torch.zeros(len(x), x.shape[2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float))
        for_tokens = None if tokens is None else torch.empty_like(tokens)
        rows = max(1, _CHUNK // (len(x) * x.shape[2])) if x.device.type == "cpu" else x.shape[1]
        for at in (slice(start, start + rows) for start in range(0, x.shape[1], rows)):
            part = torch.mul(grad[:, at], channels[:, None], out=for_x[:, at])
            if tokens is not None:
                part *= tokens[:, at, None]
            if learns:
                product = grad[:, at] * x[:, at]  # batch rows channels
                if for_tokens is not None and tokens is not None:
                    for_tokens[:, at] = (product * channels[:, None]).sum(-1)
                    product *= tokens[:, at, None]
                for_channels += product.sum(1, dtype=for_channels.dtype)
        if not learns:
            return for_x, None, None
        return for_x, for_channels.sum_to_size(channels.shape).to(channels.dtype), for_tokens
