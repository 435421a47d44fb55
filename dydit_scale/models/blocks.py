"""What the blocks of all dynamic models share: gates, units, and routing of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GELU
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.fused_tokens import fixed_rows
from dydit_scale.dynamic.gates import threshold_gate
from dydit_scale.dynamic.masking import masked, masked_gelu, modulate
from dydit_scale.dynamic.masks import FrozenGates, GateMode, GateNoise, SharedUnits, WidthMasks
from dydit_scale.dynamic.packing import add_on_rows, chosen_rows
from dydit_scale.dynamic.ranking import head_importance, path_importance, units_by_rank, units_in_place
from dydit_scale.dynamic.timestep import TimestepState
from dydit_scale.dynamic.tokens import make_token_router, route_tokens
from dydit_scale.models.parts import AttentionSource, MLPSource, Source, Stream


class BlockGates(NamedTuple):
    """The gates of one block in one forward."""

    heads: Float[Tensor, "batch units"] | None = None
    groups: Float[Tensor, "batch units"] | None = None
    token_noise: Float[Tensor, "batch tokens"] | None = None
    open: bool = False
    """No token is skipped."""
    capacity: int | None = None
    """How many tokens of each sample a packed block works on, those of the highest scores; None: those above the
    threshold."""
    modulation: Float[Tensor, "batch modulation"] | None = None
    """What a packed block's modulation layers return, where it is known before."""
    share_scores: bool = False
    """The two halves of the batch, the branches of guidance, skip the same tokens: those of their mean scores."""
    shared: SharedUnits | None = None
    """In place of ``heads`` and ``groups``: what works for the whole batch, on which alone the block runs."""
    kept_only: bool = False
    """Skipped tokens are not computed, instead of masked."""

    @property
    def inside(self) -> BlockGates:
        """The gates of the block cut to ``shared``."""
        return self._replace(shared=None)


def block_gates(gates: GateMode, width: WidthMasks, layer: int) -> BlockGates:
    """The gates of one layer."""
    noise = gates.tokens if isinstance(gates, (GateNoise, FrozenGates)) else None
    tokens = None if noise is None else noise[layer]
    if isinstance(gates, FrozenGates):
        return BlockGates(token_noise=tokens, shared=gates.network.layers[layer], kept_only=noise is None)
    return BlockGates(*width.layer(layer), tokens, gates == "open")


