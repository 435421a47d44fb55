"""The tuner: what it adapts and refuses, switching off, merging, scaling, copying."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from dydit_scale.adapters.td_lora import TDLoraConfig, adapters_off, add_td_lora, merge_at, td_layers, unmerge
from tests.adapters.tiny import (
    FLUX_LAYERS,
    adapted_flux,
    adapted_mlp,
    embeddings,
    flux_config,
    flux_inputs,
    mlp_config,
    shake,
    tiny_flux,
    tiny_mlp,
    tokens,
)

TIMES = torch.tensor([0.1, 0.5, 0.9])


@torch.no_grad()
def flux_output(model: torch.nn.Module, times: torch.Tensor = TIMES, **changes: Any) -> torch.Tensor:
    return model(**{**flux_inputs(times), **changes}).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_changes_nothing_and_trains_only_the_adapter(dtype: torch.dtype) -> None:
    model = tiny_flux(dtype)
    inputs = flux_inputs(TIMES, dtype=dtype)
    before = model(**inputs).sample
    add_td_lora(model, flux_config())
    assert torch.equal(model(**inputs).sample, before)
    assert len(td_layers(model)) == FLUX_LAYERS
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * FLUX_LAYERS
    assert all(".td_" in name and "lora" not in name and p.dtype == torch.float32 for name, p in trained.items())


def test_every_adapter_parameter_of_flux_learns_from_the_second_step_on() -> None:
    # The last block's to_q has a gradient too: no token is left out of the loss.
    model = add_td_lora(tiny_flux(), flux_config(experts=4))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**flux_inputs(TIMES)).sample.square().mean().backward()
        optimizer.step()
    assert len(trained) == 4 * FLUX_LAYERS
    assert [name for name, p in trained if p.grad is None or not p.grad.any()] == []


def test_a_batch_equals_its_samples() -> None:
    model, inputs = adapted_flux(), flux_inputs(TIMES)
    whole = flux_output(model)
    for i in range(3):
        one = {k: v if k.endswith("ids") else v[i : i + 1] for k, v in inputs.items()}
        torch.testing.assert_close(model(**one).sample, whole[i : i + 1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, flux_output(tiny_flux()), atol=1e-2)


def test_patterns_give_other_ranks_and_alphas() -> None:
    config = flux_config(rank_pattern={"to_q": 5, "transformer_blocks.0.ff.net.2": 1}, alpha_pattern={"proj_mlp": 8.0})
    layers = td_layers(add_td_lora(tiny_flux(), config))
    ranks = {name: layer.down("default").weight.shape[0] for name, layer in layers.items()}
    assert {name for name, rank in ranks.items() if rank == 5} == {
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
    }
    assert ranks["transformer_blocks.0.ff.net.2"] == 1
    assert layers["single_transformer_blocks.0.proj_mlp"].scaling == {"default": 4.0}
    assert layers["transformer_blocks.0.attn.to_v"].scaling == {"default": 1.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["linear_1"]}, "makes the timestep embedding"),
        ({"target_modules": ["to_kw"]}, "'to_kw' matches no layer .* did you mean to_k"),
        ({"target_modules": ["to_q", "nothing_here"]}, "'nothing_here' matches no layer"),
        ({"target_modules": ["attn"]}, "nn.Linear, plain or quantised.*FluxAttention"),
        ({"target_modules": r".*\.absent"}, "matches no layer"),
        ({"target_modules": []}, "got nothing"),
        ({"rank_pattern": {"to_z": 3}}, "'to_z' matches none"),
        ({"time_dim": 5}, "has 16 values, the config says 5"),
    ],
)
def test_configs_that_do_not_fit_leave_the_model_as_it_was(changes: dict[str, Any], message: str) -> None:
    model = tiny_flux()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_td_lora(model, flux_config(**changes))
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"experts": 0},
        {"alpha": 0.0},
        {"dropout": 1.0},
        {"init_noise": 1e-3},
        {"rank_pattern": {"a": 0}},
        {"gate": "relu"},
    ],
)
def test_configs_with_impossible_values_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"TDLoraConfig: .*expected"):
        TDLoraConfig(target_modules=["a"], **changes)


def test_a_regular_expression_and_exclusion() -> None:
    config = flux_config(target_modules=r"transformer_blocks\..*\.to_[qkv]", exclude_modules=["to_k"])
    layers = td_layers(add_td_lora(tiny_flux(), config))
    assert sorted(layers) == ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"]


def test_routers_stay_as_the_caller_set_them_and_cannot_be_adapted() -> None:
    model = tiny_mlp()
    model.blocks[0]["dy_token"].requires_grad_(False)
    add_td_lora(model, mlp_config())
    wanted = {"blocks.1.dy_token.weight", "blocks.1.dy_token.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".td_" not in n} == wanted
    with pytest.raises(ValueError, match="belongs to a router"):
        add_td_lora(tiny_mlp(), mlp_config(target_modules=["dy_token"]))


def test_a_model_without_a_timestep_is_refused() -> None:
    with pytest.raises(ValueError, match="set `time_dim`"):
        add_td_lora(tiny_mlp(), mlp_config(time_dim=None))
    with pytest.raises(ValueError, match="expected one module called timestep_embedder"):
        add_td_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), mlp_config(target_modules=["0"]))


def test_one_layer_takes_one_kind_of_adapter() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), tiny_flux())
    with pytest.raises(ValueError, match="without another adapter"):
        add_td_lora(model, flux_config(), "second")
    with pytest.raises(ValueError, match="exists already"):
        add_td_lora(adapted_flux(), flux_config())


def test_adapters_off_is_exactly_the_base_and_touches_no_requires_grad() -> None:
    model = adapted_flux()
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    on = flux_output(model)
    with adapters_off(model), adapters_off(model):
        assert torch.equal(flux_output(model), flux_output(tiny_flux()))
        assert torch.equal(
            td_layers(model)["transformer_blocks.0.attn.to_q"].weight_at(embeddings(1)),
            tiny_flux().transformer_blocks[0].attn.to_q.weight,
        )
    assert torch.equal(flux_output(model), on)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(flux_output(model), on)


def test_adapters_off_works_for_plain_lora_and_refuses_what_has_no_base() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), tiny_flux())
    with adapters_off(model):
        assert torch.equal(flux_output(model), flux_output(tiny_flux()))
    assert not torch.equal(flux_output(model), flux_output(tiny_flux()))
    with pytest.raises(ValueError, match="has no adapter"), adapters_off(tiny_flux()):
        pass
    merged = adapted_mlp()
    merge_at(merged, embeddings(1))
    with pytest.raises(ValueError, match="unmerge first"), adapters_off(merged):
        pass


def test_a_teacher_inside_a_training_step_leaves_the_gradients_alone() -> None:
    model, x, emb = adapted_mlp(), tokens(3), embeddings(3)

    def gradients(teacher: bool) -> list[torch.Tensor]:
        model.zero_grad()
        y = model(x, emb)
        if teacher:
            with torch.no_grad(), adapters_off(model):
                model(x, emb)
        y.square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    with_teacher = gradients(True)
    for a, b in zip(with_teacher, gradients(False), strict=True):
        assert torch.equal(a, b)


def test_merging_at_a_timestep_and_back() -> None:
    model, x, emb = adapted_mlp(), tokens(3), embeddings(2)
    with torch.no_grad():
        expected = [model(x, emb[i : i + 1]) for i in range(2)]
    weights = {name: layer.base_layer.weight.clone() for name, layer in td_layers(model).items()}
    assert len(weights) == 4
    for i in range(2):  # the second replaces the first
        merge_at(model, emb[i : i + 1])
        torch.testing.assert_close(model(x, emb[1 - i :]), expected[i], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    unmerge(model)
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in td_layers(model).items())
    assert torch.equal(model(x, emb[:1]), expected[0])


def test_merging_without_a_timestep_is_refused() -> None:
    layer = next(iter(td_layers(adapted_mlp()).values()))
    with pytest.raises(ValueError, match="depends on the timestep"):
        layer.merge()


def test_the_scale_of_diffusers_acts_on_the_update() -> None:
    model, half = adapted_flux(), adapted_flux(alpha=1.5)
    scaling = {name: dict(layer.scaling) for name, layer in td_layers(model).items()}
    full = flux_output(model)
    torch.testing.assert_close(flux_output(model, joint_attention_kwargs={"scale": 0.5}), flux_output(half))
    assert torch.equal(flux_output(model, joint_attention_kwargs={"scale": 0.0}), flux_output(tiny_flux()))
    assert {name: layer.scaling for name, layer in td_layers(model).items()} == scaling
    assert torch.equal(flux_output(model), full)
    model.set_adapters(["default"], [0.5])
    torch.testing.assert_close(flux_output(model), flux_output(half))


def test_two_adapters_add_up_and_one_can_be_deleted() -> None:
    model = add_td_lora(adapted_flux(), flux_config(target_modules=["to_q", "to_k"], rank=3), "second")
    first_only = flux_output(adapted_flux())
    shake(model, seed=8)
    for layer in td_layers(model).values():
        layer.set_adapter(["default", "second"])
    both = flux_output(model)
    assert len(td_layers(model, "second")) == 4
    assert not torch.allclose(both, first_only, atol=1e-2)
    for layer in td_layers(model).values():
        layer.delete_adapter("second")
    with pytest.raises(ValueError, match="no TD-LoRA adapter 'second'"):
        td_layers(model, "second")
    only_first = flux_output(model)
    assert not torch.allclose(both, only_first, atol=1e-3)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_copy_shares_its_state_inside_and_not_with_the_original(kind: str) -> None:
    model = adapted_flux() if kind == "static" else adapted_mlp()

    def output(which: torch.nn.Module) -> torch.Tensor:
        return flux_output(which) if kind == "static" else which(tokens(3), embeddings(3))

    expected, copied = output(model), copy.deepcopy(model)
    states = {id(layer.timestep_state) for layer in td_layers(copied).values()}
    assert states == {id(copied.timestep_state)} != {id(model.timestep_state)}
    assert torch.equal(output(copied), expected)
    assert copied.timestep_state.emb is None
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(output(copied), expected)
