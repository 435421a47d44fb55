"""Pictures from prompts through diffusers' own pipeline; a picture's noise is a function of (seed, its number)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.diffusion.randomness import keyed_generator
from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.models.family import Family, SampleConfig
from dydit_scale.models.registry import family_of


def sampler_timesteps(pipe: Any, config: SampleConfig) -> Float[Tensor, " steps"]:
    """The timesteps at which the pipeline will call its transformer, as passed to it (FLUX: in 0..1)."""
    family = family_of(pipe)
    _check_sampler(family, config)
    return family.timesteps(pipe, config)


def forwards(pipe: Any, config: SampleConfig) -> int:
    """Samples that the transformer computes for each picture, both branches of guidance counted."""
    return len(sampler_timesteps(pipe, config)) * (2 if config.cfg > 1 else 1)


@torch.no_grad()
def generate(
    pipe: Any, prompts: Sequence[str], config: SampleConfig, *, first: int = 0, progress: str | None = None
) -> np.ndarray:
    """Pictures of the prompts, uint8 [prompts, height, width, 3], or videos [prompts, frames, height, width, 3].

    Raises ValueError for a sampler or a size that the family does not know.

    Args:
        first: number of the first picture, which its noise depends on.
        progress: label of a progress bar; None shows none.
    """
    family, device = family_of(pipe), next(pipe.transformer.parameters()).device
    _check_sampler(family, config)
    pictures = []
    starts = range(0, len(prompts), config.batch)
    bar = tqdm(total=len(prompts), desc=progress, unit="picture", disable=progress is None, dynamic_ncols=True)
    for start in starts:
        part = list(prompts[start : start + config.batch])
        numbers = torch.arange(first + start, first + start + len(part))
        noise = _noise(pipe, family, numbers, config).to(device)
        generators = [keyed_generator(config.seed, "sampler", number) for number in numbers.tolist()]
        pictures.append(family.draw(pipe, part, noise, generators, config))
        bar.update(len(part))
    bar.close()
    return np.concatenate(pictures)


def _check_sampler(family: Family, config: SampleConfig) -> None:
    if config.sampler is not None and config.sampler not in family.samplers:
        known = f"one of {', '.join(family.samplers)}" if family.samplers else "none: its pipeline's scheduler is used"
        raise ValueError(f"sampler {config.sampler!r}: {family.pipeline_class.__name__} takes {known}")


def _noise(pipe: Any, family: Family, numbers: Tensor, config: SampleConfig) -> Float[Tensor, "batch *latent"]:
    return sample_noise(config.seed, numbers, family.latent_shape(pipe, config.size), "sample")


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


def calibrated_capacity(
    pipe: Any, prompts: Sequence[str], config: SampleConfig, *, multiple: int = 64
) -> TokenCapacity:
    """How many tokens each layer keeps at each step of the sampler above its thresholds, from drawing these prompts
    once; the model is unpacked first."""
    pipe.transformer.unpack()
    with recorded(pipe.transformer) as recording:
        generate(pipe, prompts, config, progress="counting tokens")
    return TokenCapacity.from_masks(recording.timesteps, recording.masks, multiple=multiple)


def picture_grid(pictures: np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """The pictures side by side on a dark sheet, enlarged without smoothing; uint8 [height, width, 3].

    Clips [clips, frames, height, width, 3] get a row each, a column for each frame, whatever ``columns`` says.
    """
    if pictures.ndim == 5:
        columns, pictures = pictures.shape[1], pictures.reshape(-1, *pictures.shape[2:])
    n, height, width, _ = pictures.shape
    down, right = height + gap, width + gap
    sheet = np.full((-(-n // columns) * down + gap, columns * right + gap, 3), 16, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + (i // columns) * down, gap + (i % columns) * right
        sheet[y : y + height, x : x + width] = picture
    return sheet.repeat(scale, 0).repeat(scale, 1)