class DynamicBlock(nn.Module):
    """Mixed into a block of diffusers. ``dy_*_unit`` tables say which routing unit a head or channel belongs to."""

    timestep_state: TimestepState | None = None
    dy_head_unit: Tensor
    dy_channel_unit: Tensor
    dynamic: DynamicConfig

    def _init_dynamic(self, dim: int, heads: int, channels: int, config: DynamicConfig) -> None:
        groups = config.mlp_groups or heads
        if channels % groups:
            raise ValueError(f"dynamic.mlp_groups: {channels} MLP channels cannot be cut into {groups} equal groups")
        self.dynamic = config
        self.register_buffer("dy_head_unit", torch.arange(heads))
        self.register_buffer("dy_channel_unit", units_in_place(channels, groups))
        self.dy_token = make_token_router(config, dim) if config.tokens else None

    def pack_sources(self) -> dict[str, Source]:
        """What packing cuts, by the names that :meth:`assembled` takes; heads are cut from attentions, channels from
        MLPs."""
        raise TypeError(f"{type(self).__name__} must define pack_sources")

    def assembled(self, parts: dict[str, Any], t_emb: Float[Tensor, "1 dim"]) -> nn.Module:
        """The packed block of these parts, which takes the same arguments and returns the same as this one."""
        raise TypeError(f"{type(self).__name__} must define assembled")

    def _route(
        self, image: Tensor, text: Tensor | None, temb: Tensor, gates: BlockGates
    ) -> Float[Tensor, "batch tokens"] | None:
        if self.dy_token is None or gates.open:
            return None
        return route_tokens(self.dy_token, image, temb, text, gates.token_noise, self.dynamic.temperature)

    def _head_mask(self, gates: BlockGates) -> Float[Tensor, "batch heads"] | None:
        return None if gates.heads is None else gates.heads.index_select(1, self.dy_head_unit)

    def _members(self, units: SharedUnits) -> tuple[Int64[Tensor, " heads"] | None, Int64[Tensor, " channels"] | None]:
        """The heads and MLP channels that work for a whole batch; None: all."""
        return (
            units.members("heads", "heads", self.dy_head_unit),
            units.members("groups", "channels", self.dy_channel_unit),
        )

    def _add_on_kept(
        self,
        stream: Float[Tensor, "batch tokens dim"],
        work: Callable[[Int64[Tensor, " rows"]], Float[Tensor, "rows dim"]],
        keep: Float[Tensor, "batch tokens"],
        gate: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """``stream`` with ``gate`` times the work done on the kept tokens alone; ``work`` takes their places among the
        flattened (batch, token) rows."""
        rows, state = chosen_rows(keep), self.timestep_state
        assert state is not None, "a block of a model has its state"
        with state.scope(state.emb, samples=rows // stream.shape[1]):
            done = work(rows)
        return add_on_rows(stream, rows, done, gate)


class OneStreamBlock(DynamicBlock):
    """A block with one self-attention and one MLP."""

    attn1: Any  # diffusers' Attention
    ff: Any  # diffusers' FeedForward: net = [activation with its projection, dropout, projection]

    def pack_sources(self) -> dict[str, Source]:
        """The attention and the MLP."""
        head_dim = self.attn1.inner_dim // self.attn1.heads
        attn1 = AttentionSource((Stream.of(self.attn1),), head_dim, self.dy_head_unit, self.attn1.processor)
        return {"attn1": attn1, "ff": MLPSource.of(self.ff, self.dy_channel_unit)}

    @torch.no_grad()
    def rank_units(self) -> None:
        """Let the most important heads and channels be unit 0."""
        attn, up, down = self.attn1, self.ff.net[0].proj, self.ff.net[2]
        importance = head_importance([(attn.to_v, attn.to_out[0].weight)], attn.heads)
        self.dy_head_unit.copy_(units_by_rank(importance, attn.heads))
        units = int(self.dy_channel_unit.max()) + 1
        self.dy_channel_unit.copy_(units_by_rank(path_importance(up, down.weight), units))


class PackedTokens(NamedTuple):
    """On which tokens a packed block works; None: on all."""

    rows: Int64[Tensor, " rows"] | None
    """Their places among the flattened (batch, token) rows."""
    keep: Float[Tensor, "batch tokens"] | None
    """Their gates."""


class PackedBlock(nn.Module):
    """What packed blocks share: their token router."""

    def __init__(self, block: DynamicBlock) -> None:
        super().__init__()
        self.dy_token = block.dy_token

    @property
    def modulation(self) -> tuple[nn.Module, ...]:
        """The layers [batch, dim] -> [batch, modulation] of the block, if it has any."""
        return ()

    def _modulation(self, temb: Float[Tensor, "batch dim"], gates: BlockGates) -> Float[Tensor, "batch modulation"]:
        if gates.modulation is not None:
            return gates.modulation
        x = F.silu(temb)
        return torch.cat([layer(x) for layer in self.modulation], dim=1)

    def _tokens(
        self, image: Tensor, text: Tensor | None, temb: Tensor, gates: BlockGates, collect: bool
    ) -> PackedTokens:
        if self.dy_token is None:
            return PackedTokens(None, None)
        batch, tokens = image.shape[:2]
        with torch.autocast(image.device.type, enabled=False):
            logits = self.dy_token(image, temb, text)
        if gates.share_scores:
            logits = logits.unflatten(0, (2, -1)).mean(0).repeat(2, 1)
        if gates.capacity is not None:
            k = min(gates.capacity, tokens)
            rows = fixed_rows(logits, k)
            keep = torch.zeros_like(logits).flatten().index_fill_(0, rows, 1.0).view_as(logits) if collect else None
            return PackedTokens(None if k == tokens else rows, keep)
        keep = threshold_gate(logits)
        rows = chosen_rows(keep)
        return PackedTokens(None if len(rows) == batch * tokens else rows, keep)


def check_branches(latents: Shaped[Tensor, "batch *shape"], *, contents: bool) -> None:
    """Raise ValueError unless the halves of the batch are equal in size and, if asked for, in ``contents``, as those of
    the two branches of guidance are; a GPU must be waited for to compare these."""
    first, second = latents.tensor_split(2)
    if first.shape != second.shape or (contents and not torch.equal(first, second)):
        raise ValueError(
            f"share_scores: expected the two branches of guidance as the halves of a batch, with equal latents; got "
            f"{len(latents)} samples{'' if len(latents) % 2 else ', whose halves differ'}. Pipelines that run the "
            "branches one after the other, and samples without guidance, cannot share scores: pack without it"
        )


def ones_or(keep: Tensor | None, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens"]:
    """Token gates as a forward collects them."""
    return torch.ones(x.shape[:2], device=x.device) if keep is None else keep


def mask_heads(
    out: Float[Tensor, "batch tokens channels"], head_mask: Float[Tensor, "batch_t heads"]
) -> Float[Tensor, "batch tokens channels"]:
    """Attention's output with its heads masked."""
    return masked(out, head_channels(head_mask, out.shape[-1]))


def head_channels(head_mask: Float[Tensor, "batch_t heads"], channels: int) -> Float[Tensor, "batch_t channels"]:
    """The mask of each head for every one of its channels."""
    return head_mask.repeat_interleave(channels // head_mask.shape[1], dim=1)


def feed_forward(
    ff: Any,
    x: Float[Tensor, "batch tokens dim"],
    groups: Float[Tensor, "batch_t units"] | None,
    unit_of: Int64[Tensor, " channels"],
) -> Float[Tensor, "batch tokens dim"]:
    """diffusers' FeedForward with its hidden channels masked by group, per sample or (batch_t = 1) for all."""
    # Masked after the activation: GELU(0) = 0, so the value is that of masking before it, and the gate's gradient is
    # the channel's whole contribution.
    if groups is None:
        return ff(x)
    up, dropout, down = ff.net
    channels = groups.index_select(1, unit_of)
    if isinstance(up, GELU):
        return down(dropout(masked_gelu(up.proj(x), up.approximate, channels)))
    return down(dropout(masked(up(x), channels)))


def adaptive_norm(
    norm: Any, x: Float[Tensor, "batch tokens dim"], temb: Float[Tensor, "batch dim"]
) -> tuple[Tensor, ...]:
    """diffusers' AdaLayerNormZero or AdaLayerNormZeroSingle: (normalised and modulated, the other modulations in their
    order)."""
    modulation = norm.linear(norm.silu(temb))
    shift, scale, *others = modulation.chunk(modulation.shape[1] // x.shape[2], dim=1)
    return modulate(norm.norm(x), scale, shift), *others
