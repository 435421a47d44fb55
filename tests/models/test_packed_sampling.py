"""Packed models while they sample: fixed numbers of tokens, shared scores, modulation ahead of its step, backends."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from dydit_scale.adapters.td_lora import add_td_lora
from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.models.ahead import AheadModulation
from dydit_scale.models.plan import PackedPlan
from dydit_scale.sampling.execution import Execution
from tests.adapters.tiny import flux_config, shake
from tests.models.tiny import inputs, scramble, tiny_dynamic
from tests.models.tiny_families import FAMILIES, RELEASED, STEPS, Family, each


def masks_of(tokens: list[list[int]]) -> DynamicMasks:
    """Masks of two layers and two samples, of 8 tokens of which so many are kept."""
    kept = torch.tensor([[[float(i < n) for i in range(8)] for n in layer] for layer in tokens])
    return DynamicMasks(torch.ones(2, 2, 3), torch.ones(2, 2, 3), kept)


def test_capacity_is_the_mean_rounded_up_to_a_tile() -> None:
    found = TokenCapacity.from_masks([9.0, 5.0, 9.0], [masks_of([[1, 2], [8, 8]]), masks_of([[0, 0], [4, 3]]),
                                                       masks_of([[3, 4], [6, 8]])], multiple=2)  # fmt: skip
    assert found.timesteps.tolist() == [9.0, 5.0]
    assert found.counts.tolist() == [[4, 8], [2, 4]]  # means 2.5, 7.5; 0, 3.5; never nothing
    assert found.at(torch.tensor([5.0, 9.0]), 2, 1e-5).tolist() == [[2, 4], [4, 8]]
    with pytest.raises(ValueError, match="not calibrated at timestep 7; it knows 9, 5"):
        found.at(torch.tensor([7.0]), 2, 1e-5)
    with pytest.raises(ValueError, match="calibrated for 2 layers; the model has 3"):
        found.at(torch.tensor([9.0]), 3, 1e-5)
    with pytest.raises(ValueError, match="got 0 masks"):
        TokenCapacity.from_masks([], [])


@each
@torch.no_grad()
def test_a_capacity_fixes_how_many_tokens_work(family: Family) -> None:
    model, times = scramble(family.make()), list(STEPS)
    singles = [family.x(t) for t in times]
    masked = [model(**x, collect=True) for x in singles]
    kept = [out.masks.tokens for out in masked]
    exact = TokenCapacity.from_masks(family.steps(*times).tolist(), [out.masks for out in masked], multiple=1)
    model.pack(family.steps(*times), capacity=exact)
    compared = 0
    for x, out, tokens in zip(singles, masked, kept, strict=True):
        if bool((tokens.sum(-1) > 0).all()):  # the same numbers of tokens, so the same tokens
            compared += 1
            torch.testing.assert_close(model(**x).sample, out.sample, atol=1e-5, rtol=1e-4)
        found = model(**x, collect=True).masks.tokens.sum(-1)
        assert torch.equal(found, tokens.sum(-1).clamp(min=1))
    assert compared >= 1
    fixed = TokenCapacity(exact.timesteps, torch.full_like(exact.counts, 3))
    model.pack(family.steps(*times), capacity=fixed)
    assert bool((model(**family.x(times[0], times[0]), collect=True).masks.tokens.sum(-1) == 3).all())
    everything = TokenCapacity(exact.timesteps, torch.full_like(exact.counts, 10_000))
    model.pack(family.steps(*times), capacity=everything)
    assert bool((model(**singles[0], collect=True).masks.tokens == 1).all())


@each
@torch.no_grad()
def test_branches_of_guidance_share_their_scores_where_asked(family: Family) -> None:
    model, x = scramble(family.make()), family.x(0.5, 0.5)
    alone = x["hidden_states"].clone()
    x["hidden_states"] = alone[:1].repeat(2, *[1] * (alone.ndim - 1))  # both branches see the same latents
    for share in (False, True):
        model.pack(family.steps(0.5), share_scores=share)
        first, second = model(**x, collect=True).masks.tokens.unbind(1)
        assert torch.equal(first, second) or not share
        assert share or family.name not in CONDITIONS or not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"share_scores: .* got 2 samples, whose halves differ"):
        model(**{**x, "hidden_states": alone})  # two pictures without guidance


@each
@torch.no_grad()
def test_an_unplanned_timestep_is_told_once(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model = scramble(family.make())
    expected = model(**family.x(0.3)).sample
    plan = model.pack(family.steps(0.5))
    with caplog.at_level(logging.WARNING):
        model(**family.x(0.5))
        assert plan.run.fallback is None and not caplog.records
        for _ in range(2):
            assert torch.equal(model(**family.x(0.3)).sample, expected)
    assert plan.run.fallback is not None and len(caplog.records) == 1
    assert "is not among the 1 packed ones" in caplog.text


CONDITIONS = {"dit": "class_labels", "latte-classes": "class_labels", "flux": "pooled_projections"}


@torch.no_grad()
def test_a_cache_keeps_how_it_was_packed() -> None:
    family = next(family for family in FAMILIES if family.name == "dit")
    model, steps = scramble(family.make()), family.steps(*STEPS)
    counts = torch.full((len(STEPS), len(model.dynamic_blocks())), 3)
    model.pack(steps, capacity=TokenCapacity(steps, counts), share_scores=True, weights="int8", max_bytes=10**7)
    before = model._plan
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    model.disable_cache()
    after = model._plan
    assert after is not before and (after.tokens, after.storage, after.max_bytes, after.bytes) == (
        before.tokens, before.storage, before.max_bytes, before.bytes
    )  # fmt: skip
    x = family.x(STEPS[0], STEPS[0])
    x["hidden_states"] = x["hidden_states"][:1].repeat(2, 1, 1, 1)
    assert bool((model(**x, collect=True).masks.tokens.sum(-1) == 3).all())
    with pytest.raises(ValueError, match=r"share_scores: expected the two branches .* got 1 samples"):
        model(**family.x(STEPS[0]))


def test_a_cache_frees_the_old_copies_before_it_makes_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(family for family in FAMILIES if family.name == "dit")
    model = scramble(family.make())
    model.pack(family.steps(*STEPS))
    old, build = weakref.ref(model._plan.blocks[0][0]), PackedPlan.build
    there: list[bool] = []

    def watched(*args: Any, **options: Any) -> PackedPlan:
        there.append(old() is not None)
        return build(*args, **options)

    monkeypatch.setattr(PackedPlan, "build", watched)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert there == [False]


AHEAD = [family for family in FAMILIES if family.name in CONDITIONS]


@pytest.mark.parametrize("family", AHEAD, ids=lambda f: f.name)
@torch.no_grad()
def test_modulation_is_computed_ahead_for_a_sampler_alone(family: Family) -> None:
    model, times, name = scramble(family.make()), list(STEPS), CONDITIONS[family.name]
    runs = [family.x(t) for t in times]
    expected = [model(**x).sample for x in runs]
    plan = model.pack(family.steps(*times))
    layers = {id(layer): layer for block in plan.blocks[0] for layer in block.modulation}  # type: ignore[union-attr]
    calls: list[int] = []
    for layer in layers.values():
        layer.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    for x, out in zip(runs, expected, strict=True):  # conditions of each call are new tensors: nothing is foreseen
        torch.testing.assert_close(model(**x).sample, out, atol=1e-5, rtol=1e-4)
    assert calls == [1] * (3 * len(layers))

    calls.clear()
    condition = runs[0][name]
    for x, out in zip(runs, expected, strict=True):
        torch.testing.assert_close(model(**{**x, name: condition}).sample, out, atol=1e-5, rtol=1e-4)
    assert calls == [1] * len(layers) + [2] * len(layers)  # the second step computes the third's, too

    condition += 1 if int(condition.flatten()[0]) == 0 else -1  # in place: other conditions
    model.unpack()
    changed = [model(**{**x, name: condition}).sample for x in runs]
    assert not torch.allclose(changed[2], expected[2], atol=1e-3)
    object.__setattr__(model, "_plan", plan)
    for x, out in zip(runs, changed, strict=True):
        torch.testing.assert_close(model(**{**x, name: condition}).sample, out, atol=1e-5, rtol=1e-4)


def test_rounded_timesteps_are_foreseen_once_they_are_known() -> None:
    layer = torch.nn.Linear(2, 4)
    ahead = AheadModulation([[(layer,)]] * 3, torch.tensor([0.9, 0.5, 0.1]))
    asked: list[float] = []

    def embed(t: torch.Tensor) -> torch.Tensor:
        asked.append(float(t[0]))
        return t.float()[:, None].expand(-1, 2)

    rounded = [torch.tensor([t]).bfloat16() for t in (0.9, 0.5, 0.1)]
    for _ in range(2):  # two pictures
        prompt = torch.zeros(1)
        found = [ahead.at(s, float(t), t, (prompt,), embed(t), embed) for s, t in enumerate(rounded)]
    assert found[0] is None and found[1] is not None and found[2] is not None
    assert set(asked) == {float(t) for t in rounded}  # never the planned 0.9 or 0.1, which are not what came
    torch.testing.assert_close(found[2][0], layer(torch.nn.functional.silu(embed(rounded[2]))))


def test_branches_that_run_one_after_the_other_are_both_foreseen() -> None:
    layer = torch.nn.Linear(2, 4)
    values = [0.875, 0.5, 0.25, 0.125]
    ahead = AheadModulation([[(layer,)]] * 4, torch.tensor(values))
    prompts = {"with": torch.ones(1), "without": torch.zeros(1)}
    products: list[int] = []
    layer.register_forward_hook(lambda m, args, out: products.append(len(out)))
    for step, value in enumerate(values):
        for prompt in prompts.values():
            t = torch.tensor([value])

            def embed(t: torch.Tensor, prompt: torch.Tensor = prompt) -> torch.Tensor:
                return t[:, None].expand(-1, 2) + prompt

            found = ahead.at(step, value, t, (prompt,), embed(t), embed)
            assert (found is None) == (step == 0)
            if found is not None:
                expected = torch.nn.functional.linear(torch.nn.functional.silu(embed(t)), layer.weight, layer.bias)
                torch.testing.assert_close(found[0], expected)
    assert products == [3, 3]  # one product for each branch, at the second step for it and the two behind it


def test_what_was_foreseen_for_another_timestep_is_not_used() -> None:
    layer = torch.nn.Linear(2, 4)
    ahead = AheadModulation([[(layer,)]] * 3, torch.tensor([0.9, 0.5, 0.1]))
    prompt = torch.zeros(1)

    def embed(t: torch.Tensor) -> torch.Tensor:
        return t[:, None].expand(-1, 2)

    def at(step: int, value: float) -> Any:
        t = torch.tensor([value])
        return ahead.at(step, value, t, (prompt,), embed(t), embed)

    assert at(0, 0.9) is None
    found = at(1, 0.501)  # near enough to run the step's sub-network
    torch.testing.assert_close(found[0], layer(torch.nn.functional.silu(torch.full((1, 2), 0.501))))
    assert at(1, 0.502) is None and at(2, 0.1001) is None
    prompt = torch.zeros(1)  # the next picture
    assert at(0, 0.9) is None and at(1, 0.501) is not None and at(2, 0.1001) is not None


@pytest.mark.parametrize("family", AHEAD, ids=lambda f: f.name)
def test_inference_mode_computes_the_same(family: Family) -> None:
    model = scramble(family.make())
    expected = [model(**family.x(t)).sample.detach() for t in STEPS]
    model.pack(family.steps(*STEPS))
    with torch.inference_mode():
        condition = family.x(STEPS[0])[CONDITIONS[family.name]]
        for t, out in zip(STEPS, expected, strict=True):
            packed = model(**{**family.x(t), CONDITIONS[family.name]: condition}).sample
            torch.testing.assert_close(packed, out, atol=1e-5, rtol=1e-4)


def test_steps_of_other_modulation_layers_are_left_alone() -> None:
    layers = [[(torch.nn.Linear(4, 24),)] for _ in range(3)]  # TD-LoRA: another one at each step
    ahead = AheadModulation(layers, torch.tensor([3.0, 2.0, 1.0]))
    for step, t in enumerate((3.0, 2.0, 1.0)):
        found = ahead.at(step, t, torch.tensor([t]), ("same",), torch.zeros(1, 4), lambda t: torch.zeros(1, 4))
        assert found is None


@each
@torch.no_grad()
def test_autocast_runs_packed_blocks_too(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model = scramble(family.make(tokens=False))
    model.pack(family.steps(*STEPS))
    exact = model(**family.x(*STEPS)).sample
    model.unpack()
    with torch.autocast("cpu", torch.bfloat16):
        masked = model(**family.x(*STEPS)).sample
        model.pack(family.steps(*STEPS))
        packed = model(**family.x(*STEPS)).sample
        model(**family.x(*STEPS))
    told = [record.getMessage() for record in caplog.records if "autocast" in record.getMessage()]
    assert len(told) == 1 and "model.to(torch.bfloat16)" in told[0]
    assert packed.dtype == masked.dtype
    rounding = float((masked.float() - exact).abs().mean())
    assert 0 < float((packed.float() - exact).abs().mean()) < 1.5 * rounding

    model, counts = scramble(family.make()), torch.full((1, len(model.dynamic_blocks())), 2)
    steps = family.steps(0.5)
    model.pack(steps, capacity=TokenCapacity(steps, counts))
    exact = model(**family.x(0.5, 0.5)).sample
    with torch.autocast("cpu", torch.bfloat16):
        some = model(**family.x(0.5, 0.5)).sample.float()
    assert 0 < float((some - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


@each
def test_recorded_gradients_run_masked_and_say_so(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model, x = scramble(family.make()), family.x(0.5)
    expected = model(**x).sample
    plan = model.pack(family.steps(0.5))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(**x).sample, expected) and expected.requires_grad
        model(**x)
    assert plan.run.fallback is not None and "gradients are recorded" in plan.run.fallback
    assert len(caplog.records) == 1


@torch.no_grad()
def test_packed_blocks_refuse_what_they_would_not_follow() -> None:
    for family in FAMILIES[:2]:
        model = scramble(family.make())
        model.pack(family.steps(0.5))
        name = "joint_attention_kwargs" if family.name == "flux" else "cross_attention_kwargs"
        with pytest.raises(ValueError, match=f"{name}: packed blocks take .*got surprise"):
            model(**family.x(0.5), **{name: {"surprise": 1}})


def packed(**options: Any) -> Any:
    model = scramble(FAMILIES[1].make())
    model.pack(FAMILIES[1].steps(*STEPS), **options)
    return model


def test_backends_that_cannot_run_say_why() -> None:
    model = packed()
    with pytest.raises(ValueError, match="expected one of eager, compile, cudagraphs; got 'fast'"):
        Execution(model, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cudagraphs: expected a model on a CUDA device; it is on cpu"):
        Execution(model, "cudagraphs")
    with pytest.raises(ValueError, match="pack with kernel_layout=False"):
        Execution(model, "compile")
    model.unpack()
    with pytest.raises(ValueError, match="the model is not packed"):
        Execution(model)


@torch.no_grad()
def test_what_no_graph_can_hold_is_told(caplog: pytest.LogCaptureFixture) -> None:
    family, model = FAMILIES[1], packed()
    expected = model(**family.x(0.9, 0.5)).sample
    run = Execution(model)
    run._plain, run._signature, run._plan = model.forward, inspect.signature(model.forward), model._plan
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(run._replayed(**family.x(0.9, 0.5)).sample, expected)
    assert run.op_by_op == "a batch of several timesteps" and caplog.text.count("runs op by op") == 1
    asked = Execution(model)
    asked._plain, asked._signature, asked._plan = model.forward, inspect.signature(model.forward), model._plan
    asked._replayed(**family.x(0.9), collect=True)
    assert asked.op_by_op is None, "a forward that is asked for its masks is no sampling"


def test_compiled_code_is_not_taken_from_another_version_of_a_block() -> None:
    config, model = torch._functorch.config, scramble(FAMILIES[1].make())
    model.pack(FAMILIES[1].steps(*STEPS), kernel_layout=False)
    before = config.enable_autograd_cache
    assert before, "torch keeps such code by itself"
    with Execution(model, "compile"):
        assert not config.enable_autograd_cache
    assert config.enable_autograd_cache is before


@torch.no_grad()
def test_steps_share_a_graph_unless_layers_outside_the_blocks_tell_them_apart() -> None:
    steps = torch.tensor([0.9, 0.5])

    def networks(target: str) -> set[tuple]:
        model: Any = tiny_dynamic(tokens=False)  # all gates open: every step's blocks are the same
        if target:
            model = shake(add_td_lora(model, flux_config(target_modules=target)))
        model.pack(steps)
        with Execution(model) as run:
            run._follow()
            return {run._network(step) for step in range(2)}

    assert len(networks("")) == 1
    assert len(networks("proj_out|x_embedder")) == 2
    model: Any = shake(add_td_lora(tiny_dynamic(tokens=False), flux_config(target_modules="proj_out")))
    plan = model.pack(steps)
    assert plan.blocks[0] == plan.blocks[1], "the blocks alone do not tell the steps apart"
    x = inputs([0.5])
    with model.at_planned_step(0):
        early = model(**x).sample
    assert not torch.allclose(early, model(**x).sample, atol=1e-4)  # what a shared graph would have replayed


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_follow_experts_outside_the_blocks() -> None:
    model: Any = shake(add_td_lora(tiny_dynamic(tokens=False), flux_config(target_modules="proj_out"))).cuda()
    model.pack(torch.tensor([0.9, 0.5]))
    runs = [{name: value.cuda() for name, value in inputs([t]).items()} for t in (0.9, 0.5, 0.9)]
    expected = [model(**x).sample for x in runs]
    with Execution(model, "cudagraphs") as run:
        found = [model(**x).sample for x in runs]
    assert run.recompilations == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*FAMILIES, RELEASED], ids=lambda f: f.name)
@torch.no_grad()
def test_graphs_replay_what_ran_op_by_op(family: Family) -> None:
    model = scramble(family.make()).cuda()

    def on_gpu(x: dict[str, Any]) -> dict[str, Any]:
        return {name: value.cuda() if torch.is_tensor(value) else value for name, value in x.items()}

    counts = torch.full((len(STEPS), len(model.dynamic_blocks())), 4)
    model.pack(family.steps(*STEPS), capacity=TokenCapacity(family.steps(*STEPS), counts))
    runs = [on_gpu(family.x(t, seed=s)) for s in (1, 2) for t in STEPS]
    expected = [model(**x).sample for x in runs]
    with Execution(model, "cudagraphs") as run:
        found = [model(**x).sample for x in runs]
        assert run.recompilations == len(STEPS)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
