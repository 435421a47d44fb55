"""Linear layers that compute on a part of their rows or columns, with the gradient of the whole weight.

For training, where ``packing.CutLinear`` is for inference: a layer is cut anew in each forward, and inside its own
call, so that engines which gather weights for a block (FSDP2) or for a layer (ZeRO-3) have them there. The backward
cuts again instead of keeping the slice, which would outlive the gathered weight, and sharding would save nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

OUT: Literal[0] = 0
"""Rows of a weight: what a layer gives."""
IN: Literal[1] = 1
"""Columns of a weight: what a layer takes."""


def linear_on(
    x: Float[Tensor, "*rows in_active"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    index: Int64[Tensor, " active"] | None,
    dim: Literal[0, 1],
) -> Float[Tensor, "*rows out_active"]:
    """``F.linear`` with the rows (``OUT``) or columns (``IN``) of the weight that ``index`` names (None: all), in
    autocast's dtype or that of ``x``; a row's bias goes with it."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _LinearOn.apply(x, weight, bias, index, dim)


class _LinearOn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, dim: Literal[0, 1]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        ctx.dim, ctx.bias = dim, None if bias is None else (bias.shape, bias.dtype)
        if bias is not None:
            bias = (_part(bias, index, 0) if dim == OUT else bias).to(x.dtype)
        return F.linear(x, _part(weight, index, dim).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, index = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ _part(weight, index, ctx.dim).to(grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = _spread(rows.T @ x.reshape(-1, x.shape[-1]), index, ctx.dim, weight.shape, weight.dtype)
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            of_bias = _spread(rows.sum(0), index if ctx.dim == OUT else None, 0, shape, dtype)
        return of_x, of_weight, of_bias, None, None


def _part(x: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return x if index is None else x.index_select(dim, index)


def _spread(part: Tensor, index: Tensor | None, dim: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of ``_part``, with zeros elsewhere."""
    part = part.to(dtype)
    return part if index is None else part.new_zeros(shape).index_copy_(dim, index, part)


def called_as(layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``forward(x)`` as a call of the layer, with all its hooks: those of ZeRO-3 bring the weights."""
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        return layer(x)
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def weight_on(
    layer: Any, x: Tensor, index: Int64[Tensor, " active"] | None, dim: Literal[0, 1], *, bias: bool = True
) -> Tensor:
    """:func:`linear_on` with the weight and bias of a module, read in a call of it."""
    offset = getattr(layer, "bias", None) if bias else None
    return called_as(layer, lambda x: linear_on(x, layer.weight, offset, index, dim), x)


class SlicedLayer(nn.Module):
    """A linear layer, plain or adapted, on a part of its rows or columns; it reads the weights when it is called."""

    def __init__(
        self, layer: Any, index: Int64[Tensor, " active"] | None, dim: Literal[0, 1], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.layer, self.index, self.dim, self.bias = layer, index, dim, bias

    def forward(self, x: Float[Tensor, "*rows in_active"]) -> Float[Tensor, "*rows out_active"]:
        """The layer's output, or its part."""
        return sliced_linear(self.layer, x, self.index, self.dim, bias=self.bias)


def sliced_linear(
    layer: Any,
    x: Float[Tensor, "*rows in"],
    index: Int64[Tensor, " active"] | None,
    dim: Literal[0, 1],
    *,
    bias: bool = True,
) -> Tensor:
    """What the layer computes on these rows or columns, with its active adapters.

    Raises:
        ValueError: a quantised weight, or an adapter that does not act on rows or columns alone (DoRA).
    """
    # Called with all hooks even where they have no weight to bring: under ZeRO-3 each call may fetch what comes next,
    # and ranks, whose sub-networks differ, must fetch in one order.
    if hasattr(layer, "sliced"):  # TD-LoRA
        return called_as(layer, lambda x: layer.sliced(x, index, dim, bias=bias), x)
    if hasattr(layer, "lora_A"):
        return called_as(layer, lambda x: _with_lora(layer, x, index, dim, bias=bias), x)
    if not isinstance(layer.weight, Tensor) or not layer.weight.is_floating_point():
        raise ValueError(
            f"frozen_routers: a {type(layer).__name__} with a quantised weight cannot be cut; train without "
            "frozen_routers"
        )
    return weight_on(layer, x, index, dim, bias=bias)


def _with_lora(layer: Any, x: Tensor, index: Tensor | None, dim: Literal[0, 1], *, bias: bool) -> Tensor:
    """peft's LoRA: rows are those of B, columns those of A."""
    if layer.merged:
        raise ValueError("frozen_routers: a merged LoRA cannot be cut; unmerge it first")
    result = sliced_linear(layer.get_base_layer(), x, index, dim, bias=bias)
    for name in () if layer.disable_adapters else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            raise ValueError(
                f"frozen_routers: {name!r} is a variant of LoRA whose rows and columns depend on all (DoRA)"
            )
        a, b = layer.lora_A[name], layer.lora_B[name]
        z = layer.lora_dropout[name](x.to(a.weight.dtype))
        update = weight_on(b, a(z), index, OUT) if dim == OUT else b(weight_on(a, z, index, IN))
        result = result + (update * layer.scaling[name]).to(result.dtype)
    return result
