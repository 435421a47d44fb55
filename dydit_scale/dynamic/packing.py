"""Slices in place of masks: linear layers cut to their active rows and columns, and work on chosen tokens only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.dynamic.masking import gated_add
from dydit_scale.dynamic.weight_only import dense_weight

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
    """Whether a linear layer computes with more than its ``weight``: TD-LoRA (``weight_at``) or a layer of peft."""
    return hasattr(module, "weight_at") or hasattr(module, "get_base_layer")


def depends_on_timestep(module: nn.Module) -> bool:
    """Whether a layer in the module has a weight that changes with the timestep (TD-LoRA)."""
    return any(hasattr(m, "weight_at") for m in module.modules())


def effective_weight(linear: Any, t_emb: Float[Tensor, "1 dim"] | None) -> Float[Tensor, "out in"]:
    """The weight that the layer computes with, dequantised, its active adapters folded in: those of TD-LoRA at
    ``t_emb``, or, where that is None, without them.

    Raises:
        ValueError: an adapter of peft that is neither LoRA nor DoRA alone.
    """
    if isinstance(linear, LinearColumns):
        return effective_weight(linear.layer, t_emb).narrow(1, linear.start, linear.in_features)
    if hasattr(linear, "weight_at"):
        return linear.base_weight() if t_emb is None else linear.weight_at(t_emb)
    if hasattr(linear, "get_base_layer"):
        return _with_lora(linear)
    return dense_weight(linear)


def effective_bias(linear: Any) -> Float[Tensor, " out"] | None:
    """The bias that the layer computes with, those of its active LoRAs added."""
    bias = getattr(linear, "bias", None)
    if not hasattr(linear, "get_base_layer") or hasattr(linear, "weight_at"):
        return bias
    own = [(name, linear.lora_B[name].bias) for name in _active_loras(linear)]
    added = [linear.scaling[name] * extra for name, extra in own if extra is not None]
    if not added:
        return bias
    assert bias is not None, "peft adds no bias where the layer has none"
    return sum(x.detach().to(bias.dtype) for x in added) + bias.detach()


def _active_loras(layer: Any) -> list[str]:
    """Names of the adapters that a layer of peft computes with; ValueError if they are of a kind that cannot be
    folded."""
    if layer.disable_adapters or layer.merged:
        return []
    if not hasattr(layer, "lora_A"):
        raise ValueError(
            f"{type(layer).__module__.split('.')[-2]}: of peft's adapters only LoRA and DoRA can be cut into packed "
            "sub-networks; merge this one into the weights (fuse_lora, merge_and_unload), or remove it"
        )
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        if name in getattr(layer, "lora_variant", {}) and not layer.use_dora.get(name):
            kind = type(layer.lora_variant[name]).__name__
            raise ValueError(f"adapter {name!r} ({kind}): only plain LoRA and DoRA can be cut; merge or remove it")
    return active


def _with_lora(layer: Any) -> Tensor:
    weight, active = dense_weight(layer.get_base_layer()), _active_loras(layer)
    if not active:
        return weight
    updated = weight + sum(layer.get_delta_weight(name).to(weight.dtype) for name in active)
    if not any(layer.use_dora.get(name) for name in active):
        return updated
    if len(active) > 1:
        raise ValueError(f"a DoRA beside other adapters ({', '.join(active)}) cannot be folded into a slice; keep one")
    magnitude = layer.lora_magnitude_vector[active[0]].weight.to(weight.dtype)
    return (magnitude / updated.norm(dim=1))[:, None] * updated


class LinearColumns(nn.Module):
    """A run of the columns of a linear layer, to be cut as a layer of its own.

    Args:
        bias: whether the layer's bias goes with these columns.
    """

    def __init__(self, layer: Any, start: int, length: int, *, bias: bool) -> None:
        super().__init__()
        self.layer, self.start = layer, start
        self.in_features, self.out_features = length, layer.out_features
        self.bias = effective_bias(layer) if bias else None

    def low_rank_at(self, t_emb: Float[Tensor, "1 dim"]) -> tuple[Tensor, Tensor] | None:
        """As the layer's."""
        pair = self.layer.low_rank_at(t_emb) if hasattr(self.layer, "low_rank_at") else None
        return None if pair is None else (pair[0].narrow(1, self.start, self.in_features), pair[1])


