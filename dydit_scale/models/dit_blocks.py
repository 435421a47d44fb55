"""DiT's block with gates: masked (training, mixed timesteps) or packed, cut to the active heads and channels, with the
MLP on the chosen tokens only. The numbers are the same."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masking import gated_add, modulate
from dydit_scale.dynamic.masks import SharedUnits
from dydit_scale.dynamic.packing import fold, take_rows
from dydit_scale.models.blocks import (
    BlockGates,
    OneStreamBlock,
    PackedBlock,
    adaptive_norm,
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


class DyDiTAttnProcessor:
    """Self-attention with a head mask, for any number of heads that the projections hold.

    Unlike diffusers' AttnProcessor2_0 it follows ``set_attention_backend``.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        head_mask: Float[Tensor, "batch_t heads"] | None = None,
        frames: int = 1,
        temporal: bool = False,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attention after its output projection; a masked head contributes zero.

        Args:
            frames: the tokens are those of so many frames in turn, and attend within their own frame.
            temporal: or, instead, within their own place of all frames.
        """
        alone = "(b p) f h d" if temporal else "(b f) p h d"
        query, key, value = (
            rearrange(proj(hidden_states), f"b (f p) (h d) -> {alone}", f=frames, h=attn.heads)
            for proj in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = rearrange(out, f"{alone} -> b (f p) (h d)", b=len(hidden_states), f=frames)
        if head_mask is not None:
            out = mask_heads(out, head_mask)
        return attn.to_out[1](attn.to_out[0](out.to(query.dtype)))


class DyDiTTransformerBlock(OneStreamBlock, BasicTransformerBlock):
    """Attention over all tokens, then the MLP, which skipped tokens miss (DyDiT section 3).

    Unlike the static block it gets the sum of timestep and class embedding from the model, so it has no embedder.
    """

    attn1: Attention
    ff: Any  # diffusers' FeedForward: net = [activation with its projection, dropout, projection]
    norm1: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        dropout: float,
        activation_fn: str,
        attention_bias: bool,
        upcast_attention: bool,
        norm_elementwise_affine: bool,
        norm_eps: float,
        config: DynamicConfig,
    ) -> None:
        BasicTransformerBlock.__init__(
            self,
            dim,
            num_attention_heads,
            attention_head_dim,
            dropout=dropout,
            activation_fn=activation_fn,
            attention_bias=attention_bias,
            upcast_attention=upcast_attention,
            norm_type="layer_norm",
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        self.norm1 = AdaLayerNormZero(dim)
        self.attn1.set_processor(DyDiTAttnProcessor())
        up, _, down = self.ff.net
        if up.proj.out_features != down.in_features:
            raise ValueError(
                f"activation_fn {activation_fn!r}: expected one without a second, gating projection, such as "
                "'gelu-approximate', because groups of channels are cut from one projection"
            )
        self._init_dynamic(dim, num_attention_heads, down.in_features, config)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim"],
        cross_attention_kwargs: dict[str, Any] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The tokens, and with ``collect`` (tokens, token gates [batch, tokens]).

        Args:
            temb: what modulates: timestep plus class.
            t_emb: the pure timestep embedding in fp32, for adapters.
        """
        if gates.shared is not None:
            cut = self.sliced(gates.shared)
            inputs = (hidden_states, temb, cross_attention_kwargs, t_emb)
            return DyDiTTransformerBlock.forward(cut, *inputs, gates.inside, collect)
        with self.timestep_state.scope(t_emb):  # type: ignore[union-attr]
            x, gate_msa, shift_mlp, scale_mlp, gate_mlp = adaptive_norm(self.norm1, hidden_states, temb)
            x = self.attn1(x, head_mask=self._head_mask(gates), **(cross_attention_kwargs or {}))
            hidden_states = gated_add(hidden_states, gate_msa, x)

            keep = self._route(hidden_states, None, temb, gates)
            x = modulate(self.norm3(hidden_states), scale_mlp, shift_mlp)
            if gates.kept_only and keep is not None:
                flat = x.flatten(0, 1)
                work = lambda rows: self.ff(take_rows(flat, rows))  # noqa: E731
                hidden_states = self._add_on_kept(hidden_states, work, keep, gate_mlp)
            else:
                x = feed_forward(self.ff, x, gates.groups, self.dy_channel_unit)
                hidden_states = gated_add(hidden_states, gate_mlp, x, keep)
        return (hidden_states, ones_or(keep, hidden_states)) if collect else hidden_states

    def sliced(self, units: SharedUnits) -> DyDiTTransformerBlock:
        """The block on the units that a whole batch shares, for training."""
        heads, channels = self._members(units)
        attn1, ff = sliced_attention(self.attn1, heads), sliced_feed_forward(self.ff, channels)
        return sliced_block(DyDiTTransformerBlock, self, attn1=attn1, ff=ff)

    def assembled(self, parts: dict[str, Any], t_emb: Float[Tensor, "1 dim"]) -> PackedDiTBlock:
        """The packed block of these parts."""
        return PackedDiTBlock(self, **parts, t_emb=t_emb)


class PackedDiTBlock(PackedBlock):
    """DiT's block with some of its heads and channels, the MLP on the chosen tokens only; for inference."""

    def __init__(
        self, block: DyDiTTransformerBlock, attn1: AttentionPart, ff: MLPPart, t_emb: Float[Tensor, "1 dim"]
    ) -> None:
        super().__init__(block)
        self.norm1: Any = fold(block.norm1, t_emb)
        self.norm3 = block.norm3
        self.attn1, self.ff = attn1, ff

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        temb: Float[Tensor, "batch dim"],
        cross_attention_kwargs: dict[str, Any] | None = None,
        t_emb: Float[Tensor, "batch_t dim"] | None = None,
        gates: BlockGates = BlockGates(),
        collect: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As :class:`DyDiTTransformerBlock`'s."""
        modulation = self._modulation(temb, gates).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation  # [batch, dim]
        x = modulated(self.norm1.norm, hidden_states, shift_msa, scale_msa)
        x = gated_sum(hidden_states, gate_msa, self._attention(x, **(cross_attention_kwargs or {})))
        tokens = self._tokens(x, None, temb, gates, collect)
        x = mlp_on_tokens_(x, tokens.rows, self.ff, self.norm3, shift_mlp, scale_mlp, gate_mlp)
        return (x, ones_or(tokens.keep, x)) if collect else x

    @property
    def modulation(self) -> tuple[nn.Module, ...]:
        """[batch, dim] -> [batch, 6 dim]."""
        return (self.norm1.linear,)

    def _attention(
        self, x: Float[Tensor, "batch tokens dim"], frames: int = 1, temporal: bool = False, **others: Any
    ) -> Float[Tensor, "batch tokens dim"]:
        if others:
            raise ValueError(f"cross_attention_kwargs: packed blocks take none but 'scale'; got {', '.join(others)}")
        qkv = self.attn1.project(x)
        if frames == 1 and not temporal:
            return self.attn1.project_out(self.attn1.attend(*qkv))
        alone = "(b p) f h d" if temporal else "(b f) p h d"
        out = self.attn1.attend(*(rearrange(y, f"b (f p) h d -> {alone}", f=frames) for y in qkv))
        out = rearrange(out, f"{alone.removesuffix(' h d')} c -> b (f p) c", b=len(x), f=frames)
        return self.attn1.project_out(out)
