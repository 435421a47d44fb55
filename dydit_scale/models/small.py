"""Whole pipelines at toy size: the real classes, random weights, closed vocabulary, pictures in pixel space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
)
from torch import nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.class_latte import ClassLatteTransformer3DModel
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.encoders import PixelAutoencoder, small_text_encoders
from dydit_scale.models.pipelines import ClassLattePipeline, DyDiTPipeline, SiTPipeline, dit_scheduler
from dydit_scale.models.sit_scheduler import SiTScheduler

CHANNELS = 12
"""Of 2x2 pixels side by side."""


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
    """Pictures in pixel space (a token is a patch of 4x4 pixels), captions of ``words`` up to 16 tokens."""
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
        vae=_standardised_pixels(),
        text_encoder=clip,
        tokenizer=clip_tokens,
        text_encoder_2=t5,
        tokenizer_2=t5_tokens,
        transformer=transformer,
    )


def small_class_pipeline(
    names: Sequence[str], *, kind: str = "dit", heads: int = 8, head_dim: int = 16, layers: int = 4, side: int = 32,
    seed: int = 0,
) -> DyDiTPipeline | SiTPipeline:  # fmt: skip
    """A ``dit`` with learned variance, or a ``sit``, of the classes ``names``; a token is a patch of 4x4 pixels."""
    transformer = _seeded(
        seed,
        lambda: DyDiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=CHANNELS,
            out_channels=CHANNELS * (2 if kind == "dit" else 1),
            num_layers=layers,
            sample_size=side // 2,
            num_embeds_ada_norm=len(names),
            norm_eps=1e-6,
            time_freq_shift=0.0,
            dynamic=_static_settings(),
        ),
    )
    cls: Any = {"dit": DyDiTPipeline, "sit": SiTPipeline}[kind]
    scheduler = dit_scheduler() if kind == "dit" else SiTScheduler("euler")
    return cls(transformer.eval(), _standardised_pixels(), scheduler, id2label=dict(enumerate(names)))


def small_class_latte_pipeline(
    names: Sequence[str], *, frames: int = 8, heads: int = 8, head_dim: int = 16, layers: int = 4, side: int = 16,
    seed: int = 0,
) -> ClassLattePipeline:  # fmt: skip
    """Clips of the classes ``names``; a token is a patch of 4x4 pixels of a frame."""
    transformer = _seeded(
        seed,
        lambda: ClassLatteTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=layers,
            sample_size=side // 2,
            num_classes=len(names),
            video_length=frames,
        ),
    )
    return ClassLattePipeline(
        transformer.eval(), _standardised_pixels(), dit_scheduler(), id2label=dict(enumerate(names))
    )


def small_latte_pipeline(
    words: Sequence[str], *, frames: int = 8, heads: int = 4, head_dim: int = 16, layers: int = 2, side: int = 32,
    seed: int = 0,
) -> LattePipeline:  # fmt: skip
    """Latte-1 for captions of ``words``; a token is a patch of 4x4 pixels of a frame."""
    _, _, t5, t5_tokens = small_text_encoders(words, seed=seed)
    dim = heads * head_dim
    transformer = _seeded(
        seed,
        lambda: LatteTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=layers,
            cross_attention_dim=dim,
            attention_bias=True,
            sample_size=side // 2,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=t5.config.d_model,
            video_length=frames,
        ),
    )
    return LattePipeline(
        tokenizer=t5_tokens,
        text_encoder=t5,
        vae=_pixels(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


def _standardised_pixels() -> PixelAutoencoder:
    """Latents of mean 0 and variance 1 for pictures that are mostly dark, as the built-in scenes are."""
    return PixelAutoencoder(block_out_channels=(1, 1), shift_factor=-0.65, scaling_factor=2.5)


def _pixels() -> PixelAutoencoder:
    """For diffusers' pipelines that know no shift."""
    return PixelAutoencoder(block_out_channels=(1, 1), scaling_factor=1.0)


def _static_settings() -> dict[str, Any]:
    return asdict(DynamicConfig(heads=False, mlp=False, tokens=False))


def _seeded(seed: int, make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
