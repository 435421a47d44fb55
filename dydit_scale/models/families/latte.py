"""Latte: videos of classes (or of none), and Latte-1, text to video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LattePipeline, LatteTransformer3DModel, ModelMixin
from jaxtyping import Float
from torch import Tensor

from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.models.class_latte import ClassLatteTransformer3DModel
from dydit_scale.models.dy_class_latte import DyClassLatteTransformer3DModel
from dydit_scale.models.families.dit import DiTFamily, class_labels
from dydit_scale.models.family import (
    Family,
    Prompts,
    SampleConfig,
    SampleSize,
    complete,
    scheduler_timesteps,
    to_uint8,
)
from dydit_scale.models.latte import DyLatteTransformer3DModel
from dydit_scale.models.pipelines import ClassLattePipeline
from dydit_scale.models.small import small_class_latte_pipeline, small_latte_pipeline

LATTE_TEXT_TOKENS = 120
"""Length to which LattePipeline pads prompts, whatever the recipe says."""


def _frames(family: Family, pipeline: Any, size: SampleSize) -> int:
    """Entries of the frame axis; ValueError for a clip of a length that the model does not know."""
    known = family.clip_lengths(pipeline.transformer.config)
    if size.frames not in known:
        raise ValueError(f"frames {size.frames}: the model makes clips of {known[0]}; set data.frames to that")
    return size.frames + size.images


class ClassLatteFamily(DiTFamily):
    """ClassLattePipeline; prompts are classes, and anything at all for a model without them."""

    name = "latte-classes"
    pipeline_class = ClassLattePipeline
    also_reads = ()
    static_class = ClassLatteTransformer3DModel
    dynamic_class = DyClassLatteTransformer3DModel
    makes_videos = True

    def small_pipeline(self, words: Sequence[str], *, seed: int = 0) -> DiffusionPipeline:
        """Clips of eight frames."""
        return small_class_latte_pipeline(words, seed=seed)

    def latent_shape(self, pipeline: Any, size: SampleSize) -> tuple[int, ...]:
        """[channels, frames and pictures, rows, cols]."""
        channels, *picture = super().latent_shape(pipeline, size)
        return (channels, _frames(self, pipeline, size), *picture)

    def image_tokens(self, pipeline: Any, size: SampleSize) -> int:
        """Patches of all frames and pictures."""
        return _frames(self, pipeline, size) * super().image_tokens(pipeline, size)

    def conditions(self, pipeline: Any, prompts: Prompts, size: SampleSize) -> dict[str, Any]:
        """Labels of clip and pictures, where the model has classes."""
        conditions: dict[str, Any] = {"images": size.images} if size.images else {}
        classes = self.num_classes(pipeline.transformer.config)
        if classes is None:
            return conditions
        labels = class_labels(pipeline, prompts, classes)
        if size.images:
            captions = [caption for row in prompts.picture_captions for caption in row]
            given = None if prompts.picture_labels is None else prompts.picture_labels.flatten()
            pictures = class_labels(pipeline, Prompts(captions=captions, labels=given), classes)
            labels = torch.cat([labels[:, None], pictures.reshape(len(labels), size.images)], dim=1)
        labels = labels.to(pipeline.vae.device)
        return {**conditions, "class_labels": labels, "drop_labels": torch.zeros_like(labels, dtype=torch.bool)}

    def trainable(self, static: ModelMixin) -> ModelMixin:
        """Itself."""
        return static

    def cost(self, network: Any, pipeline: Any, size: SampleSize, text_tokens: int) -> ModelCost:
        """Of one clip with its pictures."""
        return network.cost(self.image_tokens(pipeline, size), frames=size.frames, images=size.images)

    def clip_lengths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """One; pictures are learnt beside clips alone."""
        return (config["video_length"],)

    def num_classes(self, config: Mapping[str, Any]) -> int | None:
        """None for a model of clips without classes."""
        return config["num_classes"]

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        noise: Tensor,
        generators: list[torch.Generator],
        config: SampleConfig,
    ) -> np.ndarray:
        """Prompts are names or numbers of classes; a model without classes takes its label 0 whatever they say."""
        known = prompts if self.num_classes(pipeline.transformer.config) else ["0"] * len(prompts)
        return super().draw(pipeline, known, noise, generators, config)


class LatteFamily(Family):
    """LattePipeline; the prompt goes through T5."""

    name = "latte"
    pipeline_class = LattePipeline
    static_class = LatteTransformer3DModel
    dynamic_class = DyLatteTransformer3DModel
    makes_videos = True
    objective = "ddpm"
    guidance_layout = "prompts_last"

    def small_pipeline(self, words: Sequence[str], *, seed: int = 0) -> DiffusionPipeline:
        """Clips of eight frames."""
        return small_latte_pipeline(words, seed=seed)

    def latent_shape(self, pipeline: Any, size: SampleSize) -> tuple[int, ...]:
        """[channels, frames and pictures, rows, cols]."""
        (rows, cols), config = self.token_grid(pipeline, size), pipeline.transformer.config
        patch = config["patch_size"]
        return (config["in_channels"], _frames(self, pipeline, size), rows * patch, cols * patch)

    def image_tokens(self, pipeline: Any, size: SampleSize) -> int:
        """Patches of all frames and pictures."""
        return _frames(self, pipeline, size) * super().image_tokens(pipeline, size)

    def embed(self, pipeline: Any, captions: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
        """As LattePipeline encodes a batch, at its own length: zeros behind the caption's end."""
        inputs = pipeline.tokenizer(
            list(captions), padding="max_length", max_length=LATTE_TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        device = pipeline.text_encoder.device
        mask = inputs.attention_mask.to(device)
        text = pipeline.text_encoder(inputs.input_ids.to(device), attention_mask=mask)[0]
        return {"text": text * mask[..., None].to(text), "mask": mask}

    def text_shapes(self, config: Mapping[str, Any], text_tokens: int) -> dict[str, tuple[int, ...]]:
        """At the length of LattePipeline."""
        return {"text": (LATTE_TEXT_TOKENS, config["caption_channels"]), "mask": (LATTE_TEXT_TOKENS,)}

    def conditions(self, pipeline: Any, prompts: Prompts, size: SampleSize) -> dict[str, Any]:
        """The text of the clip, and of the pictures beside it."""
        text = self.embedded(pipeline, prompts)["text"]
        if not size.images:
            return {"encoder_hidden_states": text}
        return {"encoder_hidden_states": text.unflatten(0, (-1, 1 + size.images)), "images": size.images}

    def trainable(self, static: ModelMixin) -> ModelMixin:
        """Able to see pictures beside the clip."""
        return complete(static, self.dynamic_class)

    def timesteps(self, pipeline: Any, config: SampleConfig) -> Float[Tensor, " steps"]:
        """999 (noise) .. 0."""
        return scheduler_timesteps(pipeline, config.steps)

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        noise: Tensor,
        generators: list[torch.Generator],
        config: SampleConfig,
    ) -> np.ndarray:
        """Through LattePipeline, whose scheduler must not ask for the learned variance."""
        text, none = (self.embed(pipeline, p, LATTE_TEXT_TOKENS)["text"] for p in (prompts, [""] * len(prompts)))
        frames = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=none,
            negative_prompt=None,
            video_length=config.frames,
            height=config.height,
            width=config.width,
            num_inference_steps=config.steps,
            guidance_scale=config.cfg,
            generator=generators,
            latents=noise.to(pipeline.vae.dtype),
            clean_caption=False,
            output_type="np",
        ).frames
        return to_uint8(frames)

    def cost(self, network: Any, pipeline: Any, size: SampleSize, text_tokens: int) -> ModelCost:
        """Of one clip with its pictures."""
        tokens = self.image_tokens(pipeline, size)
        return network.cost(tokens, LATTE_TEXT_TOKENS, frames=size.frames, images=size.images)

    def clip_lengths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Single pictures too, on which temporal blocks run as on a clip of one frame."""
        return (config["video_length"], 1)


FAMILIES = [ClassLatteFamily(), LatteFamily()]
