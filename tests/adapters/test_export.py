"""The mean over timesteps as a plain LoRA: its values, its reported error, and diffusers loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dydit_scale.adapters.export import (
    ModelSpec,
    export_mean_lora,
    export_plain_lora,
    mean_error,
    mean_lora,
    plain_lora,
    timestep_embeddings,
)
from dydit_scale.adapters.state import save_td_lora
from dydit_scale.adapters.td_lora import td_layers
from dydit_scale.adapters.verify import verify_diffusers_lora, verify_td_lora
from tests.adapters.tiny import FLUX_LAYERS, adapted_flux, flux_inputs, tiny_flux

SPEC = ModelSpec(title="tiny", timestep_range=(0, 1000))
STEPS = torch.linspace(0.05, 0.95, 7)
INPUTS: list[dict[str, Any]] = [flux_inputs(torch.tensor([t, t])) for t in (0.1, 0.5, 0.9)]


def mixed_ranks() -> nn.Module:
    return adapted_flux(
        rank_pattern={"to_q": 4, "single_transformer_blocks.0.proj_mlp": 1}, alpha_pattern={"to_v": 7.0}
    )


@torch.no_grad()
def updates(model: nn.Module, t_embs: Tensor) -> dict[str, Tensor]:
    """The true update of every layer at every timestep, dense: [steps, out, in]."""
    return {
        name: torch.stack([layer.weight_at(e[None]).double() - layer.base_layer.weight.double() for e in t_embs])
        for name, layer in td_layers(model).items()
    }


def test_the_mean_is_the_mean_of_the_updates() -> None:
    model = mixed_ranks()
    t_embs = timestep_embeddings(model, STEPS)
    tensors, dense = mean_lora(model, t_embs), updates(model, t_embs)
    assert len(tensors) == 2 * FLUX_LAYERS
    for name, update in dense.items():
        product = tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(product.double(), update.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_the_reported_error_is_the_dense_one() -> None:
    model = mixed_ranks()
    t_embs = timestep_embeddings(model, STEPS)
    error, dense = mean_error(model, t_embs), updates(model, t_embs)
    off = {name: update - update.mean(dim=0) for name, update in dense.items()}
    assert len(error.layers) == FLUX_LAYERS
    for name, update in dense.items():
        assert error.layers[name] == pytest.approx(float(off[name].norm() / update.norm()), rel=1e-4)
    top, bottom = (sum(u.square().sum((1, 2)) for u in group.values()) for group in (off, dense))
    assert error.timesteps == pytest.approx((top / bottom).sqrt().tolist(), rel=1e-4)
    assert error.total == pytest.approx(float((top.sum() / bottom.sum()).sqrt()), rel=1e-4)
    assert 0.01 < error.total < 1
    assert mean_error(model, t_embs[:1]).total == 0


def test_diffusers_loads_the_mean(tmp_path: Path) -> None:
    model, path = mixed_ranks(), tmp_path / "mean.safetensors"
    t_embs = timestep_embeddings(model, STEPS)
    error = export_mean_lora(model, t_embs, path, SPEC, max_error=1.0)
    check = verify_diffusers_lora(path, tiny_flux, FluxPipeline, INPUTS, model=model, tensors=mean_lora(model, t_embs))
    assert check.loader_error < 1e-5
    assert check.layers == FLUX_LAYERS
    assert len(check.approximation) == 3
    assert all(0.001 < value < 1 for value in check.approximation)
    at_one = timestep_embeddings(model, torch.tensor([0.5]))
    export_mean_lora(model, at_one, path, SPEC)
    exact = verify_diffusers_lora(path, tiny_flux, FluxPipeline, INPUTS, model=model, tensors=mean_lora(model, at_one))
    assert exact.approximation[1] < 1e-4 < exact.approximation[0]
    assert json.loads(path.with_suffix(".json").read_text())["total"] == 0.0
    assert error.total > 0


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    model, path = mixed_ranks(), tmp_path / "mean.safetensors"
    error = export_mean_lora(model, timestep_embeddings(model, STEPS), path, SPEC, max_error=1.0)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "flux-1-dev/lora"
    assert header["modelspec.timestep_range"] == "0,1000"
    assert float(header["dydit.mean_error"]) == pytest.approx(error.total, rel=1e-5)
    config = json.loads(header["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 2
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"]
    assert len(config["transformer.rank_pattern"]) == 3
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["layers"] == error.layers


def test_a_mean_that_is_too_far_off_is_refused_unless_forced(tmp_path: Path) -> None:
    model, path = adapted_flux(), tmp_path / "mean.safetensors"
    t_embs = timestep_embeddings(model, STEPS)
    with pytest.raises(ValueError, match=r"more than max_error 0\.01"):
        export_mean_lora(model, t_embs, path, SPEC, max_error=0.01)
    assert not path.exists()
    export_mean_lora(model, t_embs, path, SPEC, max_error=0.01, force=True)
    assert path.exists()


def test_plain_lora_is_exported_exactly(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["to_q", "proj_mlp", "x_embedder"],
        rank_pattern={"to_q": 3},
        init_lora_weights=False,
    )
    model = inject_adapter_in_model(config, tiny_flux())
    path = export_plain_lora(model, tmp_path / "plain.safetensors", SPEC)
    check = verify_diffusers_lora(path, tiny_flux, FluxPipeline, INPUTS, model=model, tensors=plain_lora(model))
    assert check.layers == 4
    assert max(check.approximation) < 1e-4


def test_what_is_no_plain_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="expected tensors, got none"):
        plain_lora(adapted_flux())
    dora = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), tiny_flux())
    with pytest.raises(ValueError, match="no plain LoRA"):
        plain_lora(dora)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("scaled", "off the model in memory"), ("renamed", "made 0 LoRA layers"), ("layer lost", "made 9 LoRA layers")],
)
def test_verification_fails_for_a_wrong_file(tmp_path: Path, damage: str, message: str) -> None:
    model, path = adapted_flux(), tmp_path / "mean.safetensors"
    t_embs = timestep_embeddings(model, STEPS)
    export_mean_lora(model, t_embs, path, SPEC, max_error=1.0)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if damage == "scaled":
        tensors = {name: t * 1.01 if "lora_B" in name else t for name, t in tensors.items()}
    elif damage == "renamed":
        header, tensors = {"format": "pt"}, {f"diffusion_model.{name}": t for name, t in tensors.items()}
    else:
        tensors = {name: t for name, t in tensors.items() if "proj_mlp" not in name}
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=message):
        verify_diffusers_lora(path, tiny_flux, FluxPipeline, INPUTS, model=model, tensors=mean_lora(model, t_embs))


def test_native_verification_allows_rounding_alone(tmp_path: Path) -> None:
    model = adapted_flux()
    save_td_lora(model, tmp_path)
    with torch.no_grad():
        reference = [model(**kwargs).sample for kwargs in INPUTS]
    assert verify_td_lora(tmp_path, tiny_flux(), INPUTS, reference).inputs == 3
    reference[1] = reference[1] * (1 + 1e-5)
    with pytest.raises(ValueError, match="output for input 1"):
        verify_td_lora(tmp_path, tiny_flux(), INPUTS, reference)
