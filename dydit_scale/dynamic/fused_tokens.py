"""The MLP of the chosen tokens: gather, two matrix products and scatter, fused on a GPU.

``mlp_on_rows`` runs Triton kernels (``token_kernels``) on CUDA in half precision where Triton is installed, as it is
with torch's builds for CUDA on Linux, and plain PyTorch everywhere else. The numbers are equal up to rounding: the
kernels keep in fp32 what the plain path rounds after each operation. They are tuned at the first call of each size (to
the next power of two of rows and widths), so call once before capturing a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor

Activation = Literal["gelu-approximate", "gelu"]
"""In diffusers' words: GELU by tanh, or exact."""
FUSED_DTYPES = (torch.float16, torch.bfloat16)


def fixed_rows(scores: Float[Tensor, "batch tokens"], k: int) -> Int64[Tensor, " rows"]:
    """Ascending places, among the flattened (batch, token) rows, of each sample's ``k`` tokens with the highest scores.

    The shape [batch * k] is static and the host waits for nothing.
    """
    batch, tokens = scores.shape
    if not 0 <= k <= tokens:
        raise ValueError(f"fixed_rows: expected k between 0 and the {tokens} tokens of a sample, got {k}")
    places = scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return (places + tokens * torch.arange(batch, device=scores.device)[:, None]).flatten()


def mlp_on_rows(
    x: Float[Tensor, "batch tokens dim"],
    rows: Int64[Tensor, " rows"],
    up_weight: Num[Tensor, "hidden dim"],
    up_bias: Float[Tensor, " hidden"] | None,
    down_weight: Num[Tensor, "dim hidden"],
    down_bias: Float[Tensor, " dim"] | None,
    gate: Float[Tensor, "batch dim"],
    *,
    activation: Activation,
    residual: Float[Tensor, "batch tokens dim"],
    shift: Float[Tensor, "batch dim"] | None = None,
    scale: Float[Tensor, "batch dim"] | None = None,
    up_scale: Float[Tensor, " hidden"] | None = None,
    down_scale: Float[Tensor, " dim"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """``residual`` with ``gate * MLP(x)`` added to the chosen rows of the flattened (batch, token) axes.

    Use the result in place of ``residual``, whose memory it may have taken. Where a gradient is recorded, the plain
    path runs and writes nothing in place.

    Args:
        x: the tokens after their normalisation.
        rows: distinct places, best ascending. Those outside of [0, batch * tokens), such as -1, are padding and do
            nothing, so that a list of fixed length may hold fewer.
        gate: of each sample.
        shift, scale: modulate each token first by those of its sample, ``x * (1 + scale) + shift``.
        up_scale, down_scale: of 8-bit weights, per output channel (``weight_only``).

    Raises:
        ValueError: an unknown activation, sizes that do not fit, or one of shift and scale without the other.
    """
    given = {
        "up_weight": up_weight, "up_bias": up_bias, "down_weight": down_weight, "down_bias": down_bias, "gate": gate,
        "residual": residual, "shift": shift, "scale": scale, "up_scale": up_scale, "down_scale": down_scale,
    }  # fmt: skip
    _check(x, rows, len(up_weight), activation, given)
    tanh = activation == "gelu-approximate"
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given.values()))
    flat, out = x.flatten(0, 1), residual.flatten(0, 1)
    if not recorded and _is_fused(x, up_weight, down_weight):
        out = out.contiguous()
        run = _fused_op if torch.compiler.is_compiling() else _fused
        run(
            flat, rows, up_weight, up_bias, down_weight, down_bias, gate, out, shift, scale, up_scale, down_scale,
            x.shape[1], tanh,
        )  # fmt: skip
        return out.view_as(residual)
    part = _plain(x, rows, up_weight, up_bias, down_weight, down_bias, gate, tanh, shift, scale, up_scale, down_scale)
    part, rows = part.to(out.dtype), rows.clamp(0, len(flat) - 1)  # padding adds zero there
    in_place = not recorded and out.is_contiguous()
    return (out.index_add_(0, rows, part) if in_place else out.index_add(0, rows, part)).view_as(residual)


