"""Packed sub-networks of weights that change afterwards: noticed in time, told once, to those who hold the plan too."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.training_utils import EMAModel
from torch import nn

from dydit_scale.adapters.td_lora import add_td_lora
from tests.adapters.tiny import flux_config, shake
from tests.models.tiny import inputs, scramble, tiny_dynamic
from tests.models.tiny_families import FAMILIES, STEPS, Family, each


def other_weights(model: Any, names: str = "") -> dict[str, torch.Tensor]:
    """A state dict in which those parameters that have ``names`` in theirs are others."""
    draw = torch.Generator().manual_seed(3)
    found = dict(model.state_dict())
    for name, p in model.named_parameters():
        if names in name:
            found[name] = p.detach() + 0.3 * torch.randn(p.shape, generator=draw)
    return found


def attention_of(model: Any) -> Any:
    return model.dynamic_blocks()[1].attn1.to_q


def copied_through_data(model: Any) -> None:
    ema = EMAModel(model.parameters())
    ema.load_state_dict({**ema.state_dict(), "shadow_params": [p * 1.5 for p in model.parameters()]})
    ema.copy_to(model.parameters())


def other_data(model: Any) -> None:
    attention_of(model).weight.data = attention_of(model).weight.data * 2


def new_parameter(model: Any) -> None:
    attention_of(model).weight = nn.Parameter(attention_of(model).weight * 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "loaded": lambda model: model.load_state_dict(other_weights(model)),
    "assigned": lambda model: model.load_state_dict(other_weights(model), assign=True),
    "one weight": lambda model: attention_of(model).weight[1:].mul_(2),
    "a new parameter": new_parameter,
    "EMA by .data": copied_through_data,
    "other data": other_data,
    "width router": lambda model: model.load_state_dict(other_weights(model, "dy_width")),
    "timestep embedder": lambda model: model.load_state_dict(other_weights(model, "timestep_embedder")),
    "units": lambda model: model.dynamic_blocks()[0].dy_head_unit.copy_(model.dynamic_blocks()[0].dy_head_unit.flip(0)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_are_never_sampled_with_old_slices(change: str, caplog: pytest.LogCaptureFixture) -> None:
    family = next(family for family in FAMILIES if family.name == "dit")
    model, runs = scramble(family.make()), [family.x(t) for t in STEPS]
    before = [model(**x).sample for x in runs]
    plan = model.pack(family.steps(*STEPS))
    for x, out in zip(runs, before, strict=True):
        torch.testing.assert_close(model(**x).sample, out, atol=1e-5, rtol=1e-4)
    assert model._plan is plan and plan.run.fallback is None and not caplog.records
    CHANGES[change](model)
    with caplog.at_level(logging.WARNING):
        after = [model(**x).sample for x in runs]
    assert model._plan is None and plan.run.fallback == "weights have changed since pack"
    assert caplog.messages == ["the packed sub-networks are dropped: weights have changed since pack; pack again"]
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))
    model.pack(family.steps(*STEPS))
    for x, out in zip(runs, after, strict=True):
        torch.testing.assert_close(model(**x).sample, out, atol=1e-5, rtol=1e-4)


@each
@torch.no_grad()
def test_loading_drops_the_plan_of_every_family(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model, x = scramble(family.make()), family.x(0.5)
    model.pack(family.steps(0.5))
    model(**x)
    assert model._plan is not None
    model.load_state_dict(other_weights(model))
    found = model(**x).sample
    assert model._plan is None and "weights have changed since pack" in caplog.text
    assert torch.equal(found, model(**x).sample)


@pytest.mark.parametrize("name", ["td_up", "td_router"])
@torch.no_grad()
def test_trained_on_experts_are_not_sampled_with_old_slices(name: str) -> None:
    model: Any = shake(add_td_lora(scramble(tiny_dynamic()), flux_config()))
    x = inputs([0.5])
    plan = model.pack(torch.tensor([0.5]))
    model(**x)
    assert model._plan is plan
    values = [p for parameter, p in model.named_parameters() if name in parameter]
    assert values
    for p in values:
        p.add_(0.5 * torch.randn(p.shape, generator=torch.manual_seed(0)))
    model(**x)
    assert model._plan is None and plan.run.fallback == "weights have changed since pack"


@torch.no_grad()
def test_token_routers_may_change_since_packed_blocks_share_them() -> None:
    family = FAMILIES[1]
    model, x = scramble(family.make()), family.x(0.5)
    plan = model.pack(family.steps(0.5))
    for block in model.dynamic_blocks():
        for p in block.dy_token.parameters():
            p.add_(0.2)
    found = model(**x).sample
    assert model._plan is plan
    model.unpack()
    torch.testing.assert_close(found, model(**x).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_of_a_packed_model_know_their_own_weights() -> None:
    family = FAMILIES[1]
    model, x = scramble(family.make()), family.x(0.5)
    model.pack(family.steps(0.5))
    twin = copy.deepcopy(model)
    model.load_state_dict(other_weights(model))
    twin(**x)
    assert twin._plan is not None, "its weights are the old ones"
    late = copy.deepcopy(model)
    late(**x)
    assert late._plan is None, "its slices were old before it was made"
    twin.dynamic_blocks()[0].attn1.to_q.weight.mul_(2)
    twin(**x)
    assert twin._plan is None


def test_weights_without_versions_are_known_by_their_contents() -> None:
    family = FAMILIES[1]
    with torch.inference_mode():
        model, x = scramble(family.make()), family.x(0.5)
        plan = model.pack(family.steps(0.5))
        model(**x)
        assert model._plan is plan and next(model.parameters()).is_inference()
        model.load_state_dict(other_weights(model))
        model(**x)
        assert model._plan is None


@torch.no_grad()
def test_contents_are_compared_where_a_sampler_begins_in_the_middle() -> None:
    family = FAMILIES[1]
    model = scramble(family.make())
    plan = model.pack(family.steps(*STEPS))
    for t in STEPS[1:]:
        model(**family.x(t))
    for p in model.parameters():
        p.data.mul_(2)  # torch does not count it
    assert model._plan is plan
    model(**family.x(STEPS[1]))
    assert model._plan is None


@each
@torch.no_grad()
def test_training_and_moving_tell_what_they_drop(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model, x = scramble(family.make()), family.x(0.5)
    expected = model(**x).sample
    plan = model.pack(family.steps(0.5))
    model.to("cpu").eval()
    model(**x)
    assert model._plan is plan and not caplog.records
    model.train()
    assert model._plan is None and caplog.messages == [
        "the packed sub-networks are dropped: train() was called, and training changes the weights; pack again"
    ]
    assert plan.run.fallback is not None and "train()" in plan.run.fallback
    assert torch.equal(model.eval()(**x).sample, expected)
    caplog.clear()
    plan = model.pack(family.steps(0.5))
    model.to(torch.float64)
    assert model._plan is None and plan.run.fallback == "the model was moved or cast, and they stayed behind"
    model.train()  # there is nothing left to drop
    model.float().eval().pack(family.steps(0.5))
    model.unpack()  # who asks for it need not be told
    assert caplog.text.count("the packed sub-networks are dropped") == 1


@torch.no_grad()
def test_whoever_packed_learns_of_a_fallback_after_a_cache_packed_again() -> None:
    family = FAMILIES[1]
    model = scramble(family.make())
    plan = model.pack(family.steps(*STEPS))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert model._plan is not plan
    model.disable_cache()
    model(**family.x(0.3))
    assert plan.run.fallback is not None and "is not among the 3 packed ones" in plan.run.fallback
