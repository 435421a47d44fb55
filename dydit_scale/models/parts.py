"""What packing cuts out of a block: an attention with some of its heads, an MLP with some of its channels.

A source says which layers a part is cut from; a part is what runs. Parts are made once for all steps whose masks agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.activations import GELU, LinearActivation
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.dynamic.fused_tokens import mlp_on_rows, why_plain
from dydit_scale.dynamic.kernel_layout import KernelLinear, without_weight
from dydit_scale.dynamic.packing import (
    CutLinear,
    LowRankLinear,
    Piece,
    channels_of,
    members_of,
    pieces,
    shallow,
)
from dydit_scale.dynamic.weight_only import Kind, WeightOnlyLinear, compress

P = TypeVar("P", bound=nn.Module)


class Stream(NamedTuple):
    """One stream of tokens through an attention: its projections, and the norms of queries and keys."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module | None
    norm_query: nn.Module | None = None
    norm_key: nn.Module | None = None

    @classmethod
    def of(cls, attn: Any, out: nn.Module | None = None) -> Stream:
        """That of a diffusers attention; ``out`` where its output projection lies elsewhere."""
        out = attn.to_out[0] if out is None else out
        return cls(attn.to_q, attn.to_k, attn.to_v, out, attn.norm_q, attn.norm_k)


@dataclass(frozen=True, eq=False)
class AttentionSource:
    """An attention whose heads are cut; its units are those of ``unit_of`` [heads]."""

    streams: tuple[Stream, ...]
    head_dim: int
    unit_of: Int64[Tensor, " heads"]
    processor: Any
    """Tells the backend, and follows ``set_attention_backend``."""
    queries_apart: bool = False
    """Whether the queries are a product of their own, because not all tokens ask for attention."""

    def part(
        self, units: Int64[Tensor, " active"] | None, *, fused: bool, t_emb: Float[Tensor, "1 dim"] | None
    ) -> AttentionPart:
        """The attention with these units' heads (None: all) in their order.

        Args:
            fused: q, k and v in one matrix, which is a copy; k and v alone where the queries are apart.
        """
        heads = None if units is None else members_of(units, self.unit_of)
        rows = None if heads is None else channels_of(heads, self.head_dim)
        products = (1, 1, 1) if not fused else (1, 2) if self.queries_apart else (3,)
        streams = [_CutStream(stream, rows, self.head_dim, products, t_emb) for stream in self.streams]
        size = len(self.unit_of) // (int(self.unit_of.max()) + 1)
        return AttentionPart(streams, self.head_dim, size, self.processor)

    @property
    def layers(self) -> list[nn.Module]:
        """What is cut."""
        return [m for s in self.streams for m in (s.query, s.key, s.value, s.out) if m is not None]

    def unit_bytes(self, itemsize: int) -> int:
        """Memory of one unit's weights of so many bytes each."""
        return itemsize * _weights(self.layers, len(self.unit_of) * self.head_dim) // (int(self.unit_of.max()) + 1)


class _CutStream(nn.Module):
    def __init__(
        self,
        stream: Stream,
        rows: Int64[Tensor, " channels"] | None,
        head_dim: int,
        products: tuple[int, ...],
        t_emb: Float[Tensor, "1 dim"] | None,
    ) -> None:
        super().__init__()
        inputs = iter((stream.query, stream.key, stream.value))
        self.products = products  # how many of q, k and v each gives
        groups = [list(islice(inputs, count)) for count in products]
        self.qkv = nn.ModuleList(CutLinear(g, rows=rows, run=head_dim, t_emb=t_emb) for g in groups)
        self.out = None if stream.out is None else CutLinear([stream.out], cols=rows, t_emb=t_emb)
        self.norm_query, self.norm_key = stream.norm_query, stream.norm_key

    def narrowed(self, start: int, length: int) -> _CutStream:
        qkv = nn.ModuleList(linear.narrowed(0, start, length) for linear in self.qkv)  # type: ignore[operator]
        out = None if self.out is None else self.out.narrowed(1, start, length)
        return shallow(self, qkv=qkv, out=out)


