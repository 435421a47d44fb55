"""A whole FluxPipeline at toy size: the real classes, random weights, closed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from dydit_scale.models.encoders import PixelAutoencoder, small_text_encoders


def small_flux_pipeline(
    words: Sequence[str],
    *,
    heads: int = 6,
    head_dim: int = 16,
    double_blocks: int = 2,
    single_blocks: int = 4,
    guidance: bool = False,
    seed: int = 0,
) -> FluxPipeline:
    """Pictures in pixel space (a token is a patch of 4x4 pixels), captions of ``words`` up to 16 tokens.

    ``shift_factor`` and ``scaling_factor`` standardise pictures that are mostly dark, as the built-in scenes are.
    """
    rope = head_dim * 3 // 8 // 2 * 2  # rows and columns each; the rest is for the unused first axis
    clip, clip_tokens, t5, t5_tokens = small_text_encoders(words, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=48,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=t5.config.d_model,
            pooled_projection_dim=clip.config.hidden_size,
            guidance_embeds=guidance,
            axes_dims_rope=(head_dim - 2 * rope, rope, rope),
        )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=PixelAutoencoder(block_out_channels=(1, 1), shift_factor=-0.65, scaling_factor=2.5),
        text_encoder=clip,
        tokenizer=clip_tokens,
        text_encoder_2=t5,
        tokenizer_2=t5_tokens,
        transformer=transformer,
    )
