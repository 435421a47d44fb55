"""The embedding reaches the layers in the forward and in recomputation, and nowhere else."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dydit_scale.adapters.delivery import checkpoint_with_timestep
from dydit_scale.adapters.export import timestep_embeddings
from dydit_scale.adapters.td_lora import add_td_lora, td_layers
from tests.adapters.tiny import adapted_flux, adapted_mlp, embeddings, flux_config, flux_inputs, tiny_flux, tokens

TIMES = torch.tensor([0.1, 0.9])


def gradients(model: nn.Module) -> list[Tensor]:
    """Two forwards at different timesteps, then one backward."""
    model.zero_grad()
    first, second = (model(**flux_inputs(t, seed)).sample for t, seed in ((TIMES, 1), (TIMES.flip(0) / 2, 2)))
    (first.square().mean() + 3 * second.square().mean()).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_checkpointing_with_two_forwards_before_one_backward() -> None:
    model = adapted_flux()
    plain = gradients(model)
    calls = []
    function = checkpoint_with_timestep(model)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    model.enable_gradient_checkpointing(gradient_checkpointing_func=counted)
    for a, b in zip(gradients(model.train()), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert len(calls) == 4


def test_a_copy_of_a_checkpointed_model_uses_its_own_state() -> None:
    model = adapted_flux().train()
    model.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_with_timestep(model))
    for a, b in zip(gradients(copy.deepcopy(model)), gradients(model), strict=True):
        assert torch.equal(a, b)


def test_the_default_checkpointing_of_a_static_model_raises_instead_of_being_wrong() -> None:
    model = adapted_flux().train()
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="checkpoint_with_timestep"):
        gradients(model)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="reentrant"):
        checkpoint_with_timestep(adapted_flux(), use_reentrant=True)


def test_default_checkpointing_of_a_dynamic_model_is_right() -> None:
    model = adapted_mlp()

    def run(function: Any) -> list[Tensor]:
        model.zero_grad()
        outputs = [model(tokens(3, seed=s), embeddings(3, seed=s), function) for s in (1, 2)]
        (outputs[0].square().sum() + 3 * outputs[1].square().sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    for a, b in zip(run(functools.partial(checkpoint, use_reentrant=False)), run(None), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_use_the_pure_embedding_of_the_timestep_in_fp32() -> None:
    model = adapted_flux(torch.bfloat16)
    seen: list[Tensor] = []
    layer = td_layers(model)["transformer_blocks.0.attn.to_q"]
    layer.gate("default").register_forward_hook(lambda module, args, output: seen.append(args[0]))
    times = TIMES.bfloat16()
    model(**flux_inputs(times, dtype=torch.bfloat16))
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], timestep_embeddings(model, times))


def test_nothing_is_left_after_a_forward_or_a_failed_one() -> None:
    model = adapted_flux()
    model(**flux_inputs(TIMES))
    assert model.timestep_state.emb is None
    timestep_embeddings(model, TIMES)
    assert model.timestep_state.emb is None
    with pytest.raises(RuntimeError):
        model(**{**flux_inputs(TIMES), "encoder_hidden_states": torch.randn(2, 5, 7)})
    assert model.timestep_state.emb is None
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q: no timestep embedding"):
        model.transformer_blocks[0].attn.to_q(torch.randn(2, 3, 16))


def test_a_layer_that_runs_before_the_embedder_raises() -> None:
    model = add_td_lora(tiny_flux(), flux_config(target_modules=["x_embedder"]))
    for _ in range(2):
        with pytest.raises(ValueError, match="x_embedder: no timestep embedding"):
            model(**flux_inputs(TIMES))


def test_a_second_adapter_adds_no_second_hook() -> None:
    model = adapted_flux()
    state, hooks = model.timestep_state, len(model._forward_hooks)
    add_td_lora(model, flux_config(), "second")
    assert model.timestep_state is state
    assert len(model._forward_hooks) == hooks == 1
