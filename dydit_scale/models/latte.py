"""DyLatte: Latte's video transformer with dynamic heads, MLP channels and tokens (DyLatte in DyDiT++).

A subclass of diffusers' LatteTransformer3DModel (Latte-1, text to video) with the same parameter names for the base
weights. All gates open, it computes what the static model computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from torch.nn import functional as F

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import BlockCost, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks, GateMode
from dydit_scale.dynamic.tokens import router_macs
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.class_latte import over_frames
from dydit_scale.models.latte_blocks import DyLatteAttnProcessor, DyLatteTransformerBlock, PackedLatteBlock
from dydit_scale.models.routed import in_batch_order, timestep_embedding


class DyLatteOutput(NamedTuple):
    """What a forward returns when it is asked for its masks."""

    sample: Float[Tensor, "batch channels frames height width"]
    masks: DynamicMasks
    """Layers: spatial and temporal blocks in turn. Tokens: frame by frame, each frame row by row, in both kinds; zeros
    for what a layer does not see: the pictures in temporal blocks."""


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
        check_dynamic(self.dynamic)

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
        images: int = 0,
    ) -> Transformer2DModelOutput | DyLatteOutput | tuple[Tensor]:
        """LatteTransformer3DModel's forward (same arguments, same shapes), and:

        Args:
            hidden_states: [batch, channels, frames, height, width]; a clip of one frame or the model's
                ``video_length``, then the pictures, if any.
            encoder_hidden_states: [batch, text, channels], for the clip and its pictures; or, with own captions of the
                pictures, [batch, 1 + images, text, channels], the clip's first (no clip: [batch, images, ...]).
            timestep: [batch], as the model was trained with (0..999).
            encoder_attention_mask: booleans [batch, text], True to keep, or a bias [batch, 1, text]; either may be
                repeated over the frames already, the only form that the static class takes. With own captions also
                booleans [batch, 1 + images, text].
            gates: "threshold" (inference), "open" (the complete model), the noise for random gates (training), or one
                sub-network for the batch (training with frozen routers).
            collect: return :class:`DyLatteOutput` with the masks of all layers; zeros in temporal blocks that
                ``enable_temporal_attentions=False`` leaves out, and for pictures in all of them.
            images: how many of the last frames are separate pictures, for training on videos and pictures together
                as Latte does: they pass the spatial blocks with the clip, skip the temporal ones, and get no
                position in time. The static class has no such argument and takes each picture as a clip of one frame,
                with ``enable_temporal_attentions=False``.
        """
        clip = hidden_states.shape[2] - images if hidden_states.ndim == 5 else 0
        enable_temporal_attentions = enable_temporal_attentions and clip > 0
        self._check(hidden_states, timestep, encoder_hidden_states, enable_temporal_attentions, images)
        batch = len(hidden_states)
        steps = self._planned_steps(timestep.float(), gates, hidden_states)
        if len(steps) > 1:
            rows = list(steps.values())
            options = {
                "enable_temporal_attentions": enable_temporal_attentions,
                "return_dict": False,
                "collect": collect,
                "images": images,
            }
            batched = (hidden_states, timestep, encoder_hidden_states)
            parts = [self(*(x[r] for x in batched), _rows(encoder_attention_mask, r, batch), **options) for r in rows]
            return self._result(*in_batch_order(parts, rows), return_dict)

        step = next(iter(steps), None)
        t_emb, blocks, width = self._network_at(step, timestep.float(), gates)
        frames, rows_cols = hidden_states.shape[2], [n // self.config["patch_size"] for n in hidden_states.shape[3:]]
        with self.timestep_state.scope(t_emb):
            alike = clip if encoder_hidden_states.ndim == 4 else frames  # the frames that share the first caption
            x, text, modulation, embedded = self._embed(hidden_states, timestep, encoder_hidden_states, alike)
            text_mask = _text_mask(encoder_attention_mask, batch, frames, alike, x.dtype)
            tokens: list[Tensor] = []
            for i, block in enumerate(blocks):
                temporal = i % 2 == 1
                if temporal and not enable_temporal_attentions:
                    continue
                if temporal:
                    x, pictures = rearrange(x, "(b f) p d -> (b p) f d", b=batch).split([clip, images], dim=1)
                    if i == 1 and clip > 1:
                        x = x + self.temp_pos_embed.to(x.dtype)
                block_gates = self._block_gates(i, step, width, gates)
                if block_gates.token_noise is not None:
                    noise = _in_block_order(block_gates.token_noise, clip, images, temporal)
                    block_gates = block_gates._replace(token_noise=noise)
                state = (x, None if temporal else text, None if temporal else text_mask, modulation)
                settings = (t_emb, block_gates, collect)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    out = self._gradient_checkpointing_func(block, *state, *settings)
                else:
                    out = block(*state, *settings)
                x, *keep = out if collect else (out,)
                if temporal:
                    x = torch.cat([x, pictures], dim=1) if images else x
                    x = rearrange(x, "(b p) f d -> (b f) p d", b=batch)
                tokens.extend(_frame_by_frame(k, clip, images, temporal) for k in keep)
            sample = self._unpatched(x, embedded, frames, *rows_cols)
        if not collect:
            return self._result(sample, None, return_dict)
        if enable_temporal_attentions:
            return DyLatteOutput(sample, self._masks(step, width, torch.stack(tokens)))
        return DyLatteOutput(sample, with_idle_temporal(tokens, partial(self._masks, step, width)))

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
        self,
        image_tokens: int,
        text_tokens: int = 0,
        *,
        frames: int | None = None,
        temporal: bool = True,
        images: int = 0,
    ) -> ModelCost:
        """MACs of one forward for one sample, from shapes.

        Args:
            image_tokens: those of the whole clip and of the pictures.
            frames: of the clip; the model's ``video_length`` where it is None.
            temporal: False for a forward with ``enable_temporal_attentions=False``.
            images: pictures behind the clip.

        Raises:
            ValueError: the frames cannot have equally many tokens.
        """
        config, d, n = self.config, self.inner_dim, image_tokens
        clip = config["video_length"] if frames is None else frames
        frames = clip + images
        if n % frames:
            raise ValueError(f"cost: {n} tokens cannot be cut into {frames} equal frames")
        patches = n // frames
        # Upstream repeats the text over the frames, so each frame pays for its keys and values.
        cross = 2 * d * d * (n + frames * text_tokens) + 2 * n * text_tokens * d
        spatial = BlockCost(
            fixed=0 if config["cross_attention_dim"] is None else cross,
            router=router_macs(self.dynamic, d, n),
            heads=4 * d * d * n + 2 * n * patches * d,
            groups_tokens=8 * d * d * n,
        )
        m = clip * patches
        over_time = BlockCost(
            router=router_macs(self.dynamic, d, m),
            heads=4 * d * d * m + 2 * m * clip * d,
            groups_tokens=8 * d * d * n,
            token_share=m / n,
        )
        per_token = n * d * config["patch_size"] ** 2 * (config["in_channels"] + self.out_channels)
        caption = text_tokens * d * (config["caption_channels"] + d)
        return ModelCost(
            blocks=(spatial, over_time if temporal and clip else BlockCost()) * config["num_layers"],
            outside=256 * d + 7 * d * d + per_token + caption,
        )

    @property
    def inner_dim(self) -> int:
        """Channels of a token."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def _check(self, video: Tensor, timestep: Tensor | None, text: Tensor | None, temporal: bool, images: int) -> None:
        if video.ndim != 5:
            raise ValueError(
                f"hidden_states: expected [batch, channels, frames, height, width]; got {list(video.shape)}"
            )
        batch, frames, length = video.shape[0], video.shape[2], self.config["video_length"]
        clip = frames - images
        if not 0 <= images <= frames:
            raise ValueError(f"images: expected 0 to {frames}, the number of frames; got {images}")
        if timestep is None or timestep.shape != (batch,):
            found = None if timestep is None else list(timestep.shape)
            raise ValueError(f"timestep: expected one for each of the {batch} videos; got {found}")
        captions = min(clip, 1) + images
        if text is None or len(text) != batch or text.ndim not in (3, 4) or text.shape[1:-2] not in ((), (captions,)):
            found = None if text is None else list(text.shape)
            raise ValueError(
                f"encoder_hidden_states: expected [batch {batch}, tokens, channels], or [batch {batch}, {captions}, "
                f"tokens, channels] with own captions of the pictures; got {found}"
            )
        if temporal and clip not in (1, length):
            raise ValueError(
                f"hidden_states: {clip} frames, but the temporal positions are those of {length}; "
                f"give {length} frames or one (and then the pictures, if any), or set enable_temporal_attentions=False"
            )
        self._check_processors()

    def _embed(
        self, video: Tensor, timestep: Tensor, text: Tensor, alike: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens [batch frames, patches, dim], text [batch frames, text, dim], modulation of the blocks
        [batch, 6 dim], that of the last layer [batch, dim]); the first caption is that of ``alike`` frames."""
        x = self.pos_embed(rearrange(video, "b c f h w -> (b f) c h w"))
        modulation, embedded = self.adaln_single(timestep, hidden_dtype=x.dtype)
        text = self.caption_projection(text)
        text = text if text.ndim == 4 else text[:, None]
        return x, over_frames(text, alike).flatten(0, 1), modulation, embedded

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
            "class labels either: class-conditional Latte is ClassLatteTransformer3DModel"
        )
    if activation_fn not in ("gelu", "gelu-approximate"):
        raise ValueError(
            f"activation_fn: expected 'gelu-approximate' (Latte-1) or 'gelu'; got {activation_fn!r}, whose channels "
            "are not cut here"
        )


def check_dynamic(config: DynamicConfig) -> None:
    """ValueError for settings that no Latte can have."""
    if config.tokens and config.token_router != "dit":
        raise ValueError(
            f"dynamic.token_router: expected 'dit'; got {config.token_router!r}, which reads text tokens, and Latte's "
            "temporal blocks have none"
        )
    if config.single_bypass != "mlp":
        raise ValueError(f"dynamic.single_bypass: expected 'mlp'; {config.single_bypass!r} is for FLUX's single blocks")


def with_idle_temporal(tokens: list[Tensor], masks_of: Callable[[Tensor], DynamicMasks]) -> DynamicMasks:
    """The masks of all layers from the token gates of the spatial ones [batch, tokens]: zeros in the temporal layers,
    the odd ones. ``masks_of`` completes token gates [layers, batch, tokens]."""
    masks = masks_of(torch.stack([layer for keep in tokens for layer in (keep, torch.zeros_like(keep))]))
    spatial = torch.arange(len(masks.tokens), device=masks.tokens.device)[:, None, None] % 2 == 0
    return DynamicMasks(*(mask * spatial for mask in masks))


def _rows(mask: Tensor | None, rows: list[int], batch: int) -> Tensor | None:
    """The part of a text mask, repeated over frames or not, that belongs to some samples."""
    return None if mask is None else mask.unflatten(0, (batch, -1))[rows].flatten(0, 1)


def _text_mask(mask: Tensor | None, batch: int, frames: int, alike: int, dtype: torch.dtype) -> Tensor | None:
    """What attention takes, [batch frames, 1, 1, text]: booleans, or a bias in ``dtype``."""
    if mask is None:
        return None
    captions = min(alike, 1) + frames - alike
    if mask.dtype == torch.bool and captions > 1 and mask.ndim == 3 and mask.shape[:2] == (batch, captions):
        mask = over_frames(mask, alike).flatten(0, 1)
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
    tokens: Float[Tensor, "batch tokens"], clip: int, images: int, temporal: bool
) -> Float[Tensor, "batch tokens_in"]:
    """What a block sees: all frame by frame; or (temporal) the clip's place by place."""
    if not temporal:
        return tokens
    return rearrange(tokens.unflatten(1, (clip + images, -1))[:, :clip], "b f p -> b (p f)")


def _frame_by_frame(
    tokens: Float[Tensor, "batch tokens_in"], clip: int, images: int, temporal: bool
) -> Float[Tensor, "batch tokens"]:
    """The inverse of :func:`_in_block_order`, with zeros for what the block does not see."""
    if not temporal:
        return tokens
    return F.pad(rearrange(tokens, "b (p f) -> b f p", f=clip), (0, 0, 0, images)).flatten(1)


for _block in (DyLatteTransformerBlock, PackedLatteBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    )
