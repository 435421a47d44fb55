"""The mean over timesteps as a plain LoRA: its values, its reported error, and those who load it."""

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
    MeanError,
    ModelSpec,
    fused_name,
    mean_error,
    mean_lora,
    plain_lora,
    timestep_embeddings,
    write_fused_lora,
    write_lora,
    write_mean,
    write_peft_lora,
)
from dydit_scale.adapters.state import save_td_lora
from dydit_scale.adapters.td_lora import td_layers
from dydit_scale.adapters.verify import LoraCheck, diffusers_loader, peft_loader, verify_plain_lora, verify_td_lora
from dydit_scale.models.keys.flux import flux_rules
from dydit_scale.models.keys.lora import LowRank, fused_loras, with_fused_loras
from tests.adapters.tiny import FLUX_LAYERS, adapted_flux, flux_inputs, tiny_flux

SPEC = ModelSpec(title="tiny", timestep_range=(0, 1000))
STEPS = torch.linspace(0.05, 0.95, 7)
INPUTS: list[dict[str, Any]] = [flux_inputs(torch.tensor([t, t])) for t in (0.1, 0.5, 0.9)]


def mixed_ranks() -> nn.Module:
    return adapted_flux(
        rank_pattern={"to_q": 4, "single_transformer_blocks.0.proj_mlp": 1}, alpha_pattern={"to_v": 7.0}
    )


def export_mean(model: nn.Module, t_embs: Tensor, path: Path) -> MeanError:
    error = mean_error(model, t_embs)
    write_mean(path, mean_lora(model, t_embs), SPEC, error)
    return error


def verify(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> LoraCheck:
    return verify_plain_lora(
        path, diffusers_loader(path, FluxPipeline), tiny_flux, INPUTS, model=model, tensors=tensors
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
    error = export_mean(model, t_embs, path)
    check = verify(path, model, mean_lora(model, t_embs))
    assert check.loader_error < 1e-5
    assert len(check.approximation) == 3
    assert all(0.001 < value < 1 for value in check.approximation)
    at_one = timestep_embeddings(model, torch.tensor([0.5]))
    export_mean(model, at_one, path)
    exact = verify(path, model, mean_lora(model, at_one))
    assert exact.approximation[1] < 1e-4 < exact.approximation[0]
    assert json.loads(path.with_suffix(".json").read_text())["total"] == 0.0
    assert error.total > 0


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    model, path = mixed_ranks(), tmp_path / "mean.safetensors"
    error = export_mean(model, timestep_embeddings(model, STEPS), path)
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


def test_plain_lora_is_exported_exactly(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["to_q", "proj_mlp", "x_embedder"],
        rank_pattern={"to_q": 3},
        init_lora_weights=False,
    )
    model = inject_adapter_in_model(config, tiny_flux())
    path = write_lora(tmp_path / "plain.safetensors", plain_lora(model), SPEC, {})
    check = verify(path, model, plain_lora(model))
    assert len(plain_lora(model)) == 2 * 4
    assert max(check.approximation) < 1e-4


def test_what_is_no_plain_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="expected tensors, got none"):
        plain_lora(adapted_flux())
    dora = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), tiny_flux())
    with pytest.raises(ValueError, match="no plain LoRA"):
        plain_lora(dora)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("scaled", "off the model in memory"),
        ("renamed", "0 layers have a LoRA"),
        ("layer lost", "9 layers have a LoRA"),
    ],
)
def test_verification_fails_for_a_wrong_file(tmp_path: Path, damage: str, message: str) -> None:
    model, path = adapted_flux(), tmp_path / "mean.safetensors"
    t_embs = timestep_embeddings(model, STEPS)
    export_mean(model, t_embs, path)
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
        verify(path, model, mean_lora(model, t_embs))


def test_native_verification_allows_rounding_alone(tmp_path: Path) -> None:
    model = adapted_flux()
    save_td_lora(model, tmp_path)
    with torch.no_grad():
        reference = [model(**kwargs).sample for kwargs in INPUTS]
    assert verify_td_lora(tmp_path, tiny_flux(), INPUTS, reference).inputs == 3
    reference[1] = reference[1] * (1 + 1e-5)
    with pytest.raises(ValueError, match="output for input 1"):
        verify_td_lora(tmp_path, tiny_flux(), INPUTS, reference)


