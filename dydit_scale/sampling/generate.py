"""Pictures from prompts through diffusers' own pipeline; a picture's noise is a function of (seed, its number)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.models.encoders import pack_latents


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How pictures are drawn."""

    steps: int = 28
    """Euler steps."""
    side: int = 1024
    """Pixels of the square picture's side."""
    guidance: float = 3.5
    """Distilled guidance, for models that take it."""
    cfg: float = 1.0
    """Classifier-free guidance with the empty prompt, for models that were not distilled; 1 is off, more doubles the
    cost."""
    text_tokens: int = 512
    """Length to which T5 pads prompts."""
    batch: int = 64
    """Pictures at a time."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"sampling: steps and batch must be 1 or more; got {self.steps} and {self.batch}")
        if self.cfg < 1:
            raise ValueError(f"sampling: cfg must be 1 (off) or more; got {self.cfg}")

    @property
    def forwards(self) -> int:
        """Forwards of the transformer for each batch."""
        return self.steps * (2 if self.cfg > 1 else 1)


def sampler_timesteps(pipe: FluxPipeline, config: SampleConfig) -> Float[Tensor, " steps"]:
    """The timesteps, in 0..1, at which the pipeline will call its transformer."""
    scheduler = copy.deepcopy(pipe.scheduler)
    c = scheduler.config
    mu = calculate_shift(
        image_tokens(pipe, config.side),
        c.get("base_image_seq_len", 256),
        c.get("max_image_seq_len", 4096),
        c.get("base_shift", 0.5),
        c.get("max_shift", 1.15),
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / config.steps, config.steps), mu=mu)
    return scheduler.timesteps.float() / 1000


def image_tokens(pipe: FluxPipeline, side: int) -> int:
    """Image tokens of a square picture.

    Raises ValueError if the side is not a whole number of tokens.
    """
    patch = 2 * pipe.vae_scale_factor
    if side % patch:
        raise ValueError(f"picture side {side}: expected a multiple of {patch} pixels, the side of one token")
    return (side // patch) ** 2


@torch.no_grad()
def generate(
    pipe: FluxPipeline, prompts: Sequence[str], config: SampleConfig, *, first: int = 0, progress: str | None = None
) -> np.ndarray:
    """Pictures of the prompts, uint8 [prompts, side, side, 3].

    Args:
        first: number of the first picture, which its noise depends on.
        progress: label of a progress bar; None shows none.
    """
    pictures = []
    starts = range(0, len(prompts), config.batch)
    bar = tqdm(total=len(prompts), desc=progress, unit="picture", disable=progress is None, dynamic_ncols=True)
    for start in starts:
        part = list(prompts[start : start + config.batch])
        numbers = torch.arange(first + start, first + start + len(part))
        pictures.append(_generate_batch(pipe, part, _noise(pipe, numbers, config), config))
        bar.update(len(part))
    bar.close()
    return np.concatenate(pictures)


def _noise(pipe: FluxPipeline, numbers: Tensor, config: SampleConfig) -> Float[Tensor, "batch tokens channels"]:
    side = config.side // pipe.vae_scale_factor
    return pack_latents(
        sample_noise(config.seed, numbers, (pipe.transformer.config["in_channels"] // 4, side, side), "sample")
    )


def _generate_batch(pipe: FluxPipeline, prompts: list[str], noise: Tensor, config: SampleConfig) -> np.ndarray:
    device = next(pipe.transformer.parameters()).device
    images = pipe(
        prompt=prompts,
        height=config.side,
        width=config.side,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        negative_prompt=[""] * len(prompts) if config.cfg > 1 else None,
        true_cfg_scale=config.cfg,
        latents=noise.to(device, pipe.text_encoder_2.dtype),
        max_sequence_length=config.text_tokens,
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)


@dataclass
class Recording:
    """Masks of every forward inside :func:`recorded`."""

    timesteps: list[float]
    masks: list[DynamicMasks]


@contextmanager
def recorded(transformer: Any) -> Iterator[Recording]:
    """Record the masks of a dynamic transformer while a pipeline runs it."""
    recording = Recording([], [])

    def ask(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        recording.timesteps.append(float(kwargs["timestep"][0]))
        return args, {**kwargs, "collect": True}

    def take(module: Any, args: tuple, out: Any) -> tuple[Tensor]:
        recording.masks.append(DynamicMasks(*(m.cpu() for m in out.masks)))
        return (out.sample,)

    hooks = [transformer.register_forward_pre_hook(ask, with_kwargs=True), transformer.register_forward_hook(take)]
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def picture_grid(pictures: np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """The pictures side by side on a dark sheet, enlarged without smoothing; uint8 [height, width, 3]."""
    n, side = len(pictures), pictures.shape[1]
    rows, cell = -(-n // columns), side + gap
    sheet = np.full((rows * cell + gap, columns * cell + gap, 3), 16, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + (i // columns) * cell, gap + (i % columns) * cell
        sheet[y : y + side, x : x + side] = picture
    return sheet.repeat(scale, 0).repeat(scale, 1)