class AttentionPart(nn.Module):
    """Attention over some heads."""

    def __init__(self, streams: list[_CutStream], head_dim: int, unit_heads: int, processor: Any) -> None:
        super().__init__()
        self.streams = nn.ModuleList(streams)
        self.head_dim, self.unit_heads, self.processor = head_dim, unit_heads, processor

    def project(
        self, x: Float[Tensor, "*rows dim"], stream: int = 0
    ) -> tuple[Float[Tensor, "*rows heads head_dim"], ...]:
        """Queries, keys and values of one stream's tokens."""
        cut: Any = self.streams[stream]
        query, key, value = self._products(x, cut, slice(None))
        query = query if cut.norm_query is None else cut.norm_query(query)
        return query, key if cut.norm_key is None else cut.norm_key(key), value

    def queries(self, x: Float[Tensor, "*rows dim"], stream: int = 0) -> Float[Tensor, "*rows heads head_dim"]:
        """The queries alone, where they are a product of their own (``queries_apart``)."""
        cut: Any = self.streams[stream]
        (query,) = self._products(x, cut, slice(1))
        return query if cut.norm_query is None else cut.norm_query(query)

    def keys_and_values(
        self, x: Float[Tensor, "*rows dim"], stream: int = 0
    ) -> tuple[Float[Tensor, "*rows heads head_dim"], Float[Tensor, "*rows heads head_dim"]]:
        """The keys and values alone, where the queries are a product of their own (``queries_apart``)."""
        cut: Any = self.streams[stream]
        key, value = self._products(x, cut, slice(1, None))
        return key if cut.norm_key is None else cut.norm_key(key), value

    def _products(self, x: Tensor, cut: Any, which: slice) -> list[Tensor]:
        """What these of the products give, apart."""
        found: list[Tensor] = []
        for product, n in zip(list(cut.qkv)[which], cut.products[which], strict=True):
            found.extend(product(x).unflatten(-1, (-1, n, self.head_dim)).unbind(-2))
        return found

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Float[Tensor, "rows tokens channels"]:
        """[rows, tokens, heads, head_dim] each -> the heads side by side, before their output projection."""
        out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self.processor._attention_backend)
        return out.flatten(2, 3).to(query.dtype)

    def project_out(self, x: Float[Tensor, "*rows channels"], stream: int = 0) -> Float[Tensor, "*rows dim"]:
        """The output projection of one stream."""
        return self.streams[stream].out(x)  # type: ignore[operator]

    def narrowed(self, start: int, stop: int) -> AttentionPart:
        """A run of its units, as views."""
        scale = self.unit_heads * self.head_dim
        streams = [s.narrowed(start * scale, (stop - start) * scale) for s in self.streams]  # type: ignore[operator]
        return shallow(self, streams=nn.ModuleList(streams))

    def in_kernel_layout(self) -> AttentionPart:
        """The same with its weights laid out for the CPU."""
        return self._with_layers(KernelLinear)

    def compressed(self, kind: Kind) -> AttentionPart:
        """The same with 8-bit weights."""
        return self._with_layers(lambda linear: CompressedLinear(linear, kind))

    def _with_layers(self, make: Callable[[CutLinear], nn.Module]) -> AttentionPart:
        def made(stream: Any) -> Any:
            out = None if stream.out is None else make(stream.out)
            return shallow(stream, qkv=nn.ModuleList(make(linear) for linear in stream.qkv), out=out)

        return shallow(self, streams=nn.ModuleList(made(stream) for stream in self.streams))


