"""Slices in place of masks: a linear layer cut to its active rows and columns, and work on chosen tokens only."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def shallow(module: M, **changes: object) -> M:
    """The module again, sharing every tensor and submodule, except for ``changes`` by attribute name.

    Hooks that have replaced the module's forward stay with the original.
    """
    clone = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[registry] = dict(module.__dict__[registry])
    for hooked in ("forward", "_diffusers_hook"):
        clone.__dict__.pop(hooked, None)
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone


def is_adapted(module: nn.Module) -> bool:
    """Whether a linear layer computes with more than its ``weight``: TD-LoRA (``weight_at``) or a LoRA of peft."""
    return hasattr(module, "weight_at") or hasattr(module, "get_delta_weight")


def effective_weight(linear: Any, t_emb: Float[Tensor, "1 dim"] | None) -> Float[Tensor, "out in"]:
    """The weight that the layer computes with, its active adapters folded in; that of TD-LoRA at ``t_emb``."""
    if hasattr(linear, "weight_at"):
        return linear.weight_at(t_emb)
    if hasattr(linear, "get_delta_weight"):
        return _with_lora(linear)
    if not isinstance(linear.weight, Tensor) or not linear.weight.is_floating_point():
        raise ValueError(f"{type(linear).__name__} with a quantised weight cannot be sliced; sample without packing")
    return linear.weight


def _with_lora(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return weight
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    updated = weight + sum(layer.get_delta_weight(name).to(weight.dtype) for name in active)
    if not any(layer.use_dora.get(name) for name in active):
        return updated
    if len(active) > 1:
        raise ValueError(f"a DoRA beside other adapters ({', '.join(active)}) cannot be folded into a slice; keep one")
    magnitude = layer.lora_magnitude_vector[active[0]].weight.to(weight.dtype)
    return (magnitude / updated.norm(dim=1))[:, None] * updated


def slice_linear(
    linear: nn.Module,
    *,
    rows: Int64[Tensor, " out_active"] | None = None,
    cols: Int64[Tensor, " in_active"] | None = None,
    t_emb: Float[Tensor, "1 dim"] | None = None,
    bias: bool = True,
) -> nn.Linear:
    """A plain ``nn.Linear`` with the given rows (outputs) and columns (inputs), frozen. None keeps all of them.

    Ascending runs without holes are views of the original; everything else is a copy.
    """
    weight = effective_weight(linear, t_emb).detach()
    offset = getattr(linear, "bias", None)
    if rows is not None:
        weight = _take(weight, rows, 0)
        offset = None if offset is None else _take(offset.detach(), rows, 0)
    if cols is not None:
        weight = _take(weight, cols, 1)
    with torch.device("meta"):
        out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias and offset is not None)
    out.weight = nn.Parameter(weight, requires_grad=False)
    if bias and offset is not None:
        out.bias = nn.Parameter(offset.detach(), requires_grad=False)
    return out


def _take(x: Tensor, index: Int64[Tensor, " n"], dim: int) -> Tensor:
    n, first = len(index), int(index[0]) if len(index) else 0
    if n and bool((index == torch.arange(first, first + n, device=index.device)).all()):
        return x.narrow(dim, first, n)
    return x.index_select(dim, index.to(x.device))


def chosen_rows(keep: Float[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"]) -> Int64[Tensor, " rows"]:
    """Places of the kept tokens among the flattened (batch, token) rows."""
    return keep.flatten().nonzero().squeeze(1)


def add_on_rows(
    x: Float[Tensor, "batch tokens dim"],
    rows: Int64[Tensor, " rows"],
    done: Float[Tensor, "rows dim"],
    gate: Float[Tensor, "batch dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """``x`` with ``gate * done`` added to the chosen rows of the flattened tokens, each gated by its own sample's
    gate."""
    return x.flatten(0, 1).index_add(0, rows, done * gate[rows // x.shape[1]]).view_as(x)


def fold(module: M, t_emb: Float[Tensor, "1 dim"] | None) -> M | nn.Linear:
    """The module with every adapted linear inside replaced by a plain one at ``t_emb``; shared where none
    is."""
    if is_adapted(module):
        return slice_linear(module, t_emb=t_emb)
    folded = {name: fold(child, t_emb) for name, child in module.named_children()}
    changes = {name: new for name, new in folded.items() if new is not module.get_submodule(name)}
    return shallow(module, **changes) if changes else module


def active(
    mask: Bool[Tensor, " units"] | Float[Tensor, " units"], unit_of: Int64[Tensor, " members"]
) -> Int64[Tensor, " active"]:
    """Indices of the heads or channels whose unit is on, ascending."""
    return mask.bool()[unit_of.to(mask.device)].nonzero().squeeze(1)
