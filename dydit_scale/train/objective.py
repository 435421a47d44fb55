"""What a batch is trained on: the diffusion process, a second target for the dynamic model, and the budget."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dydit_scale.adapters.td_lora import adapters_off
from dydit_scale.data.loader import Batch
from dydit_scale.diffusion.flow import per_sample_mse, sample_noise
from dydit_scale.diffusion.process import DDPMProcess, FlowProcess, Process
from dydit_scale.diffusion.randomness import keyed_generator
from dydit_scale.diffusion.timesteps import stratified_uniform
from dydit_scale.dynamic.gates import logistic_noise
from dydit_scale.dynamic.masks import DynamicMasks, FrozenGates, GateMode, GateNoise, SubNetwork
from dydit_scale.models.encoders import Posterior
from dydit_scale.models.family import Family, Prompts, SampleSize
from dydit_scale.models.registry import family_of
from dydit_scale.train.encoded import EncodedInputs
from dydit_scale.train.recipe import Recipe


class Inputs(NamedTuple):
    """A batch as the transformer takes it."""

    x0: Float[Tensor, "batch *latent"]
    noise: Float[Tensor, "batch *latent"]
    noisy: Float[Tensor, "batch *latent"]
    level: Shaped[Tensor, " batch"]
    """As the diffusion process counts; flow: noise levels s in fp32."""
    arguments: dict[str, Any]
    """The transformer's arguments by name, the noisy pictures and timesteps included."""
    size: SampleSize
    """Of each sample, in pixels."""
    text_tokens: int


class Terms(NamedTuple):
    """Losses of each sample, not yet reduced."""

    flow: Float[Tensor, " batch"]
    supervision: Float[Tensor, " batch"]
    ratio: Float[Tensor, " batch"]
    """MACs dynamic / static."""
    masks: DynamicMasks | None = None
    """Of the forward; None of a static model."""


def make_process(recipe: Recipe, family: Family) -> Process:
    """The diffusion process that the family's transformers learn, with the recipe's settings."""
    if family.objective == "ddpm":
        return DDPMProcess()
    flow = recipe.flow
    return FlowProcess(
        density=flow.density,
        mean=flow.mean,
        std=flow.std,
        shift=flow.shift,
        data_last=family.objective == "flow_data_last",
    )


