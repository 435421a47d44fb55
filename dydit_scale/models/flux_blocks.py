"""FLUX's double and single blocks with gates.

Each block runs in one of two ways: masked (training, mixed timesteps) or packed, cut to the active heads and channels,
with the MLP on the chosen image tokens only. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masking import gated_add, masked_cat, modulate
from dydit_scale.dynamic.masks import SharedUnits
from dydit_scale.dynamic.packing import LinearColumns, channels_of, take_rows
from dydit_scale.dynamic.ranking import head_importance, path_importance, units_by_rank
from dydit_scale.dynamic.slicing import IN, OUT, SlicedLayer
from dydit_scale.models.blocks import (
    BlockGates,
    DynamicBlock,
    adaptive_norm,
    feed_forward,
    head_channels,
    mask_heads,
    ones_or,
)
from dydit_scale.models.flux_packed import PackedFluxBlock, PackedFluxSingleBlock, finite
from dydit_scale.models.parts import AttentionSource, MLPSource, Source, Stream
from dydit_scale.models.slicing import sliced_attention, sliced_block, sliced_feed_forward


class DyFluxAttnProcessor(FluxAttnProcessor):
    """FLUX's attention with a head mask, for any number of heads that the projections hold."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Float[Tensor, "batch image_tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens dim"] | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        head_mask: Float[Tensor, "batch heads"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over text then image tokens; a masked head contributes zero. Returns (image, text), or all tokens
        of a single block before their output projection."""
        query, key, value = (_heads(proj(hidden_states), attn.head_dim) for proj in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        text_tokens = 0
        if encoder_hidden_states is not None:
            text_tokens = encoder_hidden_states.shape[1]
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (_heads(proj(encoder_hidden_states), attn.head_dim) for proj in added)
            query = torch.cat([attn.norm_added_q(text_q), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_k), key], dim=1)
            value = torch.cat([text_v, value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3)
        if head_mask is not None:
            out = mask_heads(out, head_mask)
        out = out.to(query.dtype)
        if encoder_hidden_states is None:
            return out
        # Contiguous as upstream: kernels for bf16 round differently over strides.
        text, image = out[:, :text_tokens].contiguous(), out[:, text_tokens:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class _DyFluxBlock(DynamicBlock):
    """What both kinds of block share."""

    attn: FluxAttention

    def _init_dynamic(self, dim: int, heads: int, channels: int, config: DynamicConfig) -> None:
        super()._init_dynamic(dim, heads, channels, config)
        self.attn.set_processor(DyFluxAttnProcessor())


class DyFluxTransformerBlock(_DyFluxBlock, FluxTransformerBlock):
    """Double block: image and text streams share the heads; skipped image tokens miss their feed-forward."""

    dy_context_channel_unit: Tensor
    ff: Any  # diffusers' FeedForward: net = [activation with its projection, dropout, projection]
    ff_context: Any
    norm1: nn.Module
    norm1_context: nn.Module
    norm2: nn.Module
    norm2_context: nn.Module

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, config: DynamicConfig) -> None:
        FluxTransformerBlock.__init__(self, dim, num_attention_heads, attention_head_dim)
        channels = self.ff.net[2].in_features
        self._init_dynamic(dim, num_attention_heads, channels, config)
        self.register_buffer("dy_context_channel_unit", self.dy_channel_unit.clone())

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image_tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> tuple[Tensor, ...]:
        """(text, image), and the token gates if ``collect``."""
        if gates.shared is not None:
            cut = self.sliced(gates.shared)
            inputs = (hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs, t_emb)
            return DyFluxTransformerBlock.forward(cut, *inputs, gates.inside, collect)
        with self.timestep_state.scope(t_emb):  # type: ignore[union-attr]
            image, gate_msa, shift_mlp, scale_mlp, gate_mlp = adaptive_norm(self.norm1, hidden_states, temb)
            text, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = adaptive_norm(
                self.norm1_context, encoder_hidden_states, temb
            )
            image_out, text_out = self.attn(
                hidden_states=image,
                encoder_hidden_states=text,
                image_rotary_emb=image_rotary_emb,
                head_mask=self._head_mask(gates),
                **(joint_attention_kwargs or {}),
            )
            hidden_states = gated_add(hidden_states, gate_msa, image_out)
            encoder_hidden_states = gated_add(encoder_hidden_states, c_gate_msa, text_out)

            keep = self._route(hidden_states, encoder_hidden_states, temb, gates)
            image = modulate(self.norm2(hidden_states), scale_mlp, shift_mlp)
            text = modulate(self.norm2_context(encoder_hidden_states), c_scale_mlp, c_shift_mlp)
            if gates.kept_only and keep is not None:
                flat = image.flatten(0, 1)
                work = lambda rows: self.ff(take_rows(flat, rows))  # noqa: E731
                hidden_states = self._add_on_kept(hidden_states, work, keep, gate_mlp)
            else:
                image = feed_forward(self.ff, image, gates.groups, self.dy_channel_unit)
                hidden_states = gated_add(hidden_states, gate_mlp, image, keep)
            text = feed_forward(self.ff_context, text, gates.groups, self.dy_context_channel_unit)
            encoder_hidden_states = finite(gated_add(encoder_hidden_states, c_gate_mlp, text))
        return _result(encoder_hidden_states, hidden_states, keep, collect)

    def sliced(self, units: SharedUnits) -> DyFluxTransformerBlock:
        """The block on the units that a whole batch shares, for training."""
        heads, channels = self._members(units)
        context = units.members("groups", "context", self.dy_context_channel_unit)
        ff, ff_context = sliced_feed_forward(self.ff, channels), sliced_feed_forward(self.ff_context, context)
        attn = sliced_attention(self.attn, heads)
        return sliced_block(DyFluxTransformerBlock, self, attn=attn, ff=ff, ff_context=ff_context)

    def pack_sources(self) -> dict[str, Source]:
        """The attention over both streams, and each stream's MLP."""
        attn = self.attn
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out)
        streams = (Stream.of(attn), Stream(*added, attn.norm_added_q, attn.norm_added_k))
        return {
            "attn": AttentionSource(streams, attn.head_dim, self.dy_head_unit, attn.processor),
            "ff": MLPSource.of(self.ff, self.dy_channel_unit),
            "ff_context": MLPSource.of(self.ff_context, self.dy_context_channel_unit, on_chosen=False),
        }

    def assembled(self, parts: dict[str, Any], t_emb: Float[Tensor, "1 dim"]) -> PackedFluxBlock:
        """The packed block of these parts."""
        return PackedFluxBlock(self, **parts, t_emb=t_emb)

    @torch.no_grad()
    def rank_units(self) -> None:
        """Let the most important heads and channels be unit 0."""
        attn, heads = self.attn, self.attn.heads
        paths = [(attn.to_v, attn.to_out[0].weight), (attn.add_v_proj, attn.to_add_out.weight)]
        self.dy_head_unit.copy_(units_by_rank(head_importance(paths, heads), heads))
        for ff, table in ((self.ff, self.dy_channel_unit), (self.ff_context, self.dy_context_channel_unit)):
            importance = path_importance(ff.net[0].proj, ff.net[2].weight)
            table.copy_(units_by_rank(importance, int(table.max()) + 1))