class CutLinear(nn.Linear):
    """Some rows (outputs) and columns (inputs) of a linear layer, or of several that read the same input; frozen.

    The outputs of several layers alternate in runs of ``run`` features: [run of layer 0, run of layer 1, ..., next run
    of layer 0, ...], so that the q, k and v of one head are neighbours. Ascending rows or columns without holes of one
    layer are views of its weight; everything else is a copy.

    Args:
        rows: of each layer; None takes all.
        cols: of each layer; None takes all.
        t_emb: where TD-LoRA's experts are folded in; None leaves them out.
        bias: False leaves the layers' biases out.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        rows: Int64[Tensor, " out_active"] | None = None,
        cols: Int64[Tensor, " in_active"] | None = None,
        run: int = 1,
        t_emb: Float[Tensor, "1 dim"] | None = None,
        bias: bool = True,
    ) -> None:
        weights = [_own(_cut(effective_weight(layer, t_emb).detach(), rows, cols), layer) for layer in layers]
        biases = [effective_bias(layer) if bias else None for layer in layers]
        weight = _alternating(weights, run)
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias=any(b is not None for b in biases))
        self.weight = nn.Parameter(weight, requires_grad=False)
        if any(b is not None for b in biases):
            parts = [w.new_zeros(len(w)) if b is None else _cut(b.detach(), rows, None)
                     for w, b in zip(weights, biases, strict=True)]  # fmt: skip
            self.bias = nn.Parameter(_alternating(parts, run), requires_grad=False)
        self.layers, self.rows, self.cols, self.run = _Unregistered(layers), rows, cols, run

    def narrowed(self, dim: int, start: int, length: int) -> CutLinear:
        """A run of the rows (0) or columns (1), as views.

        Args:
            start, length: in rows or columns of one of the layers.
        """
        times = len(self.layers) if dim == 0 else 1
        weight = self.weight.narrow(dim, times * start, times * length)
        changes: dict[str, Any] = {"weight": nn.Parameter(weight, requires_grad=False)}
        if dim == 0 and self.bias is not None:
            changes["bias"] = nn.Parameter(self.bias.narrow(0, times * start, times * length), requires_grad=False)
        whole = (self.out_features // len(self.layers), self.in_features)[dim]
        index = (self.rows, self.cols)[dim]
        index = torch.arange(whole, device=weight.device) if index is None else index
        changes[("rows", "cols")[dim]] = index.narrow(0, start, length)
        changes[("out_features", "in_features")[dim]] = times * length
        return shallow(self, **changes)

    def low_rank_at(self, t_emb: Float[Tensor, "1 dim"]) -> tuple[Tensor, Tensor] | None:
        """(down [rank, in_active], up [out_active, rank]): what the experts of TD-LoRA add at a timestep, where they
        were left out. None where no layer has any."""
        layers: tuple[Any, ...] = self.layers
        found = [layer.low_rank_at(t_emb) if hasattr(layer, "low_rank_at") else None for layer in layers]
        if all(pair is None for pair in found):
            return None
        downs, ups = [], []
        for i, pair in enumerate(found):
            if pair is None:
                continue
            down, up = _cut(pair[0], None, self.cols), _cut(pair[1], self.rows, None)
            alone = [up if j == i else torch.zeros_like(up) for j in range(len(found))]
            downs.append(down)
            ups.append(_alternating(alone, self.run))
        return torch.cat(downs).to(self.weight.dtype), torch.cat(ups, dim=1).to(self.weight.dtype)


class _Unregistered(tuple[nn.Module, ...]):
    """Modules that another one refers to without owning their parameters."""


class LowRankLinear(nn.Module):
    """A cut layer and what TD-LoRA's experts add to it at one timestep: two thin products beside the shared slice."""

    def __init__(self, base: nn.Module, down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down.detach())
        self.register_buffer("up", up.detach())
        self.down: Tensor
        self.up: Tensor

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """The sum of both."""
        return self.base(x).add_(F.linear(F.linear(x, self.down), self.up))


def _own(cut: Tensor, layer: nn.Module) -> Tensor:
    """The cut without the rest of a tensor that was made for it (an adapter folded in), which a view would keep."""
    is_the_layers = cut.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in layer.parameters()}
    return cut if is_the_layers or cut.untyped_storage().nbytes() == cut.nbytes else cut.clone()


def _cut(x: Tensor, rows: Int64[Tensor, " n"] | None, cols: Int64[Tensor, " m"] | None) -> Tensor:
    x = x if rows is None else _take(x, rows, 0)
    return x if cols is None else _take(x, cols, 1)


