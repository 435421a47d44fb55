"""DiT (noise prediction) and SiT (velocity): pictures of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    ModelMixin,
)
from jaxtyping import Float, Int64
from torch import Tensor

from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.family import (
    Family,
    ObjectiveKind,
    Prompts,
    SampleConfig,
    SampleSize,
    complete,
    to_uint8,
    with_parts,
)
from dydit_scale.models.pipelines import DyDiTPipeline, SiTPipeline, dit_scheduler
from dydit_scale.models.sit_scheduler import SAMPLERS, SiTScheduler
from dydit_scale.models.small import small_class_pipeline


def class_labels(pipeline: Any, prompts: Prompts, classes: int) -> Int64[Tensor, " batch"]:
    """Classes of a batch, ``classes`` for none: the labels, or the captions as names or numbers of classes.

    Raises ValueError for a caption that is neither.
    """
    if prompts.labels is not None:
        wrong = prompts.labels[prompts.labels >= classes].tolist()
        if wrong:
            raise ValueError(f"label {wrong[0]}: the model knows the classes 0 to {classes - 1}")
        return torch.where(prompts.labels < 0, classes, prompts.labels)
    labels = []
    for caption in prompts.captions:
        if not caption:
            labels.append(classes)
        elif caption.isdecimal() and int(caption) < classes:
            labels.append(int(caption))
        else:
            labels += pipeline.get_label_ids(caption)
    return torch.tensor(labels, dtype=torch.long)


class DiTFamily(Family):
    """DyDiTPipeline. The static model, too, is trained in our class, which has one embedder instead of one a block."""

    name = "dit"
    pipeline_class = DyDiTPipeline
    also_reads: ClassVar[tuple[str, ...]] = ("DiTPipeline",)
    static_class = DiTTransformer2DModel
    dynamic_class = DyDiTTransformer2DModel
    objective: ClassVar[ObjectiveKind] = "ddpm"
    reads_text = False
    samplers = ("ddpm", "ddim", "dpm++")

    def small_pipeline(self, words: Sequence[str], *, seed: int = 0) -> DiffusionPipeline:
        """Of the family's own name."""
        return small_class_pipeline(words, kind=self.name, seed=seed)

    def latent_shape(self, pipeline: Any, size: SampleSize) -> tuple[int, ...]:
        """[channels, rows, cols]."""
        (rows, cols), config = self.token_grid(pipeline, size), pipeline.transformer.config
        return (config["in_channels"], rows * config["patch_size"], cols * config["patch_size"])

    def conditions(self, pipeline: Any, prompts: Prompts, size: SampleSize) -> dict[str, Tensor]:
        """Labels; they are dropped here or in the data, not a second time in the model."""
        classes = self._classes(pipeline)
        labels = class_labels(pipeline, prompts, classes).to(pipeline.vae.device)
        return {"class_labels": labels, "drop_labels": torch.zeros_like(labels, dtype=torch.bool)}

    def trainable(self, static: ModelMixin) -> ModelMixin:
        """With one embedder."""
        return complete(static, self.dynamic_class)

    def timesteps(self, pipeline: Any, config: SampleConfig) -> Float[Tensor, " steps"]:
        """DiT: 999 (noise) .. 0. SiT: 0 (noise) .. 1, each call of Heun's."""
        return self._sampling(pipeline, config).transformer_timesteps(config.steps)

    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        noise: Tensor,
        generators: list[torch.Generator],
        config: SampleConfig,
    ) -> np.ndarray:
        """Prompts are names or numbers of classes; guidance on all channels."""
        out = self._sampling(pipeline, config)(
            class_labels(pipeline, Prompts(captions=prompts), self._classes(pipeline)),
            num_inference_steps=config.steps,
            guidance_scale=config.cfg,
            latents=noise,
            generator=generators,
            output_type="np",
        )
        return to_uint8(np.stack(list(out.images)))

    def num_classes(self, config: Mapping[str, Any]) -> int | None:
        """Without the null class."""
        return config["num_embeds_ada_norm"]

    def pipeline_of(self, transformer: Any, parts: str) -> DiffusionPipeline:
        """``parts``: an autoencoder (AutoencoderKL), or a pipeline that has one."""
        try:
            AutoencoderKL.load_config(parts, subfolder="vae")
            subfolder = "vae"
        except OSError:
            subfolder = None
        vae = AutoencoderKL.from_pretrained(parts, subfolder=subfolder, dtype=transformer.dtype)
        pipeline_class: Any = self.pipeline_class
        return pipeline_class(transformer, vae, self._scheduler(transformer.config, self.samplers[0]))

    def _sampling(self, pipeline: Any, config: SampleConfig) -> Any:
        if config.sampler is None:
            return pipeline
        return with_parts(pipeline, scheduler=self._scheduler(pipeline.transformer.config, config.sampler))

    def _classes(self, pipeline: Any) -> int:
        """A model of clips without classes is given its label 0."""
        return self.num_classes(pipeline.transformer.config) or 1

    def _scheduler(self, model: Mapping[str, Any], name: str) -> Any:
        if name == "ddpm":
            return dit_scheduler(learned_variance=model["out_channels"] == 2 * model["in_channels"])
        kinds = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
        return kinds[name].from_config(dit_scheduler(learned_variance=False).config)


class SiTFamily(DiTFamily):
    """SiTPipeline: DiT's network, from noise at t = 0 to the picture at 1."""

    name = "sit"
    pipeline_class = SiTPipeline
    also_reads = ()
    objective = "flow_data_last"
    samplers = SAMPLERS

    def _scheduler(self, model: Mapping[str, Any], name: str) -> Any:
        return SiTScheduler(sampler=name)


FAMILIES = [DiTFamily(), SiTFamily()]
