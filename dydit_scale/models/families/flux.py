"""FLUX.1 (dev, schnell, lite): text to image by rectified flow."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from jaxtyping import Float
from torch import Tensor

from dydit_scale.models.encoders import image_ids, pack_latents
from dydit_scale.models.family import Family, Prompts, SampleConfig, SampleSize, to_uint8
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.models.small import small_flux_pipeline


class FluxFamily(Family):
    """FluxPipeline; prompts go through CLIP and T5, latents are packed two by two."""

    name = "flux"
    pipeline_class = FluxPipeline
    static_class = FluxTransformer2DModel
    dynamic_class = DyFluxTransformer2DModel
    guidance_layout = "in_turn"
    any_size = True

    def small_pipeline(self, words: Sequence[str], *, seed: int = 0) -> FluxPipeline:
        """Six blocks of width 96."""
        return small_flux_pipeline(words, seed=seed)

    def latent_shape(self, pipeline: FluxPipeline, size: SampleSize) -> tuple[int, ...]:
        """[channels, rows, cols] of the autoencoder."""
        rows, cols = self.token_grid(pipeline, size)
        return (pipeline.transformer.config["in_channels"] // 4, 2 * rows, 2 * cols)

    def token_side(self, pipeline: FluxPipeline) -> int:
        """Of two by two latents."""
        return 2 * pipeline.vae_scale_factor

    def pack(self, latents: Tensor) -> Tensor:
        """[batch, tokens, 4 * channels]."""
        return pack_latents(latents)

    def embed(self, pipeline: FluxPipeline, captions: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
        """T5's tokens, which see the padding behind them as FLUX was trained, and CLIP's pooled embedding."""
        text, pooled, _ = pipeline.encode_prompt(
            prompt=list(captions),
            prompt_2=None,
            device=pipeline.text_encoder_2.device,
            max_sequence_length=text_tokens,
        )
        return {"text": text, "pooled": pooled}

    def text_shapes(self, config: Mapping[str, Any], text_tokens: int) -> dict[str, tuple[int, ...]]:
        """As of the encoders that the config was made for."""
        return {"text": (text_tokens, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}

    def conditions(self, pipeline: FluxPipeline, prompts: Prompts, size: SampleSize) -> dict[str, Tensor]:
        """Text, positions and guidance."""
        embedded = self.embedded(pipeline, prompts)
        text, device = embedded["text"], embedded["text"].device
        conditions = {
            "encoder_hidden_states": text,
            "pooled_projections": embedded["pooled"],
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": image_ids(*self.token_grid(pipeline, size)).to(device),
        }
        if pipeline.transformer.config["guidance_embeds"]:
            conditions["guidance"] = torch.full((len(prompts.captions),), prompts.guidance, device=device)
        return conditions

    def timesteps(self, pipeline: FluxPipeline, config: SampleConfig) -> Float[Tensor, " steps"]:
        """In 0..1, 1 is noise."""
        scheduler = copy.deepcopy(pipeline.scheduler)
        c = scheduler.config
        mu = calculate_shift(
            self.image_tokens(pipeline, config.size),
            c.get("base_image_seq_len", 256),
            c.get("max_image_seq_len", 4096),
            c.get("base_shift", 0.5),
            c.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / config.steps, config.steps), mu=mu)
        return scheduler.timesteps.float() / 1000

    def draw(
        self,
        pipeline: FluxPipeline,
        prompts: list[str],
        noise: Tensor,
        generators: list[torch.Generator],
        config: SampleConfig,
    ) -> np.ndarray:
        """Euler steps; with ``cfg`` diffusers runs the branches one after the other."""
        images = pipeline(
            prompt=prompts,
            height=config.height,
            width=config.width,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            negative_prompt=[""] * len(prompts) if config.cfg > 1 else None,
            true_cfg_scale=config.cfg,
            latents=self.pack(noise).to(pipeline.text_encoder_2.dtype),
            max_sequence_length=config.text_tokens,
            output_type="np",
        ).images
        return to_uint8(images)


FAMILIES = [FluxFamily()]
