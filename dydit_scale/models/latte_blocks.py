"""Latte's spatial and temporal blocks with gates.

Each runs in one of two ways: masked (training, mixed timesteps) or packed, cut to the active heads and channels, with
the MLP on the chosen tokens only. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masking import gated_add, modulate
from dydit_scale.dynamic.masks import SharedUnits
from dydit_scale.dynamic.packing import fold, take_rows
from dydit_scale.models.blocks import (
    BlockGates,
    OneStreamBlock,
    PackedBlock,
    feed_forward,
    mask_heads,
    ones_or,
)
from dydit_scale.models.parts import (
    AttentionPart,
    MLPPart,
    gated_sum,
    mlp_on_tokens_,
    modulated,
)
from dydit_scale.models.slicing import sliced_attention, sliced_block, sliced_feed_forward


class DyLatteAttnProcessor:
    """Attention with a head mask, for any number of heads that the projections hold, on a backend that
    ``set_attention_backend`` chooses (the stock processor ignores it)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "rows tokens dim"],
        encoder_hidden_states: Float[Tensor, "rows text text_dim"] | None = None,
        attention_mask: Float[Tensor, "rows 1 1 text"] | Bool[Tensor, "rows 1 1 text"] | None = None,
        head_mask: Float[Tensor, "batch heads"] | None = None,
    ) -> Float[Tensor, "rows tokens dim"]:
        """Self-attention, or attention to the text; a masked head contributes zero. A sample's rows are neighbours."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # rows tokens heads head_dim
        out = out.flatten(2, 3)
        if head_mask is not None:
            out = mask_heads(out.reshape(len(head_mask), -1, out.shape[-1]), head_mask).view_as(out)
        return attn.to_out[1](attn.to_out[0](out.to(query.dtype)))


class DyLatteTransformerBlock(OneStreamBlock, BasicTransformerBlock):
    """A spatial block (rows are frames, tokens their patches) or a temporal one (rows are places, tokens the frames).

    The heads of self-attention and the groups of the MLP follow the timestep; a skipped token misses the MLP. The
    cross-attention to the text, in spatial blocks only, always runs whole: its heads have no counterpart among those
    of self-attention, each token needs the text, and it is 9 % of Latte-1's MACs (512 x 512, 16 frames).
    """

    attn1: Attention
    attn2: Attention | None
    ff: Any  # diffusers' FeedForward: net = [activation with its projection, dropout, projection]
    norm1: nn.Module
    norm2: nn.Module
    scale_shift_table: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        cross_attention_dim: int | None,
        dropout: float,
        activation_fn: str,
        attention_bias: bool,
        norm_elementwise_affine: bool,
        norm_eps: float,
        config: DynamicConfig,
    ) -> None:
        BasicTransformerBlock.__init__(
            self,
            dim,
            num_attention_heads,
            attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            dropout=dropout,
            activation_fn=activation_fn,
            attention_bias=attention_bias,
            norm_type="ada_norm_single",
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        for attn in (self.attn1, self.attn2):
            if attn is not None:
                attn.set_processor(DyLatteAttnProcessor())
        self._init_dynamic(dim, num_attention_heads, self.ff.net[2].in_features, config)

    def forward(
        self,
        hidden_states: Float[Tensor, "rows tokens dim"],
        encoder_hidden_states: Float[Tensor, "rows text text_dim"] | None,
        encoder_attention_mask: Float[Tensor, "rows 1 1 text"] | Bool[Tensor, "rows 1 1 text"] | None,
        timestep: Float[Tensor, "batch dim6"],
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> Float[Tensor, "rows tokens dim"] | tuple[Tensor, Tensor]:
        """The tokens, and with ``collect`` their gates [batch, rows of a sample * tokens].

        Args:
            timestep: the output of ``adaln_single`` for each sample, not repeated over its rows as upstream.
        """
        if gates.shared is not None:
            cut = self.sliced(gates.shared)
            inputs = (hidden_states, encoder_hidden_states, encoder_attention_mask, timestep, t_emb)
            return DyLatteTransformerBlock.forward(cut, *inputs, gates.inside, collect)
        with self.timestep_state.scope(t_emb):  # type: ignore[union-attr]
            modulation = self.scale_shift_table[None] + timestep.unflatten(1, (6, -1))
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # batch 1 dim
            rows, batch = hidden_states.shape, len(timestep)
            x = hidden_states.reshape(batch, -1, rows[-1])  # all but attention acts on each token alone

            attended = modulate(self.norm1(x), scale_msa[:, 0], shift_msa[:, 0])
            attended = self.attn1(attended.view(rows), head_mask=self._head_mask(gates)).view_as(x)
            x = gated_add(x, gate_msa[:, 0], attended)
            if self.attn2 is not None:
                text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
                x = self.attn2(x.view(rows), **text).view_as(x) + x

            keep = self._route(x, None, timestep, gates)
            hidden = modulate(self.norm2(x), scale_mlp[:, 0], shift_mlp[:, 0])
            if gates.kept_only and keep is not None:
                flat = hidden.flatten(0, 1)
                x = self._add_on_kept(x, lambda rows: self.ff(take_rows(flat, rows)), keep, gate_mlp[:, 0])
            else:
                out = feed_forward(self.ff, hidden, gates.groups, self.dy_channel_unit)
                x = gated_add(x, gate_mlp[:, 0], out, keep)
        return (x.view(rows), ones_or(keep, x)) if collect else x.view(rows)

    def sliced(self, units: SharedUnits) -> DyLatteTransformerBlock:
        """The block on the units that a whole batch shares, for training."""
        heads, channels = self._members(units)
        attn1, ff = sliced_attention(self.attn1, heads), sliced_feed_forward(self.ff, channels)
        return sliced_block(DyLatteTransformerBlock, self, attn1=attn1, ff=ff)

    def assembled(self, parts: dict[str, Any], t_emb: Float[Tensor, "1 dim"]) -> PackedLatteBlock:
        """The packed block of these parts."""
        return PackedLatteBlock(self, **parts, t_emb=t_emb)


class PackedLatteBlock(PackedBlock):
    """Latte's block with some of its heads and channels, the MLP on the chosen tokens only; for inference."""

    def __init__(
        self, block: DyLatteTransformerBlock, attn1: AttentionPart, ff: MLPPart, t_emb: Float[Tensor, "1 dim"]
    ) -> None:
        super().__init__(block)
        self.norm1, self.norm2, self.scale_shift_table = block.norm1, block.norm2, block.scale_shift_table
        self.attn1, self.attn2, self.ff = attn1, None if block.attn2 is None else fold(block.attn2, t_emb), ff

    def forward(
        self,
        hidden_states: Float[Tensor, "rows tokens dim"],
        encoder_hidden_states: Float[Tensor, "rows text text_dim"] | None,
        encoder_attention_mask: Float[Tensor, "rows 1 1 text"] | Bool[Tensor, "rows 1 1 text"] | None,
        timestep: Float[Tensor, "batch dim6"],
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> Float[Tensor, "rows tokens dim"] | tuple[Tensor, Tensor]:
        """As :class:`DyLatteTransformerBlock`'s."""
        modulation = (self.scale_shift_table[None] + timestep.unflatten(1, (6, -1))).unbind(1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation  # [batch, dim]
        rows, batch = hidden_states.shape, len(timestep)
        x = hidden_states.reshape(batch, -1, rows[-1])
        attended = modulated(self.norm1, x, shift_msa, scale_msa).view(rows)
        out = self.attn1.project_out(self.attn1.attend(*self.attn1.project(attended)))
        x = gated_sum(x, gate_msa, out.view_as(x))
        if self.attn2 is not None:
            text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            x = self.attn2(x.view(rows), **text).view_as(x) + x
        tokens = self._tokens(x, None, timestep, gates, collect)
        x = mlp_on_tokens_(x, tokens.rows, self.ff, self.norm2, shift_mlp, scale_mlp, gate_mlp)
        return (x.view(rows), ones_or(tokens.keep, x)) if collect else x.view(rows)