def test_peft_loads_the_folder_and_adapts_no_layer_of_the_same_name(tmp_path: Path) -> None:
    model = adapted_flux(target_modules=r"proj_out|.*\.to_q")  # and not single_transformer_blocks.0.proj_out
    tensors = mean_lora(model, timestep_embeddings(model, STEPS))
    folder = write_peft_lora(tmp_path, tensors, "some/base")
    check = verify_plain_lora(folder, peft_loader(folder), tiny_flux, INPUTS, model=model, tensors=tensors)
    assert check.loader_error < 1e-5 and all(0.001 < value < 1 for value in check.approximation)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"], config["r"]) == ("LORA", "some/base", 2)


def pairs(tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    ending = ".lora_A.weight"
    return {
        name.removeprefix("transformer.").removesuffix(ending): LowRank(t, tensors[name.replace("_A.", "_B.")])
        for name, t in tensors.items()
        if name.endswith(ending)
    }


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_fused_layers_of_the_original_do_the_same(style: str, tmp_path: Path) -> None:
    model, base = mixed_ranks(), tiny_flux()
    tensors = mean_lora(model, timestep_embeddings(model, STEPS))
    rules = flux_rules(base.config)
    fused = fused_loras(pairs(tensors), rules, {name: w.shape for name, w in base.state_dict().items()})
    path = write_fused_lora(tmp_path / "fused.safetensors", fused, style, SPEC)
    file = load_file(path)
    stem = fused_name("double_blocks.0.img_attn.qkv", style)
    assert stem == {"kohya": "lora_unet_double_blocks_0_img_attn_qkv", "comfyui": f"diffusion_model.{stem[16:]}"}[style]
    assert file[f"{stem}.lora_down.weight"].shape == (6, 16) and file[f"{stem}.lora_up.weight"].shape == (48, 6)
    assert float(file[f"{stem}.alpha"]) == 6, "to_q's 4 and to_v's 2; to_k has none"
    assert not file[f"{stem}.lora_up.weight"][16:32].any(), "rows of to_k"
    merged = with_fused_loras(base.state_dict(), fused, rules)
    for name, pair in pairs(tensors).items():
        expected = base.get_parameter(f"{name}.weight") + pair.up @ pair.down
        torch.testing.assert_close(merged.pop(f"{name}.weight"), expected)
    for name, weight in merged.items():  # fused with an adapted one
        assert torch.equal(weight, base.get_parameter(name)), name


def test_diffusers_reads_the_fused_form_at_the_size_it_knows() -> None:
    """Its converter asks for the widths and depths of FLUX.1."""
    shapes = {"q": (3072, 3072), "proj_mlp": (12288, 3072), "proj_out": (3072, 15360)}
    generator = torch.Generator().manual_seed(0)

    def lora(kind: str) -> LowRank:
        out, into = shapes[kind]
        return LowRank(torch.randn(1, into, generator=generator), torch.randn(out, 1, generator=generator))

    loras = {f"transformer_blocks.{i}.attn.to_{x}": lora("q") for i in range(19) for x in "qkv"}
    for i in range(38):
        block = f"single_transformer_blocks.{i}"
        loras |= {f"{block}.attn.to_{x}": lora("q") for x in "qkv"}
        loras |= {f"{block}.{name}": lora(name) for name in ("proj_mlp", "proj_out")}
    rules = flux_rules({"guidance_embeds": False, "num_layers": 19, "num_single_layers": 38})
    weights = {f"{name}.weight": (len(pair.up), pair.down.shape[1]) for name, pair in loras.items()}
    file = {}
    for layer, (down, up) in fused_loras(loras, rules, weights).items():
        name = fused_name(layer, "kohya")
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        file[f"{name}.alpha"] = torch.tensor(float(len(down)))
    read = FluxPipeline.lora_state_dict(file)
    assert len(read) == 2 * len(loras)
    for name, pair in loras.items():
        down, up = (read[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        column = torch.randn(down.shape[1], generator=generator)
        torch.testing.assert_close(up @ (down @ column), pair.up @ (pair.down @ column), rtol=1e-4, atol=1e-3)


def test_layers_without_a_place_are_refused() -> None:
    pair = LowRank(torch.ones(1, 2), torch.ones(2, 1))
    rules = flux_rules({"guidance_embeds": False, "num_layers": 1, "num_single_layers": 0})
    with pytest.raises(ValueError, match=r"blocks\.7 has no place in the original layout"):
        fused_loras({"blocks.7": pair}, rules, {})
    with pytest.raises(ValueError, match="img_out is no layer of the original layout"):
        with_fused_loras({}, {"img_out": pair}, rules)
    with pytest.raises(ValueError, match=r"final_layer\.linear: not every reader of kohya files"):
        fused_name("final_layer.linear", "kohya")
    with pytest.raises(ValueError, match="'koyha': expected kohya or comfyui"):
        fused_name("single_blocks.0.linear1", "koyha")
