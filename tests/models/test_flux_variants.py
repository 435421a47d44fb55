"""FLUX.1's published variants at toy size: dev, schnell, lite and Kontext."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from torch import Tensor

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.encoders import image_ids
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.models.small import small_flux_pipeline
from dydit_scale.sampling.generate import SampleConfig, generate, sampler_timesteps
from tests.models.tiny import scramble

WORDS = ("a", "red", "ball")
VARIANTS: dict[str, dict[str, Any]] = {
    "dev": {"guidance": True, "double_blocks": 2, "single_blocks": 4},
    "schnell": {"guidance": False, "double_blocks": 2, "single_blocks": 4},
    "lite": {"guidance": True, "double_blocks": 1, "single_blocks": 5},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15},
    "shifted": {"shift": 3.0, "use_dynamic_shifting": False},
}


def pipeline(variant: str, scheduler: str) -> FluxPipeline:
    pipe = small_flux_pipeline(WORDS, heads=4, head_dim=8, **VARIANTS[variant])
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[scheduler]))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    return pipe


def seen_timesteps(pipe: FluxPipeline) -> list[float]:
    """Filled while the pipeline runs."""
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_planned_timesteps_are_those_of_the_pipeline(scheduler: str) -> None:
    pipe = pipeline("schnell", scheduler)
    config = SampleConfig(steps=4, height=32, width=48, text_tokens=8)
    seen = seen_timesteps(pipe)
    generate(pipe, ["a ball"], config)
    assert seen == sampler_timesteps(pipe, config).tolist() and len(seen) == 4
    if scheduler == "schnell":
        assert seen == [1.0, 0.75, 0.5, 0.25]
    else:
        assert seen[0] == 1.0 and seen[1] > 0.75


@pytest.mark.parametrize(("variant", "scheduler"), [("dev", "dev"), ("schnell", "schnell"), ("lite", "dev")])
@torch.no_grad()
def test_a_variant_samples_dynamic_and_packed(variant: str, scheduler: str) -> None:
    pipe = pipeline(variant, scheduler)
    config = SampleConfig(steps=4 if variant == "schnell" else 6, height=32, width=32, text_tokens=256, guidance=2.0)
    static = generate(pipe, ["a red ball"], config)
    model = DyFluxTransformer2DModel.from_static(pipe.transformer, DynamicConfig(token_bottleneck=4))
    assert hasattr(model.time_text_embed, "guidance_embedder") is VARIANTS[variant]["guidance"]
    pipe.register_modules(transformer=model)
    assert np.array_equal(generate(pipe, ["a red ball"], config), static)  # all gates open
    scramble(model)
    masked = generate(pipe, ["a red ball"], config)
    assert not np.array_equal(masked, static)
    plan = model.pack(sampler_timesteps(pipe, config))
    assert plan.bytes > 0 and len(plan.blocks) == config.steps
    packed = generate(pipe, ["a red ball"], config)
    assert np.abs(packed.astype(int) - masked).max() <= 1


def kontext_inputs(model: DyFluxTransformer2DModel, side: int = 4) -> dict[str, Tensor]:
    """A picture's tokens, then those of the picture to edit, told apart by the first axis of their positions."""
    g, channels = torch.Generator().manual_seed(0), model.config["in_channels"]
    ids = image_ids(side, side)
    return {
        "hidden_states": torch.randn(1, 2 * side * side, channels, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, model.config["joint_attention_dim"], generator=g),
        "pooled_projections": torch.randn(1, model.config["pooled_projection_dim"], generator=g),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.5]),
        "img_ids": torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])]),
        "txt_ids": torch.zeros(5, 3),
    }


@torch.no_grad()
def test_kontext_routes_the_tokens_of_both_pictures() -> None:
    static = pipeline("dev", "dev").transformer
    model = DyFluxTransformer2DModel.from_static(static, DynamicConfig(token_bottleneck=4))
    x = kontext_inputs(model)
    assert torch.equal(model(**x).sample, static(**x).sample)
    masked = scramble(model)(**x, collect=True)
    assert masked.masks.tokens.shape == (6, 1, 32)
    assert 0 < float(masked.masks.tokens[:, :, 16:].mean()) < 1
    model.pack(torch.tensor([0.5]))
    torch.testing.assert_close(model(**x).sample, masked.sample, atol=1e-5, rtol=1e-4)
    cost = model.cost(32, 5)
    assert float(cost.ratio(masked.masks)) < 1 and cost.static > 1.5 * model.cost(16, 5).static


@torch.no_grad()
def test_the_kontext_pipeline_runs_packed() -> None:
    small = pipeline("dev", "dev")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=12, shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip
    model = DyFluxTransformer2DModel.from_static(small.transformer, DynamicConfig(token_bottleneck=4))
    parts = {name: getattr(small, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    pipe = FluxKontextPipeline(scheduler=small.scheduler, vae=vae, transformer=scramble(model), **parts)
    pipe.set_progress_bar_config(disable=True)
    seen = seen_timesteps(pipe)
    tokens: list[int] = []
    model.register_forward_pre_hook(lambda m, a, k: tokens.append(k["hidden_states"].shape[1]), with_kwargs=True)

    def edited() -> Tensor:
        return pipe(
            image=torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), prompt="a red ball", height=32, width=32,
            num_inference_steps=3, max_sequence_length=8, output_type="pt", _auto_resize=False,
            generator=torch.Generator().manual_seed(0), max_area=32 * 32,
        ).images  # fmt: skip

    masked = edited()
    plan = model.pack(torch.tensor(seen))
    torch.testing.assert_close(edited(), masked, atol=1e-4, rtol=0)
    assert plan.bytes > 0 and tokens == [2 * 64] * 6 and seen[:3] == seen[3:]


def test_cost_needs_the_text_tokens() -> None:
    model = DyFluxTransformer2DModel.from_static(pipeline("schnell", "schnell").transformer)
    with pytest.raises(ValueError, match="give the number of text tokens too"):
        model.cost(16)
    assert model.cost(16, 256).static > model.cost(16, 0).static > 0
