"""Linear layers whose weights lie as the CPU's matrix product wants them, with the GELU behind them in the same kernel.

oneDNN reorders a plain weight in every call; slices are copies anyway, so they can be stored reordered. torch offers
this to its compiler's frozen graphs (``torch.ops.mkldnn``).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dydit_scale.dynamic.packing import CutLinear, shallow

Gelu = Literal["none", "tanh"]
"""diffusers' names of the exact GELU and of its approximation."""


def has_kernel_layout(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this kind can be laid out for this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype in (torch.bfloat16, torch.float16):
        name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
        return bool(getattr(torch.ops.mkldnn, name, bool)())
    return dtype == torch.float32


class KernelLinear(nn.Module):
    """A cut layer in the kernel's layout, optionally followed by a GELU. Raises ValueError off the CPU."""

    def __init__(self, linear: CutLinear, gelu: Gelu | None = None) -> None:
        super().__init__()
        if not has_kernel_layout(linear.weight.device, linear.weight.dtype):
            raise ValueError(f"no kernel layout for {linear.weight.dtype} on {linear.weight.device}")
        self.linear_shape = (linear.out_features, linear.in_features)
        self.bias = linear.bias
        self.gelu = gelu
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), None)
        # Of the slice, what low_rank_at needs.
        self.source = (without_weight(linear),)

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return self.weight.numel() * self.weight.element_size()

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """The product, through the GELU if there is one; under autocast computed as the weights are, and cast after
        it."""
        if torch.is_autocast_enabled("cpu"):  # which does not know this operation
            return self._product(x.to(self.weight.dtype)).to(torch.get_autocast_dtype("cpu"))
        return self._product(x)

    def _product(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        kind, algorithm = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, kind, [], algorithm)

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelLinear:
        """The copy has the same weight: it never changes, and torch cannot copy one in this layout."""
        return shallow(self, bias=copy.deepcopy(self.bias, memo), source=copy.deepcopy(self.source, memo))

    def low_rank_at(self, t_emb: Float[Tensor, "1 dim"]) -> tuple[Tensor, Tensor] | None:
        """As the slice's."""
        return self.source[0].low_rank_at(t_emb)


def without_weight(linear: CutLinear) -> CutLinear:
    """The slice without its weight and bias: where it was cut, which ``low_rank_at`` needs."""
    empty = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    return shallow(linear, weight=empty, bias=None)


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _linear_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * weight_shape[0] * weight_shape[1]