def _take(x: Tensor, index: Int64[Tensor, " n"], dim: int) -> Tensor:
    n, first = len(index), int(index[0]) if len(index) else 0
    if n and bool((index == torch.arange(first, first + n, device=index.device)).all()):
        return x.narrow(dim, first, n)
    return x.index_select(dim, index.to(x.device))


def _alternating(parts: list[Tensor], run: int) -> Tensor:
    """The rows of equally long parts, a run of each in turn."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (-1, run)) for part in parts], dim=1).flatten(0, 2)


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
    gate; for training."""
    update = done.new_zeros(x.flatten(0, 1).shape).index_copy(0, rows, done)
    return gated_add(x, gate, update.view_as(x))


def take_rows(x: Float[Tensor, "all_rows dim"], rows: Int64[Tensor, " rows"]) -> Float[Tensor, "rows dim"]:
    """``x[rows]`` of distinct rows, whose gradients are therefore copied to their places and not summed."""
    return _TakeRows.apply(x, rows)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


PIECE, REST = 64, 4
"""Rows go in one piece of a multiple of 64, and the rest in another, filled up to a multiple of 4."""


class Piece(NamedTuple):
    """Some of the chosen rows, that work is done on at a time; for inference."""

    rows: Int64[Tensor, " some"]
    samples: Int64[Tensor, " some"]
    """Which sample each belongs to."""
    length: int
    """How many they are; what follows them are repetitions, whose result is not used."""

    def taken(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "some dim"]:
        """These rows of the flattened tokens."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def of(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "some_or_1 dim"]:
        """Each row's sample's value; one row where there is one sample."""
        return x if len(x) == 1 else x.index_select(0, self.samples)

    def add_(
        self, x: Float[Tensor, "batch tokens dim"], done: Float[Tensor, "some dim"], gate: Float[Tensor, "batch dim"]
    ) -> None:
        """Add ``gate`` times what was ``done`` on these rows to ``x``, which is contiguous."""
        update = (done * self.of(gate))[: self.length]
        x.view(-1, x.shape[-1]).index_add_(0, self.rows[: self.length], update)


def pieces(rows: Int64[Tensor, " rows"], tokens: int, *, in_few_sizes: bool) -> list[Piece]:
    """The rows of samples of so many tokens, in one piece or in two of few different sizes.

    The latter is for weights in the layout of oneDNN, which generates code for each new number of rows: that takes
    about a millisecond, as long as 60 rows of a product with 768 x 1920 weights, and no two pictures keep equally many
    tokens. Without a layout of their own weights are read, or cast, anew for each piece.
    """
    samples, count = rows // tokens, len(rows)
    if not in_few_sizes:
        return [Piece(rows, samples, count)]
    whole = count // PIECE * PIECE
    rest = count - whole
    found = [Piece(rows[:whole], samples[:whole], whole)] if whole else []
    if rest:
        repeated = torch.arange(whole, count + -rest % REST).clamp(max=count - 1)
        found.append(Piece(rows[repeated], samples[repeated], rest))
    return found


def fold(module: M, t_emb: Float[Tensor, "1 dim"] | None) -> M | nn.Linear:
    """The module with every adapted linear inside replaced by a plain one at ``t_emb``; shared where none
    is."""
    if is_adapted(module):
        return CutLinear([module], t_emb=t_emb)
    folded = {name: fold(child, t_emb) for name, child in module.named_children()}
    changes = {name: new for name, new in folded.items() if new is not module.get_submodule(name)}
    return shallow(module, **changes) if changes else module


def members_of(units: Int64[Tensor, " active"], unit_of: Int64[Tensor, " members"]) -> Int64[Tensor, " members_active"]:
    """The heads or channels of the given units of equal size, unit by unit in the order given, ascending within."""
    by_unit = unit_of.argsort(stable=True).unflatten(0, (int(unit_of.max()) + 1, -1))
    return by_unit[units.to(unit_of.device)].flatten()


def fold_lasting(module: M, skipped: set[int]) -> M:
    """The module with the LoRAs inside, but for those of the layers with the ``skipped`` ids, in plain layers: they are
    the same at all timesteps. TD-LoRA stays."""
    if id(module) in skipped or hasattr(module, "weight_at"):
        return module
    if is_adapted(module):
        return CutLinear([module])  # type: ignore[return-value]
    folded = {name: fold_lasting(child, skipped) for name, child in module.named_children()}
    changes = {name: new for name, new in folded.items() if new is not module.get_submodule(name)}
    return shallow(module, **changes) if changes else module


def channels_of(heads: Int64[Tensor, " active"], head_dim: int) -> Int64[Tensor, " channels"]:
    """The channels of the given heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()