def _check(x: Tensor, rows: Tensor, hidden: int, activation: str, given: dict[str, Tensor | None]) -> None:
    """The kernels would read beyond the end of a tensor that is too small."""
    if activation not in ("gelu-approximate", "gelu"):
        raise ValueError(f"mlp_on_rows: expected activation 'gelu-approximate' or 'gelu', got {activation!r}")
    if (given["shift"] is None) != (given["scale"] is None):
        raise ValueError("mlp_on_rows: shift and scale modulate together; give both or neither")
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"mlp_on_rows: rows: expected a list of int64, got {list(rows.shape)} of {rows.dtype}")
    batch, _, dim = x.shape
    shapes = {"up_weight": (hidden, dim), "down_weight": (dim, hidden), "residual": tuple(x.shape)}
    shapes |= {"up_bias": (hidden,), "up_scale": (hidden,), "down_bias": (dim,), "down_scale": (dim,)}
    for name, tensor in given.items():
        shape = shapes.get(name, (batch, dim))
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"mlp_on_rows: {name}: expected {list(shape)} for x {list(x.shape)} and {hidden} hidden channels, got "
                f"{list(tensor.shape)}"
            )


def _plain(
    x: Tensor, rows: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None,
    gate: Tensor, tanh: bool, shift: Tensor | None, scale: Tensor | None, up_scale: Tensor | None,
    down_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """What is added to each row [rows, dim]; zero for padding."""
    batch, tokens, _ = x.shape
    chosen = (rows >= 0) & (rows < batch * tokens)
    rows = rows.clamp(0, batch * tokens - 1)
    sample = rows // tokens
    part = x.flatten(0, 1)[rows]
    if shift is not None and scale is not None:
        part = part * (1 + scale[sample]) + shift[sample]
    part = F.gelu(_linear(part, up_weight, up_bias, up_scale), approximate="tanh" if tanh else "none")
    part = gate[sample] * _linear(part, down_weight, down_bias, down_scale)
    return part.masked_fill(~chosen[:, None], 0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    if weight_scale is not None:
        weight = weight.to(x.dtype).mul_(weight_scale.to(x.dtype)[:, None])
    return F.linear(x, weight, bias)


def _is_fused(x: Tensor, *weights: Tensor) -> bool:
    is_fp8 = any(weight.dtype == torch.float8_e4m3fn for weight in weights)
    return x.is_cuda and x.dtype in FUSED_DTYPES and _capability(x.device) >= ((8, 9) if is_fp8 else (8, 0))


def why_plain(x: Tensor, *weights: Tensor) -> str | None:
    """Why ``mlp_on_rows`` takes the plain path for such tensors; None where it runs the kernels."""
    if _is_fused(x, *weights):
        return None
    if not x.is_cuda:
        return f"they are for CUDA, and the model is on {x.device.type}"
    if x.dtype not in FUSED_DTYPES:
        return f"they are for half precision, and the model is in {x.dtype}"
    if not find_spec("triton"):
        return "Triton is not installed"
    major, minor = _capability(x.device)
    return f"they need compute capability 8.0, or 8.9 for fp8 weights, and the GPU has {major}.{minor}"


@torch.compiler.assume_constant_result
@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability, which decides what Triton can compile; (0, 0) without Triton."""
    return torch.cuda.get_device_capability(device) if find_spec("triton") else (0, 0)


def _fused(
    x: Tensor, rows: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None,
    gate: Tensor, out: Tensor, shift: Tensor | None, scale: Tensor | None, up_scale: Tensor | None,
    down_scale: Tensor | None, tokens: int, tanh: bool,
) -> None:  # fmt: skip
    from dydit_scale.dynamic import token_kernels

    if len(rows) == 0:
        return
    token_kernels.run(
        _near(x), rows, _near(up_weight), _near(up_bias), _near(down_weight), _near(down_bias), _near(gate), out,
        tokens=tokens, tanh=tanh, shift=_near(shift), scale=_near(scale), up_scale=_near(up_scale),
        down_scale=_near(down_scale),
    )  # fmt: skip


@overload
def _near(x: Tensor) -> Tensor: ...
@overload
def _near(x: None) -> None: ...
def _near(x: Tensor | None) -> Tensor | None:
    """With neighbouring elements in the last axis, as the kernels read them; rows may lie apart."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


# To torch.compile the kernels are one operation.
_fused_op = torch.library.custom_op(
    "dydit_scale::mlp_on_rows",
    _fused,
    mutates_args=("out",),
    schema=(
        "(Tensor x, Tensor rows, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
        "Tensor gate, Tensor(a!) out, Tensor? shift, Tensor? scale, Tensor? up_scale, Tensor? down_scale, "
        "SymInt tokens, bool tanh) -> ()"
    ),
)
_fused_op.register_fake(lambda *args: None)
