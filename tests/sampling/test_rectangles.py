"""Pictures that are no squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.families.pixart import small_pixart_pipeline
from dydit_scale.models.family import SampleConfig, SampleSize
from dydit_scale.models.registry import family_of
from dydit_scale.models.small import small_class_latte_pipeline, small_class_pipeline, small_flux_pipeline
from dydit_scale.sampling.generate import generate, picture_grid, recorded, sampler_timesteps
from tests.models.tiny import scramble

WORDS = ("a", "red", "ball")
SMALL = {"heads": 4, "head_dim": 8}
MAKERS: dict[str, Callable[[], Any]] = {
    "flux": lambda: small_flux_pipeline(WORDS, double_blocks=1, single_blocks=1, **SMALL),
    "pixart": lambda: small_pixart_pipeline(WORDS, layers=2, **SMALL),
}
SIZES = [(16, 24), (24, 8)]


def pipeline(name: str) -> Any:
    pipe = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    return pipe


def config_of(height: int, width: int) -> SampleConfig:
    return SampleConfig(steps=3, height=height, width=width, text_tokens=12, cfg=2.0, batch=2)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_the_pipelines_own_noise_gives_the_same_picture(name: str, height: int, width: int) -> None:
    pipe, config = pipeline(name), config_of(height, width)
    shape = family_of(pipe).latent_shape(pipe, SampleSize(height=height, width=width))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
    prompts = ["a red ball", "red"]
    ours = family_of(pipe).draw(pipe, prompts, noise, generators, config)
    guided: dict[str, Any] = {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
    if name == "pixart":
        guided = {"guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False}
    theirs = pipe(
        prompts, height=height, width=width, num_inference_steps=3, max_sequence_length=12, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **guided,
    ).images  # fmt: skip
    assert ours.shape == (2, height, width, 3) and ours.std() > 1
    assert np.abs(ours / 255 - theirs).max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_packed_draws_what_masked_draws(name: str, height: int, width: int) -> None:
    pipe, config, prompts = pipeline(name), config_of(height, width), ["a red ball", "", "ball"]
    static = generate(pipe, prompts, config)
    model = family_of(pipe).dynamic_class.from_static(pipe.transformer, DynamicConfig(token_bottleneck=4))
    pipe.register_modules(transformer=model)
    assert np.array_equal(generate(pipe, prompts, config), static), "all gates are open at first"
    scramble(model)
    with recorded(model) as seen:
        masked = generate(pipe, prompts, config)
    assert {masks.tokens.shape[-1] for masks in seen.masks} == {height * width // 16}
    assert 0 < float(seen.masks[0].tokens.mean()) < 1 and not np.array_equal(masked, static)
    model.pack(sampler_timesteps(pipe, config))
    packed = generate(pipe, prompts, config)
    assert packed.shape == (3, height, width, 3)
    assert np.abs(packed.astype(int) - masked.astype(int)).max() <= 1  # rounding to bytes
    other = config_of(width, height)
    assert generate(pipe, prompts[:1], other).shape == (1, width, height, 3), "the plan is for every size"


@pytest.mark.parametrize(
    ("make", "frames"),
    [
        (lambda: small_class_pipeline(WORDS, kind="dit", layers=1, side=16, **SMALL), 1),
        (lambda: small_class_pipeline(WORDS, kind="sit", layers=1, side=16, **SMALL), 1),
        (lambda: small_class_latte_pipeline(WORDS, frames=2, layers=2, side=16, **SMALL), 2),
    ],
    ids=["dit", "sit", "latte-classes"],
)
def test_a_family_of_squares_refuses_a_rectangle(make: Callable[[], Any], frames: int) -> None:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    config = SampleConfig(steps=2, height=16, width=8, frames=frames)
    with pytest.raises(ValueError, match=r"height 16 and width 8: .*Pipeline makes squares alone; choose one number"):
        generate(pipe, ["red"], config)
    square = SampleConfig(steps=2, height=8, width=8, frames=frames)
    assert generate(pipe, ["red"], square).shape[-3:] == (8, 8, 3)


def test_sizes_are_checked() -> None:
    for name in ("height", "width", "frames", "steps", "batch"):
        with pytest.raises(ValueError, match=f"sampling: {name} must be 1 or more; got 0"):
            SampleConfig(**{name: 0})
    pipe = pipeline("flux")
    with pytest.raises(ValueError, match="picture height 18: expected a multiple of 4 pixels"):
        generate(pipe, ["red"], config_of(18, 16))


def test_a_grid_of_rectangles_shows_each_whole() -> None:
    pictures = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.full((3, 2, 5, 3), 20, np.uint8)
    sheet = picture_grid(pictures, 2, gap=1)
    assert sheet.shape == (2 * 3 + 1, 2 * 6 + 1, 3)
    for i, (y, x) in enumerate([(1, 1), (1, 7), (4, 1)]):
        assert (sheet[y : y + 2, x : x + 5] == 20 * (i + 1)).all()
    assert (sheet == 16).sum() == sheet.size - pictures.size
    assert picture_grid(pictures[None], 9, scale=2, gap=1).shape == (2 * 4, 2 * 19, 3), "a clip is a row"
