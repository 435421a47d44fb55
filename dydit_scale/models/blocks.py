"""What the blocks of all dynamic models share: gates, units, routing of tokens, and cutting of attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masking import masked
from dydit_scale.dynamic.masks import FrozenGates, GateMode, GateNoise, SharedUnits, WidthMasks
from dydit_scale.dynamic.packing import active, add_on_rows, chosen_rows, shallow, slice_linear
from dydit_scale.dynamic.ranking import units_in_place
from dydit_scale.dynamic.timestep import TimestepState
from dydit_scale.dynamic.tokens import make_token_router, route_tokens


class BlockGates(NamedTuple):
    """The gates of one block in one forward."""

    heads: Float[Tensor, "batch units"] | None = None
    groups: Float[Tensor, "batch units"] | None = None
    token_noise: Float[Tensor, "batch tokens"] | None = None
    open: bool = False
    """No token is skipped."""
    shared: SharedUnits | None = None
    """In place of ``heads`` and ``groups``: what works for the whole batch, on which alone the block runs."""
    kept_only: bool = False
    """Skipped tokens are not computed, instead of masked."""

    @property
    def inside(self) -> BlockGates:
        """The gates of the block cut to ``shared``."""
        return self._replace(shared=None)


def block_gates(
    gates: GateMode, width: WidthMasks, layer: int, order: Callable[[Tensor], Tensor] = lambda tokens: tokens
) -> BlockGates:
    """The gates of one layer; ``order`` brings [batch, tokens] into the block's order."""
    noise = gates.tokens if isinstance(gates, (GateNoise, FrozenGates)) else None
    tokens = None if noise is None else order(noise[layer])
    if isinstance(gates, FrozenGates):
        return BlockGates(token_noise=tokens, shared=gates.network.layers[layer], kept_only=noise is None)
    return BlockGates(*width.layer(layer), tokens, gates == "open")


class DynamicBlock(nn.Module):
    """Mixed into a block of diffusers. ``dy_*_unit`` tables say which routing unit a head or channel belongs to."""

    timestep_state: TimestepState | None = None
    is_packed: bool = False
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

    def depends_on_timestep(self) -> bool:
        """Whether an adapter makes a weight depend on the timestep."""
        return any(hasattr(m, "weight_at") for m in self.modules())

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

    def _active(self, width: WidthMasks) -> tuple[Int64[Tensor, " heads"] | None, Int64[Tensor, " channels"] | None]:
        """The heads and MLP channels that work for one sample; None: all."""
        return (
            None if width.heads is None else active(width.heads, self.dy_head_unit),
            None if width.groups is None else active(width.groups, self.dy_channel_unit),
        )


def cut_attention(attn: Any, heads: Int64[Tensor, " active"] | None, t_emb: Float[Tensor, "1 dim"]) -> Any:
    """The attention with the given heads only (None: all), sharing norms and processor."""
    rows = None if heads is None else channels_of(heads, attn.inner_dim // attn.heads)
    names = ["to_q", "to_k", "to_v"] + (["add_q_proj", "add_k_proj", "add_v_proj"] if attn.added_kv_proj_dim else [])
    changes: dict[str, Any] = {name: slice_linear(getattr(attn, name), rows=rows, t_emb=t_emb) for name in names}
    if not attn.pre_only:
        changes["to_out"] = nn.ModuleList([slice_linear(attn.to_out[0], cols=rows, t_emb=t_emb), attn.to_out[1]])
    if attn.added_kv_proj_dim:
        changes["to_add_out"] = slice_linear(attn.to_add_out, cols=rows, t_emb=t_emb)
    return shallow(attn, heads=attn.heads if heads is None else len(heads), **changes)


def channels_of(heads: Int64[Tensor, " active"], head_dim: int) -> Int64[Tensor, " channels"]:
    """The channels of the given heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def mask_heads(
    out: Float[Tensor, "batch tokens channels"], head_mask: Float[Tensor, "batch_t heads"]
) -> Float[Tensor, "batch tokens channels"]:
    """Attention's output with its heads masked."""
    return masked(out, head_mask.repeat_interleave(out.shape[-1] // head_mask.shape[1], dim=1))


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
    return down(dropout(masked(up(x), groups.index_select(1, unit_of))))


def add_masked(
    stream: Float[Tensor, "batch tokens dim"],
    x: Float[Tensor, "batch tokens dim"],
    keep: Float[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch tokens dim"]:
    """``stream + x``, on kept tokens only; in one pass, and exact where all are kept."""
    return stream + x if keep is None else torch.addcmul(stream, x, keep[..., None].to(x.dtype))


def cut_feed_forward(ff: Any, channels: Int64[Tensor, " active"] | None, t_emb: Float[Tensor, "1 dim"]) -> nn.Module:
    """diffusers' FeedForward with the given hidden channels only (None: all)."""
    up, dropout, down = ff.net
    up = shallow(up, proj=slice_linear(up.proj, rows=channels, t_emb=t_emb))
    return shallow(ff, net=nn.ModuleList([up, dropout, slice_linear(down, cols=channels, t_emb=t_emb)]))
