"""What a batch is trained on: rectified flow, a second target for the dynamic model, and the budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.adapters.td_lora import adapters_off
from dydit_scale.data.loader import Batch
from dydit_scale.diffusion.flow import interpolate, per_sample_mse, sample_noise, velocity
from dydit_scale.diffusion.randomness import keyed_generator
from dydit_scale.diffusion.timesteps import logit_normal, stratified_uniform
from dydit_scale.dynamic.gates import logistic_noise
from dydit_scale.dynamic.masks import DynamicMasks, GateMode, GateNoise
from dydit_scale.models.encoders import encode_pictures, image_ids, pack_latents
from dydit_scale.train.recipe import Recipe


class Inputs(NamedTuple):
    """A batch as the transformer takes it."""

    noisy: Float[Tensor, "batch tokens channels"]
    target: Float[Tensor, "batch tokens channels"]
    s: Float[Tensor, " batch"]
    """Noise levels in fp32, which are FLUX's timesteps."""
    conditions: dict[str, Tensor]
    """Text, positions and guidance, by argument name."""


class Terms(NamedTuple):
    """Losses of each sample, not yet reduced."""

    flow: Float[Tensor, " batch"]
    supervision: Float[Tensor, " batch"]
    ratio: Float[Tensor, " batch"]
    """MACs dynamic / static."""


class Objective:
    """Turns batches into losses. ``network`` answers for attributes; forwards go through the ``module`` of each
    call."""

    def __init__(
        self, recipe: Recipe, network: Any, pipeline: FluxPipeline, teacher: nn.Module | None, device: torch.device
    ) -> None:
        self.recipe, self.network, self.pipeline, self.device = recipe, network, pipeline, device
        self.teacher = None if teacher is None else teacher.to(device)
        self.is_dynamic = recipe.dynamic is not None

    @torch.no_grad()
    def prepare(self, batch: Batch, s: Float[Tensor, " batch"], seed: int) -> Inputs:
        """Encode pictures and captions and add noise; random draws depend on the seed and the samples' positions
        alone."""
        shape = self._latent_shape()
        posterior = sample_noise(seed, batch.positions, shape, "posterior").to(self.device)
        z = encode_pictures(self.pipeline.vae, batch.pixels.to(self.device), posterior)
        noise = pack_latents(sample_noise(seed, batch.positions, shape)).to(self.device)
        x0, s = pack_latents(z), s.to(self.device)
        text, pooled, text_ids = self.pipeline.encode_prompt(
            prompt=list(batch.captions),
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.recipe.model.text_tokens,
        )
        conditions = {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "txt_ids": text_ids,
            "img_ids": image_ids(shape[1] // 2, shape[2] // 2).to(self.device),
        }
        if self.network.config["guidance_embeds"]:
            conditions["guidance"] = torch.full_like(s, self.recipe.model.guidance)
        return Inputs(interpolate(x0, noise, s), velocity(x0, noise), s, conditions)

    def training_levels(self, step: int, places: Tensor) -> Float[Tensor, " batch"]:
        """Noise levels for the given places in the global batch of a step."""
        flow = self.recipe.flow
        u = stratified_uniform(self.recipe.seed, step, places)
        return logit_normal(u, mean=flow.mean, std=flow.std, shift=flow.shift)

    def gate_noise(self, positions: Tensor, image_tokens: int) -> GateNoise:
        """Noise of the gates, a function of (seed, position)."""
        blocks = len(self.network.dynamic_blocks())
        heads = self.network.config["num_attention_heads"]
        shapes = [(blocks, heads), (blocks, self.network.dynamic.mlp_groups or heads), (blocks, image_tokens)]
        rows = []
        for position in positions.tolist():
            generator = keyed_generator(self.recipe.seed, "gates", position)
            rows.append([logistic_noise(torch.rand(shape, generator=generator)) for shape in shapes])
        return GateNoise(*(torch.stack(kind, dim=1).to(self.device) for kind in zip(*rows, strict=True)))

    def terms(self, module: nn.Module, inputs: Inputs, positions: Tensor, step: int) -> Terms:
        """The losses of a training batch."""
        if not self.is_dynamic:
            sample = self._forward(module, inputs)
            flow = per_sample_mse(sample, inputs.target)
            return Terms(flow, torch.zeros_like(flow), torch.ones_like(flow))
        noise = self.gate_noise(positions, inputs.noisy.shape[1])
        sample, masks = self.forward_dynamic(module, inputs, noise)
        return Terms(
            per_sample_mse(sample, inputs.target),
            self._supervision(module, inputs, sample, step),
            self.ratio(inputs, masks),
        )

    def forward_dynamic(self, module: nn.Module, inputs: Inputs, gates: GateMode) -> tuple[Tensor, DynamicMasks]:
        """Prediction and masks."""
        out = module(hidden_states=inputs.noisy, timestep=inputs.s, gates=gates, collect=True, **inputs.conditions)
        return out.sample, out.masks

    def predict(self, module: nn.Module, inputs: Inputs) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Prediction and cost ratio as at inference."""
        if not self.is_dynamic:
            return self._forward(module, inputs), torch.ones_like(inputs.s)
        sample, masks = self.forward_dynamic(module, inputs, "threshold")
        return sample, self.ratio(inputs, masks)

    def ratio(self, inputs: Inputs, masks: DynamicMasks) -> Float[Tensor, " batch"]:
        """MACs dynamic / static of each sample."""
        return self.network.cost(inputs.noisy.shape[1], inputs.conditions["txt_ids"].shape[0]).ratio(masks)

    def _supervision(self, module: nn.Module, inputs: Inputs, sample: Tensor, step: int) -> Float[Tensor, " batch"]:
        config = self.recipe.supervision
        if config.kind == "none" or (config.steps is not None and step >= config.steps):
            return torch.zeros_like(inputs.s)
        if config.kind == "complete":
            return per_sample_mse(self._forward(module, inputs, gates="open"), inputs.target)
        if config.kind == "distill":
            return per_sample_mse(sample, self._teach(module, inputs))
        raise ValueError(f"supervision.kind: {config.kind!r}")

    @torch.no_grad()
    def _teach(self, module: nn.Module, inputs: Inputs) -> Tensor:
        if self.teacher is not None:
            return self._forward(self.teacher, inputs)
        with adapters_off(self.network):
            return self._forward(module, inputs, gates="open")

    def _forward(self, module: nn.Module, inputs: Inputs, **options: Any) -> Tensor:
        out = module(hidden_states=inputs.noisy, timestep=inputs.s, return_dict=False, **inputs.conditions, **options)
        return out[0]

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.recipe.data.image_size // self.pipeline.vae_scale_factor
        return (self.network.config["in_channels"] // 4, side, side)