@dataclass(frozen=True, eq=False)
class MLPSource:
    """An MLP whose channels are cut; its units are those of ``unit_of`` [channels]."""

    up: nn.Module
    activation: nn.Module
    down: nn.Module
    unit_of: Int64[Tensor, " channels"]
    on_chosen: bool = True
    """Whether it is a work on chosen tokens alone, all of it; not so the MLP of FLUX's text."""

    @classmethod
    def of(cls, ff: Any, unit_of: Int64[Tensor, " channels"], *, on_chosen: bool = True) -> MLPSource:
        """diffusers' FeedForward. Raises ValueError for an activation with a gating projection."""
        up, _, down = ff.net
        if isinstance(up, GELU):
            return cls(up.proj, nn.GELU(approximate=up.approximate), down, unit_of, on_chosen)
        if isinstance(up, LinearActivation):
            return cls(up.proj, up.activation, down, unit_of, on_chosen)
        raise ValueError(f"pack: expected a GELU or SiLU behind one projection; got {type(up).__name__}")

    def part(
        self, units: Int64[Tensor, " active"] | None, *, fused: bool, t_emb: Float[Tensor, "1 dim"] | None
    ) -> MLPPart:
        """The MLP with these units' channels (None: all) in their order; there is nothing to fuse."""
        channels = None if units is None else members_of(units, self.unit_of)
        up = CutLinear([self.up], rows=channels, t_emb=t_emb)
        down = CutLinear([self.down], cols=channels, t_emb=t_emb)
        return MLPPart(up, self.activation, down, len(self.unit_of) // (int(self.unit_of.max()) + 1))

    @property
    def layers(self) -> list[nn.Module]:
        """What is cut."""
        return [self.up, self.down]

    def unit_bytes(self, itemsize: int) -> int:
        """Memory of one unit's weights of so many bytes each."""
        return itemsize * _weights(self.layers, len(self.unit_of)) // (int(self.unit_of.max()) + 1)


class MLPPart(nn.Module):
    """An MLP with some of its channels."""

    fused = False
    """Whether this is an MLP of chosen tokens that was asked to run in Triton kernels (``fused_tokens``)."""

    def __init__(self, up: nn.Module, activation: nn.Module, down: nn.Module, unit_channels: int) -> None:
        super().__init__()
        self.up, self.activation, self.down, self.unit_channels = up, activation, down, unit_channels

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Each token alone."""
        hidden = self.up(x)
        if getattr(self.up, "gelu", None) is None:
            hidden = self.activation(hidden)
        return self.down(hidden)

    def narrowed(self, start: int, stop: int) -> MLPPart:
        """A run of its units, as views."""
        first, length = start * self.unit_channels, (stop - start) * self.unit_channels
        return shallow(self, up=self.up.narrowed(0, first, length), down=self.down.narrowed(1, first, length))  # type: ignore[operator]

    def in_kernel_layout(self) -> MLPPart:
        """The same with its weights laid out for the CPU, a GELU inside the kernel of the first."""
        gelu = self.activation.approximate if isinstance(self.activation, nn.GELU) else None
        return shallow(self, up=KernelLinear(self.up, gelu), down=KernelLinear(self.down))  # type: ignore[arg-type]

    def compressed(self, kind: Kind) -> MLPPart:
        """The same with 8-bit weights."""
        return shallow(self, up=CompressedLinear(self.up, kind), down=CompressedLinear(self.down, kind))  # type: ignore[arg-type]

    def add_on_rows(
        self,
        x: Float[Tensor, "batch tokens dim"],
        rows: Int64[Tensor, " rows"],
        gate: Float[Tensor, "batch dim"],
        residual: Float[Tensor, "batch tokens dim"],
        **modulation: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """``residual``, which may be written over, with the gated MLP of the chosen rows of ``x`` added, in two fused
        kernels; ``modulation`` is a ``shift`` and a ``scale`` of the normalised ``x``."""
        up, down = self.up, self.down
        assert isinstance(self.activation, nn.GELU), "fuses says so"
        return mlp_on_rows(
            x, rows, up.weight, up.bias, down.weight, down.bias, gate,  # type: ignore[arg-type]
            activation="gelu-approximate" if self.activation.approximate == "tanh" else "gelu", residual=residual,
            up_scale=getattr(up, "scale", None), down_scale=getattr(down, "scale", None), **modulation,
        )  # fmt: skip

    @property
    def fuses(self) -> bool:
        """Whether ``add_on_rows`` can be asked: a GELU between two layers whose weights a kernel can read."""
        return self.fused and self._unreadable() is None

    @property
    def is_laid_out(self) -> bool:
        """Whether the weights are in the layout of the CPU's kernels."""
        return any(isinstance(getattr(layer, "base", layer), KernelLinear) for layer in (self.up, self.down))

    def _unreadable(self) -> str | None:
        """Why the kernels cannot compute what this does; None where they can."""
        layers = (self.up, self.down)
        if not isinstance(self.activation, nn.GELU):
            return f"they compute a GELU, and the MLP has a {type(self.activation).__name__}"
        if any(isinstance(layer, LowRankLinear) for layer in layers):
            return "TD-LoRA's experts stay beside the slices; a larger max_bytes folds them in"
        if any(isinstance(layer, KernelLinear) for layer in layers):
            return "weights are in the layout of the CPU's kernels"
        return None

    def why_unfused(self, x: Tensor) -> str | None:
        """Why tokens such as ``x`` do not pass through the fused kernels; None where they do."""
        return why_plain(x) or self._unreadable() or why_plain(x, self.up.weight, self.down.weight)  # type: ignore[arg-type]


class CompressedLinear(WeightOnlyLinear):
    """A cut layer with 8-bit weights."""

    def __init__(self, linear: CutLinear, kind: Kind) -> None:
        made = compress(linear, kind)
        super().__init__(made.weight, made.scale, made.bias)
        self.source = (without_weight(linear),)

    def low_rank_at(self, t_emb: Float[Tensor, "1 dim"]) -> tuple[Tensor, Tensor] | None:
        """As the slice's."""
        return self.source[0].low_rank_at(t_emb)


Source = AttentionSource | MLPSource
Part = AttentionPart | MLPPart


def with_experts(module: P, t_emb: Float[Tensor, "1 dim"]) -> P:
    """A part with what TD-LoRA's experts add at a timestep beside its slices; the part itself where they add
    nothing."""
    if isinstance(module, (CutLinear, KernelLinear, CompressedLinear)):
        pair = module.low_rank_at(t_emb)
        if pair is None:
            return module
        has_gelu = isinstance(module, KernelLinear) and module.gelu is not None
        base = shallow(module, gelu=None) if has_gelu else module  # the update belongs before the activation
        return LowRankLinear(base, *pair)  # type: ignore[return-value]
    changed = {name: with_experts(child, t_emb) for name, child in module.named_children()}
    changes = {name: new for name, new in changed.items() if new is not module.get_submodule(name)}
    return shallow(module, **changes) if changes else module


def modulated(
    norm: nn.Module,
    x: Float[Tensor, "*rows dim"],
    shift: Float[Tensor, "batch dim"],
    scale: Float[Tensor, "batch dim"],
    piece: Piece | None = None,
) -> Float[Tensor, "*rows dim"]:
    """``norm(x) * (1 + scale) + shift``, in one pass where a single shift and scale serve all rows.

    Args:
        x: [batch, tokens, dim], or the rows of a ``piece`` of it.
    """
    if len(scale) == 1 and type(norm) is nn.LayerNorm and norm.weight is None:
        return F.layer_norm(x, norm.normalized_shape, (1 + scale)[0], shift[0], norm.eps)
    factor = 1 + scale
    if piece is None:
        return torch.addcmul(shift[:, None], norm(x), factor[:, None])
    return torch.addcmul(piece.of(shift), norm(x), piece.of(factor))


def gated_sum(
    x: Float[Tensor, "batch tokens dim"], gate: Float[Tensor, "batch dim"], update: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch tokens dim"]:
    """``x + gate * update``, a new contiguous tensor."""
    return torch.addcmul(x.contiguous(), gate[:, None], update)


def mlp_on_tokens_(
    x: Float[Tensor, "batch tokens dim"],
    rows: Int64[Tensor, " rows"] | None,
    mlp: MLPPart,
    norm: nn.Module,
    shift: Float[Tensor, "batch dim"],
    scale: Float[Tensor, "batch dim"],
    gate: Float[Tensor, "batch dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """``x``, which may be written over, with its modulated and gated MLP added on the chosen rows of the flattened
    tokens (None: on all). Tokens that skip it are not normalised either, but before the fused kernels, which read
    all."""
    if rows is None:
        return x.addcmul_(gate[:, None], mlp(modulated(norm, x, shift, scale)))
    if mlp.fuses:
        return mlp.add_on_rows(norm(x), rows, gate, x, shift=shift, scale=scale)
    for piece in pieces(rows, x.shape[1], in_few_sizes=mlp.is_laid_out):
        piece.add_(x, mlp(modulated(norm, piece.taken(x), shift, scale, piece)), gate)
    return x


def _weights(layers: list[nn.Module], members: int) -> int:
    """How many weights layers have that all have ``members`` rows or columns."""
    sizes: list[Any] = layers
    return sum(members * (layer.in_features + layer.out_features - members) for layer in sizes)
