"""diffusers' caches on every dynamic class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from torch import Tensor

from tests.models import test_latte as latte
from tests.models.tiny import scramble
from tests.models.tiny_families import FAMILIES, STEPS, Family, counted, each


def latents(module: Any, args: Any, kwargs: dict[str, Tensor]) -> list[Tensor]:
    """SeaCache's view of the input, (channels, frames, height, width)."""
    return [kwargs["hidden_states"][0].flatten()[:24].view(2, 1, 3, 4)]


BLOCK_CACHES: dict[str, Callable[[bool], Any]] = {
    "FirstBlockCache": lambda skip: FirstBlockCacheConfig(threshold=1e9 if skip else 0.0),
    "MagCache": lambda skip: MagCacheConfig(
        threshold=1e9 if skip else -1.0, mag_ratios=[1.0] * 4, num_inference_steps=4, retention_ratio=0.0
    ),
    "SeaCache": lambda skip: SeaCacheConfig(
        threshold=1e9 if skip else 0.0, residual_order=0, cache_end_steps=0, raw_vision_callback=latents
    ),
    "TaylorSeerLite": lambda skip: TaylorSeerCacheConfig(
        cache_interval=100 if skip else 1,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    ),
}
"""Caches that leave out whole blocks."""


def sampled(model: Any, family: Family) -> list[Tensor]:
    """Outputs at each step, as a pipeline asks for them."""
    out = []
    for i, t in enumerate(STEPS):
        with model.cache_context("cond", step_index=i, sigma=t, num_inference_steps=len(STEPS)):
            out.append(model(**family.x(t, seed=i)).sample)
    return out


@pytest.mark.parametrize("kind", BLOCK_CACHES)
@each
@torch.no_grad()
def test_caches_of_whole_blocks(family: Family, kind: str) -> None:
    model = scramble(family.make())
    calls, layers = counted(model), len(model.dynamic_blocks())
    expected = sampled(model, family)
    if family.name == "latte" and kind != "TaylorSeerLite":
        with pytest.raises(ValueError, match=f"{kind}Config takes .* alternate between two layouts"):
            model.enable_cache(BLOCK_CACHES[kind](False))
        assert not model.is_cache_enabled and torch.equal(sampled(model, family)[1], expected[1])
        return

    outputs: dict[str, list[Tensor]] = {}
    for order in ("masked", "pack, then cache", "cache, then pack"):
        model.unpack()
        if order == "pack, then cache":
            model.pack(family.steps(*STEPS))
        model.enable_cache(BLOCK_CACHES[kind](False))
        if order == "cache, then pack":
            model.pack(family.steps(*STEPS))
        calls.clear()
        for ours, theirs in zip(sampled(model, family), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert calls == dict.fromkeys(range(layers), len(STEPS)), order
        model.disable_cache()

        model.enable_cache(BLOCK_CACHES[kind](True))
        calls.clear()
        outputs[order] = sampled(model, family)
        head = len(STEPS) if kind == "FirstBlockCache" else None
        full = 2 if kind == "TaylorSeerLite" else 1
        assert calls == {i: head if i == 0 and head else full for i in range(layers)}, order
        assert not torch.allclose(outputs[order][2], expected[2], atol=1e-3)
        with pytest.raises(ValueError, match=r"collect: .*disable_cache\(\) first"):
            model(**family.x(0.5), collect=True)
        if order != "masked":
            assert model._plan is not None
            with pytest.raises(ValueError, match="one timestep in a batch of packed sampling"):
                model(**family.x(0.9, 0.2))
        model.disable_cache()
        for ours, theirs in zip(sampled(model, family), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for order, out in outputs.items():
        for ours, theirs in zip(out, outputs["masked"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=order)


class Clock:
    """The timestep that attention caches ask for, 0..1000."""

    now = 900

    def __call__(self) -> int:
        return self.now


def attention_cache(kind: str, skip: bool, clock: Clock, family: Family) -> Any:
    if kind == "PyramidAttentionBroadcast":
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=1000 if skip else 1,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=clock,
        )
    if kind == "FasterCache":
        return FasterCacheConfig(
            spatial_attention_block_skip_range=1000,
            temporal_attention_block_skip_range=1000,
            spatial_attention_timestep_skip_range=(-1, 681) if skip else (-2, -1),
            temporal_attention_timestep_skip_range=(-1, 681) if skip else (-2, -1),
            attention_weight_callback=lambda _: 0.0,
            is_guidance_distilled=True,
            current_timestep_callback=clock,
        )
    return TaylorSeerCacheConfig(
        cache_interval=100 if skip else 1,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf".*transformer_blocks\.\d+\.{family.attention}"],
    )


@pytest.mark.parametrize("kind", ["PyramidAttentionBroadcast", "FasterCache", "TaylorSeer"])
@each
@torch.no_grad()
def test_caches_inside_blocks_act_on_the_masked_model_only(family: Family, kind: str) -> None:
    model, clock = scramble(family.make()), Clock()
    calls, layers = counted(model, f"{family.attention}.to_q"), len(model.dynamic_blocks())

    def two_steps() -> list[Tensor]:
        out = []
        for i, t in enumerate(STEPS[:2]):
            clock.now = int(1000 * t)
            with model.cache_context("cond"):
                out.append(model(**family.x(t, seed=i)).sample)
        return out

    expected = two_steps()
    for skip in (False, True):
        model.enable_cache(attention_cache(kind, skip, clock, family))
        calls.clear()
        out = two_steps()
        assert calls == dict.fromkeys(range(layers), 1 if skip else 2)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1]) is not skip
        with pytest.raises(ValueError, match=r"has a hook around its forward .*; pack before"):
            model.pack(family.steps(0.5))
        model.disable_cache()
    model.pack(family.steps(*STEPS))  # what the removed hooks left behind does not matter
    for ours, theirs in zip(two_steps(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"{kind}.*acts inside blocks .*\.{family.attention}\).*unpack\(\) first"):
        model.enable_cache(attention_cache(kind, True, clock, family))
    assert not model.is_cache_enabled and model._plan is not None


@each
def test_a_cache_that_would_do_nothing_or_the_wrong_thing_is_refused(family: Family) -> None:
    model = family.make()
    with pytest.raises(ValueError, match="TextKVCacheConfig finds no module"):
        model.enable_cache(TextKVCacheConfig())
    if family.name == "flux":
        model.enable_cache(TaylorSeerCacheConfig())
        model.disable_cache()
    else:
        with pytest.raises(ValueError, match=r"TaylorSeerCacheConfig finds no module .* cache_identifiers"):
            model.enable_cache(TaylorSeerCacheConfig())
    if family.name != "latte":
        with pytest.raises(ValueError, match=r"unconditional half .* set is_guidance_distilled=True"):
            model.enable_cache(FasterCacheConfig(current_timestep_callback=Clock()))
    assert not model.is_cache_enabled


@torch.no_grad()
def test_faster_cache_leaves_out_lattes_unconditional_half() -> None:
    family, clock, rows = FAMILIES[2], Clock(), []
    model = scramble(family.make())
    model.temporal_transformer_blocks[0].attn1.to_q.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    model.enable_cache(
        FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-2, -1),
            unconditional_batch_skip_range=1000,
            current_timestep_callback=clock,
        )
    )
    for t in STEPS:
        clock.now = int(1000 * t)
        assert len(model(**family.x(t, t)).sample) == 2
    assert rows == [2 * latte.PATCHES, latte.PATCHES, latte.PATCHES]