class Objective:
    """Turns batches into losses. ``network`` answers for attributes; forwards go through the ``module`` of each
    call."""

    def __init__(
        self,
        recipe: Recipe,
        network: Any,
        pipeline: Any,
        teacher: nn.Module | None,
        device: torch.device,
        encoded: Mapping[int, EncodedInputs] | None = None,
    ) -> None:
        """``encoded`` is for batches that come encoded, by their source."""
        self.recipe, self.network, self.pipeline, self.device = recipe, network, pipeline, device
        self.family = family_of(pipeline)
        self.process = make_process(recipe, self.family)
        self.encoded = encoded or {}
        self.teacher = None if teacher is None else teacher.to(device)
        self.is_dynamic = recipe.dynamic is not None
        self.guided = recipe.supervision.guidance > 1
        self.cost = cache(partial(self.family.cost, network, pipeline))  # of a size and a number of text tokens

    @torch.no_grad()
    def prepare(self, batch: Batch, level: Shaped[Tensor, " batch"], seed: int, *, unprompted: bool = False) -> Inputs:
        """Encode pictures and captions and add noise; random draws depend on the seed, the samples' positions and
        their size in pixels alone.

        Args:
            unprompted: let the batch follow a second time, the same but for its prompts, which it has none.
        """
        family, pipeline, model = self.family, self.pipeline, self.recipe.model
        stride = 1 if batch.encoded is None else self.encoded[batch.source].stride
        size = size_of(batch, stride)
        shape = family.latent_shape(pipeline, size)
        posterior = sample_noise(seed, batch.positions, shape, "posterior").to(self.device)
        x0 = family.pack(family.latents(pipeline, self._posterior(batch), posterior))
        noise = family.pack(sample_noise(seed, batch.positions, shape)).to(self.device)
        level = level.to(self.device)
        if unprompted:
            batch = _with_unprompted(batch)
            x0, noise, level = torch.cat([x0, x0]), torch.cat([noise, noise]), torch.cat([level, level])
        noisy = self.process.noisy(x0, noise, level)
        prompts = Prompts(
            captions=batch.captions,
            labels=batch.labels,
            picture_captions=batch.picture_captions,
            picture_labels=batch.picture_labels,
            text_tokens=model.text_tokens,
            guidance=model.guidance,
        )
        if batch.encoded is not None:
            text = self.encoded[batch.source].text(batch.encoded, prompts.all_captions, self.device, pipeline.vae.dtype)
            prompts = replace(prompts, text=text)
        conditions = family.conditions(pipeline, prompts, size)
        arguments = {
            "hidden_states": noisy,
            "timestep": self.process.timestep(level),
            **{n: c.to(self.device) if isinstance(c, Tensor) else c for n, c in conditions.items()},
        }
        return Inputs(x0, noise, noisy, level, arguments, size, model.text_tokens)

    def _posterior(self, batch: Batch) -> Posterior:
        if batch.encoded is None:
            assert batch.pixels is not None, "a batch has pixels or comes encoded"
            return self.family.posterior(self.pipeline, batch.pixels.to(self.device))
        return self.encoded[batch.source].posterior(batch.encoded, self.device)

    def training_levels(self, step: int, places: Tensor) -> Shaped[Tensor, " batch"]:
        """Noise levels for the given places in the global batch of a step."""
        return self.process.training_levels(stratified_uniform(self.recipe.seed, step, places))

    def gate_noise(self, positions: Tensor, size: SampleSize) -> GateNoise:
        """Noise of the gates for samples of ``size``, a function of (seed, position)."""
        tokens = self.family.image_tokens(self.pipeline, size)
        return draw_gate_noise(self.network, self.recipe.seed, positions, tokens, self.device)

    def terms(
        self, module: nn.Module, inputs: Inputs, positions: Tensor, step: int, network: SubNetwork | None = None
    ) -> Terms:
        """The losses of a training batch; all of it runs ``network``, where one is given."""
        if not self.is_dynamic:
            flow = self._loss(self._forward(module, inputs), inputs)
            return Terms(flow, torch.zeros_like(flow), torch.ones_like(flow))
        copies = len(inputs.level) // len(positions)  # two where the batch follows again without prompts
        sample, masks = self.forward_dynamic(module, inputs, self._gates(inputs, positions, copies, network))
        flow, ratio = self._loss(sample, inputs), self.ratio(inputs, masks)
        return Terms(
            flow.unflatten(0, (copies, -1)).mean(0),
            self._supervision(module, inputs, sample, step).unflatten(0, (copies, -1)).mean(0),
            ratio.unflatten(0, (copies, -1)).mean(0),
            masks,
        )

    def _gates(self, inputs: Inputs, positions: Tensor, copies: int, network: SubNetwork | None) -> GateMode:
        if network is not None and self.recipe.frozen_routers.tokens:
            return FrozenGates(network)
        noise = GateNoise(*(n.repeat(1, copies, 1) for n in self.gate_noise(positions, inputs.size)))
        return noise if network is None else FrozenGates(network, noise.tokens)

    def forward_dynamic(self, module: nn.Module, inputs: Inputs, gates: GateMode) -> tuple[Tensor, DynamicMasks]:
        """Prediction and masks."""
        out = module(gates=gates, collect=True, **inputs.arguments)
        return self.process.answer(out.sample, inputs.x0), out.masks

    def predict(self, module: nn.Module, inputs: Inputs) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Prediction and cost ratio as at inference."""
        if not self.is_dynamic:
            return self._forward(module, inputs), torch.ones(len(inputs.level), device=self.device)
        sample, masks = self.forward_dynamic(module, inputs, "threshold")
        return sample, self.ratio(inputs, masks)

    def error(self, sample: Tensor, inputs: Inputs) -> Float[Tensor, " batch"]:
        """Mean squared error of a prediction."""
        return self.process.error(sample, inputs.x0, inputs.noise, inputs.level)

    def ratio(self, inputs: Inputs, masks: DynamicMasks) -> Float[Tensor, " batch"]:
        """MACs dynamic / static of each sample, static at its own size."""
        return self.cost(inputs.size, inputs.text_tokens).ratio(masks)

    def _loss(self, sample: Tensor, inputs: Inputs) -> Float[Tensor, " batch"]:
        return self.process.loss(sample, inputs.x0, inputs.noise, inputs.level)

    def _supervision(self, module: nn.Module, inputs: Inputs, sample: Tensor, step: int) -> Float[Tensor, " batch"]:
        config = self.recipe.supervision
        if config.kind == "none" or (config.steps is not None and step >= config.steps):
            return torch.zeros(len(inputs.level), device=self.device)
        if config.kind == "complete":
            return self._loss(self._forward(module, inputs, gates="open"), inputs)
        if config.kind == "distill":
            teaching = self._teach(module, inputs)
            if not self.guided:
                return per_sample_mse(sample, teaching)
            error = per_sample_mse(*(_under_guidance(x, config.guidance) for x in (sample, teaching)))
            return torch.cat([error, error])
        raise ValueError(f"supervision.kind: {config.kind!r}")

    @torch.no_grad()
    def _teach(self, module: nn.Module, inputs: Inputs) -> Tensor:
        if self.teacher is not None:
            return self._forward(self.teacher, inputs)
        with adapters_off(self.network) if self.recipe.adapter.is_lora else nullcontext():
            return self._forward(module, inputs, gates="open")

    def _forward(self, module: nn.Module, inputs: Inputs, **options: Any) -> Tensor:
        output = module(return_dict=False, **inputs.arguments, **options)[0]
        return self.process.answer(output, inputs.x0)


def _with_unprompted(batch: Batch) -> Batch:
    """The batch, and behind it once more without prompts."""

    def no(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else torch.cat([labels, torch.full_like(labels, -1)])

    nothing = tuple(("",) * len(row) for row in batch.picture_captions)
    return batch._replace(
        captions=(*batch.captions, *[""] * len(batch.captions)),
        labels=no(batch.labels),
        picture_captions=(*batch.picture_captions, *nothing),
        picture_labels=no(batch.picture_labels),
    )


def _under_guidance(answer: Float[Tensor, "twice *latent"], scale: float) -> Float[Tensor, "batch *latent"]:
    """Prompted and unprompted halves of a batch, combined as a sampler combines them."""
    prompted, unprompted = answer.chunk(2)
    return unprompted + scale * (prompted - unprompted)


def size_of(batch: Batch, stride: int = 1) -> SampleSize:
    """Pixels of each sample of a batch, of which an encoded one has a latent for every ``stride``; other batches may
    have others."""
    shown = batch.pixels if batch.encoded is None else batch.encoded.moments
    assert shown is not None, "a batch has pixels or comes encoded"
    images = len(batch.picture_captions[0]) if batch.picture_captions else 0
    frames = shown.shape[1] - images if shown.ndim == 5 else 1
    return SampleSize(height=stride * shown.shape[-2], width=stride * shown.shape[-1], frames=frames, images=images)


def draw_gate_noise(network: Any, seed: int, positions: Tensor, tokens: int, device: torch.device) -> GateNoise:
    """Noise of all gates of ``network`` for samples of so many tokens, a function of (seed, position)."""
    blocks, heads = len(network.dynamic_blocks()), network.config["num_attention_heads"]
    units = (heads, network.dynamic.mlp_groups or heads, tokens)
    drawn = torch.empty(len(positions), blocks * sum(units))
    for row, position in zip(drawn, positions.tolist(), strict=True):
        torch.rand(row.shape, generator=keyed_generator(seed, "gates", position), out=row)
    kinds = logistic_noise(drawn.to(device)).split([blocks * n for n in units], dim=1)
    return GateNoise(*(x.unflatten(1, (blocks, -1)).transpose(0, 1) for x in kinds))


def sample_size(recipe: Recipe) -> SampleSize:
    """Pixels of a sample; with ``data.buckets`` of the square, which stands for all where one number is wanted."""
    data = recipe.data
    return SampleSize(height=data.image_size, width=data.image_size, frames=data.frames, images=data.images_per_clip)
