"""DyLatte: Latte's video transformer with dynamic heads, MLP channels and tokens (DyLatte in DyDiT++).

A subclass of diffusers' LatteTransformer3DModel (Latte-1, text to video) with the same parameter names for the base
weights. All gates open, it computes what the static model computes, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import LatteTransformer3DModel, ModelMixin  # noqa: F401  (diffusers looks for ModelMixin here)
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import BlockCost, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks, GateMode, GateNoise
from dydit_scale.dynamic.tokens import router_macs
from dydit_scale.models.base import DynamicModelMixin, in_batch_order, timestep_embedding
from dydit_scale.models.blocks import BlockGates
from dydit_scale.models.latte_blocks import DyLatteAttnProcessor, DyLatteTransformerBlock


class DyLatteOutput(NamedTuple):
    """What a forward returns when it is asked for its masks."""

    sample: Float[Tensor, "batch channels frames height width"]
    masks: DynamicMasks
    """Layers: spatial and temporal blocks in turn. Tokens: frame by frame, each frame row by row, in both kinds."""


class DyLatteTransformer3DModel(DynamicModelMixin, PeftAdapterMixin, AttentionMixin, LatteTransformer3DModel):
    """Latte with timestep-wise dynamic width and spatial-wise dynamic tokens, in spatial and temporal blocks.

    Cross-attention to the text always runs whole (see :class:`DyLatteTransformerBlock`).

    Args (beyond LatteTransformer3DModel's):
        dynamic: the fields of :class:`DynamicConfig`; ``token_router`` must be ``dit``, the default here.

    Raises:
        ValueError: a config that no Latte has and that this class does not compute.
    """

    static_class = LatteTransformer3DModel
    output_class = DyLatteOutput
    processor_class = DyLatteAttnProcessor
    token_router = "dit"
    _no_split_modules = ["DyLatteTransformerBlock"]
    _repeated_blocks = ["DyLatteTransformerBlock"]
    _keep_in_fp32_modules = ["dy_width", "dy_token"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "dy_"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        cross_attention_dim: int | None = None,
        attention_bias: bool = False,
        sample_size: int = 64,
        patch_size: int | None = None,
        activation_fn: str = "geglu",
        num_embeds_ada_norm: int | None = None,
        norm_type: str = "layer_norm",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        caption_channels: int | None = None,
        video_length: int = 16,
        dynamic: dict[str, Any] | None = None,
    ) -> None:
        _check_config(norm_type, activation_fn)
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,  # ours follow
            dropout=dropout,
            cross_attention_dim=cross_attention_dim,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            caption_channels=caption_channels,
            video_length=video_length,
        )
        self.register_to_config(num_layers=num_layers)
        self.dynamic = DynamicConfig(**(dynamic or {})).for_family(self.token_router)
        _check_dynamic(self.dynamic)

        def blocks(text_dim: int | None) -> nn.ModuleList:
            return nn.ModuleList(
                DyLatteTransformerBlock(
                    self.inner_dim,
                    num_attention_heads,
                    attention_head_dim,
                    cross_attention_dim=text_dim,
                    dropout=dropout,
                    activation_fn=activation_fn,
                    attention_bias=attention_bias,
                    norm_elementwise_affine=norm_elementwise_affine,
                    norm_eps=norm_eps,
                    config=self.dynamic,
                )
                for _ in range(num_layers)
            )

        self.transformer_blocks, self.temporal_transformer_blocks = blocks(cross_attention_dim), blocks(None)
        self._init_dynamic(layers=2 * num_layers, dim=self.inner_dim, heads=num_attention_heads)
        for block in self.dynamic_blocks():
            block.timestep_state = self.timestep_state  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor = None,  # type: ignore[assignment]
        encoder_hidden_states: Tensor = None,  # type: ignore[assignment]
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
        gates: GateMode = "threshold",
        collect: bool = False,
    ) -> Transformer2DModelOutput | DyLatteOutput | tuple[Tensor]:
        """LatteTransformer3DModel's forward (same arguments, same shapes), and:

        Args:
            hidden_states: [batch, channels, frames, height, width]; one frame, or the model's ``video_length``.
            timestep: [batch], as the model was trained with (0..999).
            encoder_attention_mask: booleans [batch, text], True to keep, or a bias [batch, 1, text]; either may be
                repeated over the frames already, the only form that the static class takes.
            gates: "threshold" (inference), "open" (the complete model) or the noise for random gates (training).
            collect: return :class:`DyLatteOutput` with the masks of all layers; zeros in temporal blocks that
                ``enable_temporal_attentions=False`` leaves out.
        """
        self._check(hidden_states, timestep, encoder_hidden_states, enable_temporal_attentions)
        batch = len(hidden_states)
        steps = self._planned_steps(timestep.float()) if gates == "threshold" and not torch.is_grad_enabled() else {}
        if len(steps) > 1:
            rows = list(steps.values())
            options = {
                "enable_temporal_attentions": enable_temporal_attentions,
                "return_dict": False,
                "collect": collect,
            }
            batched = (hidden_states, timestep, encoder_hidden_states)
            parts = [self(*(x[r] for x in batched), _rows(encoder_attention_mask, r, batch), **options) for r in rows]
            return self._result(*in_batch_order(parts, rows), return_dict)

        step = next(iter(steps), None)
        t_emb, blocks, width = self._network_at(step, timestep.float(), gates)
        frames, rows_cols = hidden_states.shape[2], [n // self.config["patch_size"] for n in hidden_states.shape[3:]]
        with self.timestep_state.scope(t_emb):
            x, text, modulation, embedded = self._embed(hidden_states, timestep, encoder_hidden_states)
            text_mask = _text_mask(encoder_attention_mask, batch, frames, x.dtype)
            tokens: list[Tensor] = []
            for i, block in enumerate(blocks):
                temporal = i % 2 == 1
                if temporal and not enable_temporal_attentions:
                    continue
                if temporal:
                    x = rearrange(x, "(b f) p d -> (b p) f d", b=batch)
                    if i == 1 and frames > 1:
                        x = x + self.temp_pos_embed.to(x.dtype)
                noise = _in_block_order(gates.tokens[i], frames, temporal) if isinstance(gates, GateNoise) else None
                state = (x, None if temporal else text, None if temporal else text_mask, modulation)
                settings = (t_emb, BlockGates(*width.layer(i), noise, gates == "open"), collect)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    out = self._gradient_checkpointing_func(block, *state, *settings)
                else:
                    out = block(*state, *settings)
                x, *keep = out if collect else (out,)
                if temporal:
                    x = rearrange(x, "(b p) f d -> (b f) p d", b=batch)
                tokens.extend(_frame_by_frame(k, frames, temporal) for k in keep)
            sample = self._unpatched(x, embedded, frames, *rows_cols)
        if not collect:
            return self._result(sample, None, return_dict)
        if enable_temporal_attentions:
            return DyLatteOutput(sample, self._masks(step, width, torch.stack(tokens)))
        idle = torch.zeros_like(tokens[0])
        masks = self._masks(step, width, torch.stack([layer for keep in tokens for layer in (keep, idle)]))
        return DyLatteOutput(sample, _without_temporal(masks))

    def dynamic_blocks(self) -> list[nn.Module]:
        """Spatial and temporal blocks in turn, as the forward runs them."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def block_names(self) -> list[str]:
        """Spatial and temporal blocks by their numbers."""
        return [f"{('spatial', 'temporal')[i % 2]} {i // 2}" for i in range(len(self.dynamic_blocks()))]

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The output of the timestep embedder, computed in fp32 from timesteps in 0..999."""
        return timestep_embedding(self.adaln_single.emb, timestep)

    def cost(
        self, image_tokens: int, text_tokens: int = 0, *, frames: int | None = None, temporal: bool = True
    ) -> ModelCost:
        """MACs of one forward for one sample, from shapes.

        Args:
            image_tokens: those of the whole video.
            frames: the model's ``video_length`` where it is None.
            temporal: False for a forward with ``enable_temporal_attentions=False``.

        Raises:
            ValueError: the frames cannot have equally many tokens.
        """
        config, d, n = self.config, self.inner_dim, image_tokens
        frames = config["video_length"] if frames is None else frames
        if n % frames:
            raise ValueError(f"cost: {n} tokens cannot be cut into {frames} equal frames")
        shared = {
            "router": router_macs(self.dynamic, d, n),
            "groups_tokens": 8 * d * d * n,
        }
        # Upstream repeats the text over the frames, so each frame pays for its keys and values.
        cross = 2 * d * d * (n + frames * text_tokens) + 2 * n * text_tokens * d
        spatial = BlockCost(
            fixed=0 if config["cross_attention_dim"] is None else cross,
            heads=4 * d * d * n + 2 * n * (n // frames) * d,
            **shared,
        )
        over_time = BlockCost(heads=4 * d * d * n + 2 * n * frames * d, **shared) if temporal else BlockCost()
        per_token = n * d * config["patch_size"] ** 2 * (config["in_channels"] + self.out_channels)
        caption = text_tokens * d * (config["caption_channels"] + d)
        return ModelCost(
            blocks=(spatial, over_time) * config["num_layers"], outside=256 * d + 7 * d * d + per_token + caption
        )

    @property
    def inner_dim(self) -> int:
        """Channels of a token."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def _check(self, video: Tensor, timestep: Tensor | None, text: Tensor | None, temporal: bool) -> None:
        if video.ndim != 5:
            raise ValueError(
                f"hidden_states: expected [batch, channels, frames, height, width]; got {list(video.shape)}"
            )
        batch, frames, length = video.shape[0], video.shape[2], self.config["video_length"]
        if timestep is None or timestep.shape != (batch,):
            found = None if timestep is None else list(timestep.shape)
            raise ValueError(f"timestep: expected one for each of the {batch} videos; got {found}")
        if text is None or len(text) != batch:
            found = None if text is None else list(text.shape)
            raise ValueError(f"encoder_hidden_states: expected [batch {batch}, tokens, channels]; got {found}")
        if temporal and frames not in (1, length):
            raise ValueError(
                f"hidden_states: {frames} frames, but the temporal positions are those of {length}; "
                f"give {length} frames or one, or set enable_temporal_attentions=False"
            )
        self._check_processors()

    def _embed(self, video: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens [batch frames, patches, dim], text [batch frames, text, dim], modulation of the blocks
        [batch, 6 dim], that of the last layer [batch, dim])."""
        frames = video.shape[2]
        x = self.pos_embed(rearrange(video, "b c f h w -> (b f) c h w"))
        modulation, embedded = self.adaln_single(timestep, hidden_dtype=x.dtype)
        return x, self.caption_projection(text).repeat_interleave(frames, dim=0), modulation, embedded

    def _unpatched(
        self,
        x: Float[Tensor, "rows patches dim"],
        embedded: Float[Tensor, "batch dim"],
        frames: int,
        rows: int,
        cols: int,
    ) -> Float[Tensor, "batch channels frames height width"]:
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)  # batch 1 dim
        x = self.norm_out(x.reshape(len(embedded), -1, x.shape[-1]))
        x = self.proj_out(x * (1 + scale) + shift)
        patch = self.config["patch_size"]
        return rearrange(x, "b (f h w) (p q c) -> b c f (h p) (w q)", f=frames, h=rows, w=cols, p=patch, q=patch)


def _check_config(norm_type: str, activation_fn: str) -> None:
    if norm_type != "ada_norm_single":
        raise ValueError(
            f"norm_type: expected 'ada_norm_single', as in Latte-1; got {norm_type!r}. LatteTransformer3DModel has no "
            "class labels either, so class-conditional Latte cannot be loaded into it"
        )
    if activation_fn not in ("gelu", "gelu-approximate"):
        raise ValueError(
            f"activation_fn: expected 'gelu-approximate' (Latte-1) or 'gelu'; got {activation_fn!r}, whose channels "
            "are not cut here"
        )


def _check_dynamic(config: DynamicConfig) -> None:
    if config.tokens and config.token_router != "dit":
        raise ValueError(
            f"dynamic.token_router: expected 'dit'; got {config.token_router!r}, which reads text tokens, and Latte's "
            "temporal blocks have none"
        )
    if config.single_bypass != "mlp":
        raise ValueError(f"dynamic.single_bypass: expected 'mlp'; {config.single_bypass!r} is for FLUX's single blocks")


def _without_temporal(masks: DynamicMasks) -> DynamicMasks:
    """Zeros in the temporal layers, the odd ones."""
    spatial = torch.arange(len(masks.tokens), device=masks.tokens.device)[:, None, None] % 2 == 0
    return DynamicMasks(*(mask * spatial for mask in masks))


def _rows(mask: Tensor | None, rows: list[int], batch: int) -> Tensor | None:
    """The part of a text mask, repeated over frames or not, that belongs to some samples."""
    return None if mask is None else mask.unflatten(0, (batch, -1))[rows].flatten(0, 1)


def _text_mask(mask: Tensor | None, batch: int, frames: int, dtype: torch.dtype) -> Tensor | None:
    """What attention takes, [batch frames, 1, 1, text]: booleans, or a bias in ``dtype``."""
    if mask is None:
        return None
    if len(mask) not in (batch, batch * frames) or mask.ndim not in (2, 3) or (mask.ndim == 3 and mask.shape[1] != 1):
        raise ValueError(
            f"encoder_attention_mask: expected [batch, tokens] or [batch, 1, tokens] with batch {batch} (or "
            f"{batch * frames}, over frames); got {list(mask.shape)}"
        )
    if mask.ndim == 2 and mask.is_floating_point():
        raise ValueError("encoder_attention_mask: [batch, tokens] holds booleans, True to keep; got floating point")
    mask = mask[:, None].bool() if mask.ndim == 2 else mask
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    return mask[:, None].repeat_interleave(batch * frames // len(mask), dim=0)


def _in_block_order(
    tokens: Float[Tensor, "batch tokens"], frames: int, temporal: bool
) -> Float[Tensor, "batch tokens"]:
    """Frame by frame to place by place, for a temporal block."""
    return rearrange(tokens, "b (f p) -> b (p f)", f=frames) if temporal else tokens


def _frame_by_frame(
    tokens: Float[Tensor, "batch tokens"], frames: int, temporal: bool
) -> Float[Tensor, "batch tokens"]:
    """The inverse of :func:`_in_block_order`."""
    return rearrange(tokens, "b (p f) -> b (f p)", f=frames) if temporal else tokens


TransformerBlockRegistry.register(
    DyLatteTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)