class DyFluxSingleTransformerBlock(_DyFluxBlock, FluxSingleTransformerBlock):
    """Single block: text and image in one sequence, attention beside the MLP.

    A skipped image token misses the MLP (``single_bypass="mlp"``), or everything but its part as key and value, as in
    the released DyFLUX (``"attn_out+mlp"``). The router reads the block's input.
    """

    out_attn: nn.Module  # of a block cut for training (sliced): the two parts of proj_out
    out_mlp: nn.Module
    proj_mlp: nn.Linear
    proj_out: nn.Linear
    act_mlp: nn.Module
    norm: nn.Module
    mlp_hidden_dim: int

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, config: DynamicConfig) -> None:
        FluxSingleTransformerBlock.__init__(self, dim, num_attention_heads, attention_head_dim)
        self._init_dynamic(dim, num_attention_heads, self.mlp_hidden_dim, config)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image_tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens dim"],
        temb: Float[Tensor, "batch dim"],
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> tuple[Tensor, ...]:
        """(text, image), and the token gates if ``collect``."""
        if gates.shared is not None:
            cut = self.sliced(gates.shared)
            inputs = (hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs, t_emb)
            return DyFluxSingleTransformerBlock.forward(cut, *inputs, gates.inside, collect)
        with self.timestep_state.scope(t_emb):  # type: ignore[union-attr]
            keep = self._route(hidden_states, encoder_hidden_states, temb, gates)
            text_tokens = encoder_hidden_states.shape[1]
            stream = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            x, gate = adaptive_norm(self.norm, stream, temb)
            attn = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            # The text is never skipped.
            keep_all = None if keep is None else torch.cat([keep.new_ones(len(keep), text_tokens), keep], dim=1)
            run = self._kept_output if gates.kept_only else self._masked_output
            stream = finite(run(stream, x, attn, gate, keep_all, gates))
        return _result(stream[:, :text_tokens], stream[:, text_tokens:], keep, collect)

    def _masked_output(
        self, stream: Tensor, x: Tensor, attn: Tensor, gate: Tensor, keep: Tensor | None, gates: BlockGates
    ) -> Tensor:
        mlp = self.act_mlp(self.proj_mlp(x))
        heads, of_mlp = self._head_mask(gates), None if self.dynamic.skips_attention else keep
        both = masked_cat(
            attn,
            None if heads is None else head_channels(heads, attn.shape[2]),
            mlp,
            None if gates.groups is None else gates.groups.index_select(1, self.dy_channel_unit),
            of_mlp,
        )
        return gated_add(stream, gate, self.proj_out(both), keep if of_mlp is None else None)

    def _kept_output(
        self, stream: Tensor, x: Tensor, attn: Tensor, gate: Tensor, keep: Tensor | None, gates: BlockGates
    ) -> Tensor:
        """As ``_masked_output``, with what skipped tokens miss computed for the others alone."""
        if keep is None:
            return self._masked_output(stream, x, attn, gate, keep, gates)
        tokens, heads = x.flatten(0, 1), attn.flatten(0, 1)

        def mlp(rows: Tensor) -> Tensor:
            return self.act_mlp(self.proj_mlp(take_rows(tokens, rows)))

        if self.dynamic.skips_attention:
            both = lambda rows: self.proj_out(torch.cat([take_rows(heads, rows), mlp(rows)], dim=1))  # noqa: E731
            return self._add_on_kept(stream, both, keep, gate)
        stream = gated_add(stream, gate, self.out_attn(attn))
        return self._add_on_kept(stream, lambda rows: self.out_mlp(mlp(rows)), keep, gate)

    def sliced(self, units: SharedUnits) -> DyFluxSingleTransformerBlock:
        """The block on the units that a whole batch shares, for training; ``out_attn`` and ``out_mlp`` are the two
        parts of ``proj_out``."""
        heads, channels = self._members(units)
        dim, device = self.attn.inner_dim, self.dy_channel_unit.device
        attn_cols = torch.arange(dim, device=device) if heads is None else channels_of(heads, self.attn.head_dim)
        mlp_cols = dim + (torch.arange(self.mlp_hidden_dim, device=device) if channels is None else channels)
        changes: dict[str, Any] = {
            "attn": sliced_attention(self.attn, heads),
            "proj_mlp": SlicedLayer(self.proj_mlp, channels, OUT),
            "proj_out": SlicedLayer(self.proj_out, torch.cat([attn_cols, mlp_cols]), IN),
            "out_attn": SlicedLayer(self.proj_out, attn_cols, IN),
            "out_mlp": SlicedLayer(self.proj_out, mlp_cols, IN, bias=False),
        }
        return sliced_block(DyFluxSingleTransformerBlock, self, **changes)

    def pack_sources(self) -> dict[str, Source]:
        """The attention and the MLP, each with its columns of the output projection."""
        attn, dim, channels = self.attn, self.attn.inner_dim, self.mlp_hidden_dim
        out_attn = LinearColumns(self.proj_out, 0, dim, bias=True)
        out_mlp = LinearColumns(self.proj_out, dim, channels, bias=False)
        together = self.dynamic.skips_attention  # chosen tokens need both in one sum
        return {
            "attn": AttentionSource(
                (Stream.of(attn, out_attn),),
                attn.head_dim,
                self.dy_head_unit,
                attn.processor,
                queries_apart=together and self.dy_token is not None,
            ),
            "mlp": MLPSource(self.proj_mlp, self.act_mlp, out_mlp, self.dy_channel_unit, on_chosen=not together),
        }

    def assembled(self, parts: dict[str, Any], t_emb: Float[Tensor, "1 dim"]) -> PackedFluxSingleBlock:
        """The packed block of these parts."""
        return PackedFluxSingleBlock(self, **parts, t_emb=t_emb)

    @torch.no_grad()
    def rank_units(self) -> None:
        """Let the most important heads and channels be unit 0."""
        dim, heads = self.attn.inner_dim, self.attn.heads
        out = self.proj_out.weight
        self.dy_head_unit.copy_(units_by_rank(head_importance([(self.attn.to_v, out[:, :dim])], heads), heads))
        importance = path_importance(self.proj_mlp, out[:, dim:])
        self.dy_channel_unit.copy_(units_by_rank(importance, int(self.dy_channel_unit.max()) + 1))


def _heads(x: Float[Tensor, "batch tokens channels"], head_dim: int) -> Float[Tensor, "batch tokens heads head_dim"]:
    return x.unflatten(-1, (-1, head_dim))


def _result(text: Tensor, image: Tensor, keep: Tensor | None, collect: bool) -> tuple[Tensor, ...]:
    return (text, image, ones_or(keep, image)) if collect else (text, image)
