"""Layers that compute in the precision of their input, whatever their weights are stored in.

A decision needs fp32 where the model runs in bf16. Their weights are read inside their own forward, so that hooks which
bring the weights (offloading, casting) act on them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class UpcastLinear(nn.Linear):
    """``nn.Linear`` with its weights cast to the input's dtype; the same bit for bit where they have it already."""

    @classmethod
    def of(cls, linear: nn.Linear) -> UpcastLinear:
        """The layer again, sharing its parameters."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; autocast must be off."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class UpcastLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` with its weights cast to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
