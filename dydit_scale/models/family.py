"""What training and sampling need to know of a kind of pipeline; a family of models is one object of this class."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.encoders import Posterior, draw_latents, posterior_of

ObjectiveKind = Literal["flow", "flow_data_last", "ddpm"]


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Pixels of a sample."""

    height: int
    """Rows of the picture."""
    width: int
    """Its columns."""
    frames: int = 1
    """More than 1 is a video."""
    images: int = 0
    """Single pictures beside each clip (joint training on video and images)."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How pictures and videos are drawn."""

    steps: int = 28
    """Steps of the sampler."""
    height: int = 1024
    """Of a picture, in pixels."""
    width: int = 1024
    """Of a picture, in pixels; other than the height for families that make rectangles."""
    frames: int = 1
    """Frames of a video."""
    guidance: float = 3.5
    """Distilled guidance, for models that take it."""
    cfg: float = 1.0
    """Classifier-free guidance against no prompt or no class, for models that were not distilled; 1 is off, more
    doubles the cost."""
    text_tokens: int = 512
    """Length to which T5 pads prompts."""
    sampler: str | None = None
    """One of the family's samplers; None takes the pipeline's own scheduler."""
    batch: int = 64
    """Pictures at a time."""
    seed: int = 0
    """Seed of the noise."""

    @property
    def size(self) -> SampleSize:
        """Of what is drawn."""
        return SampleSize(height=self.height, width=self.width, frames=self.frames)

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "frames", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling: {name} must be 1 or more; got {getattr(self, name)}")
        if self.cfg < 1:
            raise ValueError(f"sampling: cfg must be 1 (off) or more; got {self.cfg}")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a batch shows."""

    captions: Sequence[str]
    """"" for none."""
    labels: Int64[Tensor, " batch"] | None = None
    """Classes, -1 for none; without them class-conditional families look captions up among their names."""
    picture_captions: Sequence[Sequence[str]] = ()
    """[batch][images], of the single pictures beside clips."""
    picture_labels: Int64[Tensor, "batch images"] | None = None
    """Of the single pictures beside clips."""
    text_tokens: int = 512
    """Length to which captions are padded."""
    guidance: float = 1.0
    """Distilled guidance, where the model has an embedder for it."""
    text: Mapping[str, Tensor] | None = None
    """What ``Family.embed`` made of ``all_captions`` before; None to make it now."""

    @property
    def all_captions(self) -> list[str]:
        """Each clip's or picture's caption, and behind it those of the pictures beside the clip."""
        pictures = self.picture_captions or [()] * len(self.captions)
        return [c for first, others in zip(self.captions, pictures, strict=True) for c in (first, *others)]


class Family(ABC):
    """A kind of pipeline around a dynamic transformer. To add a model, write one in a module of ``models.families``.

    Latents are what the autoencoder makes and noise is drawn for; ``pack`` turns them into what the transformer takes.
    """

    name: ClassVar[str]
    """Of the family, on the command line."""
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """Its name in a folder's model_index.json is how the family is found."""
    also_reads: ClassVar[tuple[str, ...]] = ()
    """Other pipelines, by name, whose folders ``pipeline_class`` loads as well."""
    static_class: ClassVar[type[ModelMixin]]
    dynamic_class: ClassVar[type[DynamicModelMixin]]
    objective: ClassVar[ObjectiveKind] = "flow"
    """What the transformer learns; ``flow_data_last`` is SiT's direction, from noise at 0 to data at 1."""
    reads_text: ClassVar[bool] = True
    """False for class-conditional models, whose prompts are names or numbers of classes."""
    makes_videos: ClassVar[bool] = False
    """Clips, of the lengths in ``clip_lengths``; pictures otherwise."""
    any_size: ClassVar[bool] = False
    """Whether pictures may be rectangles, and of several sizes in one training. False where the model knows its tokens
    by a table of positions that was made for squares of one size."""
    samplers: ClassVar[tuple[str, ...]] = ()
    """What ``SampleConfig.sampler`` may be, besides None."""
    guidance_layout: ClassVar[Literal["in_turn", "prompts_first", "prompts_last"]] = "prompts_first"
    """Under classifier-free guidance: a forward with the prompts, then one without, or both halves of one batch."""

    @abstractmethod
    def small_pipeline(self, words: Sequence[str], *, seed: int = 0) -> DiffusionPipeline:
        """Random weights at toy size, for captions of ``words``, or for classes that are called so."""

    @abstractmethod
    def latent_shape(self, pipeline: Any, size: SampleSize) -> tuple[int, ...]:
        """Shape of one sample's latents and noise.

        Raises ValueError as :meth:`token_grid` does.
        """

    @abstractmethod
    def conditions(self, pipeline: Any, prompts: Prompts, size: SampleSize) -> dict[str, Tensor]:
        """The transformer's other arguments, on the pipeline's device, by name."""

    @abstractmethod
    def timesteps(self, pipeline: Any, config: SampleConfig) -> Float[Tensor, " steps"]:
        """The timesteps at which the pipeline will call its transformer, as passed to it."""

    @abstractmethod
    def draw(
        self,
        pipeline: Any,
        prompts: list[str],
        noise: Tensor,
        generators: list[torch.Generator],
        config: SampleConfig,
    ) -> np.ndarray:
        """Pictures uint8 [batch, height, width, 3], or videos [batch, frames, height, width, 3].

        Args:
            noise: latents to start from.
            generators: one for each picture, for samplers that add noise on the way.
        """

    def token_side(self, pipeline: Any) -> int:
        """Pixels along a side of the square that one token covers."""
        return pipeline.vae_scale_factor * pipeline.transformer.config["patch_size"]

    def token_grid(self, pipeline: Any, size: SampleSize) -> tuple[int, int]:
        """Rows and columns of a picture's tokens.

        Raises ValueError if they are not whole, or for a rectangle where the family makes squares alone.
        """
        side = self.token_side(pipeline)
        for name, pixels in (("height", size.height), ("width", size.width)):
            if pixels % side:
                raise ValueError(
                    f"picture {name} {pixels}: expected a multiple of {side} pixels, the side of one token"
                )
        if size.height != size.width and not self.any_size:
            raise ValueError(
                f"picture of height {size.height} and width {size.width}: {self.pipeline_class.__name__} makes squares "
                "alone; choose one number for both"
            )
        return size.height // side, size.width // side

    def image_tokens(self, pipeline: Any, size: SampleSize) -> int:
        """Tokens of one sample that token routers decide about; ValueError as :meth:`token_grid`."""
        rows, cols = self.token_grid(pipeline, size)
        return rows * cols

    def clip_lengths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Frames of what a transformer with this config learns from, first of what it draws; 1 is a picture."""
        return (1,)

    def num_classes(self, config: Mapping[str, Any]) -> int | None:
        """Classes that a transformer with this config knows; None if it has none."""
        return None

    def pipeline_of(self, transformer: Any, parts: str) -> DiffusionPipeline:
        """A whole pipeline around a transformer, its other parts, in the same dtype, from a folder or hub name: a
        pipeline's.

        Raises OSError or ValueError if there are none.
        """
        pipeline = self.pipeline_class.from_pretrained(parts, transformer=None, dtype=transformer.dtype)
        pipeline.register_modules(transformer=transformer)
        return pipeline

    def posterior(self, pipeline: Any, pixels: Tensor) -> Posterior:
        """The distribution [batch, channels, rows, cols] of pictures, or [batch, frames, channels, rows, cols] of
        videos, frame by frame."""
        if pixels.ndim == 4:
            return posterior_of(pipeline.vae, pixels)
        mean, std = posterior_of(pipeline.vae, pixels.flatten(0, 1))
        batch = pixels.shape[:2]
        return Posterior(mean.unflatten(0, batch), None if std is None else std.unflatten(0, batch))

    def latents(self, pipeline: Any, posterior: Posterior, noise: Tensor) -> Tensor:
        """Latents [batch, channels, *frames, rows, cols], drawn by ``noise`` of the same shape; to a family of videos
        a picture is one of a single frame."""
        mean, std = posterior
        if self.makes_videos and mean.ndim == 4:
            mean, std = mean[:, None], None if std is None else std[:, None]
        if mean.ndim == 5:
            posterior = Posterior(mean.transpose(1, 2), None if std is None else std.transpose(1, 2))
        return draw_latents(pipeline.vae, posterior, noise)

    def embed(self, pipeline: Any, captions: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
        """Embeddings of captions by name, each [captions, ...], on the pipeline's device; none for classes.

        ``text`` [captions, tokens, dim] is that of their tokens. Where there is a ``mask`` [captions, tokens] of ones
        and then zeros, what ``text`` holds behind the ones has no influence.
        """
        return {}

    def text_shapes(self, config: Mapping[str, Any], text_tokens: int) -> dict[str, tuple[int, ...]]:
        """Of what :meth:`embed` gives for one caption, by name, for a transformer with this config."""
        return {}

    def embedded(self, pipeline: Any, prompts: Prompts) -> dict[str, Tensor]:
        """What :meth:`embed` makes of all captions of a batch, unless the prompts bring it."""
        if prompts.text is not None:
            return dict(prompts.text)
        return self.embed(pipeline, prompts.all_captions, prompts.text_tokens)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as the transformer takes them."""
        return latents

    def cost(self, network: Any, pipeline: Any, size: SampleSize, text_tokens: int) -> ModelCost:
        """MACs of one forward for one sample; ``text_tokens`` counts for families that read text."""
        return network.cost(self.image_tokens(pipeline, size), text_tokens if self.reads_text else 0)

    def trainable(self, static: ModelMixin) -> ModelMixin:
        """The static model in the form that it is trained and sampled in: itself, or the dynamic class with nothing
        dynamic in it, where that can what the static class cannot."""
        return static


def complete(static: Any, dynamic_class: Any) -> Any:
    """The static model in the dynamic class, with nothing dynamic in it."""
    if isinstance(static, dynamic_class):
        return static
    return dynamic_class.from_static(static, DynamicConfig(heads=False, mlp=False, tokens=False))


def frozen_parts(pipeline: Any) -> list[nn.Module]:
    """The networks around the transformer: autoencoder and text encoders."""
    parts = pipeline.components.items()
    return [part for name, part in parts if isinstance(part, nn.Module) and name != "transformer"]


def with_parts(pipeline: Any, **parts: Any) -> Any:
    """The same pipeline, sharing everything, with another transformer or scheduler."""
    other = copy.copy(pipeline)
    other.register_modules(**parts)
    return other


def scheduler_timesteps(pipeline: Any, steps: int) -> Float[Tensor, " steps"]:
    """As the pipeline's own scheduler spaces them."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float()


def to_uint8(pictures: Any) -> np.ndarray:
    """Pictures in 0..1 as bytes."""
    pictures = pictures.float().cpu().numpy() if isinstance(pictures, torch.Tensor) else np.asarray(pictures)
    return np.round(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
