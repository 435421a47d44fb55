"""Linear layers with 8-bit weights, and the dense weight of layers that a library has quantised.

``compress`` halves the memory of a half-precision layer. It is no speed-up: the weight is cast at each call, as the
weight-only layers of torchao do it. That is one operation per element beside one multiplication per element and row of
the input, so little where there are hundreds of rows. On a GPU ``fused_tokens.mlp_on_rows`` reads 8 bits as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

Kind = Literal["int8", "fp8"]
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class WeightOnlyLinear(nn.Module):
    """y = x (scale * W)^T + bias with W in 8 bits and a scale per output channel, in the dtype of x. Not trained."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Num[Tensor, "out in"],
        scale: Float[Tensor, " out"],
        bias: Float[Tensor, " out"] | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """x [..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight that it computes with."""
        # Scaled before the multiplication: in fp16 an unscaled product would overflow.
        return self.weight.to(dtype).mul_(self.scale.to(dtype)[:, None])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.weight.dtype}"


@torch.no_grad()
def compress(linear: nn.Linear, kind: Kind) -> WeightOnlyLinear:
    """A layer that computes like ``linear`` up to the rounding of its weight to int8 or fp8 (e4m3).

    Rows are rounded each by its own largest element, so that cutting rows and compressing commute.

    Raises:
        ValueError: an unknown kind; a layer with adapters, a quantised or not finite weight, or one without elements; a
            dtype that it cannot compute in; fp8 on a device other than CUDA.
    """
    _check_compressible(linear, kind)
    target = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    largest = LARGEST[target]
    weight = linear.weight.float()
    # In the dtype that it is used in, before the weight is divided by it. A row below its range is zero in that dtype.
    scale = (weight.abs().amax(dim=1) / largest).to(linear.weight.dtype)
    divided = weight / torch.where(scale > 0, scale, 1).float()[:, None]
    if kind == "int8":
        divided = divided.round()
    bias = None if linear.bias is None else linear.bias.detach()
    return WeightOnlyLinear(divided.clamp(-largest, largest).to(target), scale, bias)


def _check_compressible(linear: Any, kind: str) -> None:
    if kind not in ("int8", "fp8"):
        raise ValueError(f"compress: expected 'int8' or 'fp8', got {kind!r}")
    computes_plainly = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not computes_plainly or hasattr(linear, "weight_at") or type(linear.weight.data) is not Tensor:
        weight = getattr(linear, "weight", None)
        raise ValueError(
            f"compress: expected a plain nn.Linear, got {type(linear).__name__} with a weight of "
            f"{type(weight).__name__}; fold adapters and dequantise first (CutLinear)"
        )
    weight, where = linear.weight, f"compress: {kind} weights on {linear.weight.device.type}"
    if weight.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{where}: expected a layer in float16, bfloat16 or float32, got {weight.dtype}; cast it")
    if weight.is_meta:
        raise ValueError(f"{where}: the weight has no values; load it first")
    if kind == "fp8" and weight.device.type != "cuda":
        raise ValueError(
            f"{where} in {weight.dtype}: torch casts fp8 element by element there, which costs as much as the "
            "multiplication; use int8, which has the same size and rounds less, or a CUDA device"
        )
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise ValueError(f"{where}: the weight {list(weight.shape)} has no elements, or some that are not finite")


def quantisation_of(layer: nn.Module) -> QuantizationBackend | None:
    """What peft knows of the layer's quantisation (bitsandbytes, torchao, HQQ and more); None if it has none."""
    from peft.utils.quantization_utils import resolve_quantization_backend

    # What torchao would quantise anew with is for merging into the quantised weight, which no layer of ours does.
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=_never)


def _never() -> Any:
    raise NotImplementedError("nothing is merged into quantised weights")


@torch.no_grad()
def dense_weight(linear: Any, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """The weight of a linear layer without adapters, dequantised by the library that quantised it.

    Args:
        dtype: of the result; without it that of the bias where there is one, else what the library gives.

    Raises:
        ValueError: quantised in a way that peft does not know or cannot undo.
    """
    if isinstance(linear, WeightOnlyLinear):
        return linear.dense_weight(dtype or linear.scale.dtype)
    weight, kind, backend = getattr(linear, "weight", None), type(linear).__name__, None
    if not is_plain(weight):
        backend = quantisation_of(linear)
        try:
            weight = weight if backend is None else backend.get_base_weight(linear)
        except (NotImplementedError, TypeError) as error:
            raise ValueError(f"dense_weight: {kind} is quantised and cannot be dequantised: {error}") from error
    if not is_plain(weight):
        raise ValueError(
            f"dense_weight: {kind} has a weight of {type(weight).__name__} ({getattr(weight, 'dtype', None)}), "
            "quantised in a way that peft does not know; load the model unquantised, or with bitsandbytes or torchao"
        )
    bias = getattr(linear, "bias", None)
    known = weight.dtype if backend is None or bias is None else bias.dtype
    return weight.detach().to(dtype or known)


def is_plain(weight: Any) -> TypeGuard[Tensor]:
    """Whether a weight is an ordinary tensor of floating point."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in (*COMPUTE_DTYPES, torch.float64)
