from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.class_latte import ClassLatteTransformer3DModel
from dydit_scale.models.convert import LAYOUTS, to_diffusers, to_original
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.encoders import image_ids
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.models.keys.dit import published_heads
from dydit_scale.models.keys.flux import FLUX, rope_axes
from dydit_scale.workflows.convert import WEIGHTS_FILE, convert, read_checkpoint
from tests.models.originals import (
    CHANNELS,
    CLASSES,
    DEPTH,
    DIM,
    FRAMES,
    GRID,
    HEADS,
    PATCH,
    original_dit,
    original_dydit,
    original_dyflux,
    original_flux,
    original_latte,
)

ORIGINALS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "dit": ("DiTTransformer2DModel", original_dit),
    "dydit, 2025-03": ("DyDiTTransformer2DModel", lambda: original_dydit(HEADS - 1)),
    "dydit, 2024-12": ("DyDiTTransformer2DModel", lambda: original_dydit(HEADS)),
    "latte": ("ClassLatteTransformer3DModel", original_latte),
    "latte without classes": ("ClassLatteTransformer3DModel", lambda: original_latte(classes=False)),
    "flux": ("FluxTransformer2DModel", original_flux),
    "flux without guidance": (
        "FluxTransformer2DModel",
        lambda: {n: t for n, t in original_flux().items() if "guidance" not in n},
    ),
    "dyflux": ("DyFluxTransformer2DModel", original_dyflux),
}
assert {target for target, _ in ORIGINALS.values()} == {layout.target for layout in LAYOUTS}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ORIGINALS)
def test_round_trip_is_bit_exact(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    target, make = ORIGINALS[case]
    state = {name: tensor.to(dtype) for name, tensor in make().items()}
    save_file(state, tmp_path / "original.safetensors")
    done = convert(tmp_path / "original.safetensors", tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["_class_name"] == target == done.layout.target
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", WEIGHTS_FILE]
    for name in ("back.safetensors", "back.pt"):
        convert(tmp_path / "model", tmp_path / name, to="original")
        back, _ = read_checkpoint(tmp_path / name)
        assert same(back, state)
    convert(tmp_path / "back.pt", tmp_path / "again")
    assert same(load_file(tmp_path / "again" / WEIGHTS_FILE), load_file(tmp_path / "model" / WEIGHTS_FILE))


def reference_dit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT's forward after its paper (section 3.2, adaLN-Zero) on an original file's weights."""

    def layer(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, (DIM,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angles = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    c = layer("t_embedder.mlp.2", F.silu(layer("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    for i in range(DEPTH):
        shift1, scale1, gate1, shift2, scale2, gate2 = layer(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = layer(f"blocks.{i}.attn.qkv", modulated(h, shift1, scale1)).unflatten(2, (3, HEADS, DIM // HEADS))
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))
        attention = ((q @ k.transpose(2, 3)) * (DIM // HEADS) ** -0.5).softmax(-1) @ v
        h = h + gate1[:, None] * layer(f"blocks.{i}.attn.proj", attention.transpose(1, 2).flatten(2))
        hidden = F.gelu(layer(f"blocks.{i}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * layer(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = layer("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = layer("final_layer.linear", modulated(h, shift, scale))
    out = out.unflatten(2, (PATCH, PATCH, 2 * CHANNELS)).unflatten(1, (GRID, GRID))
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 2 * CHANNELS, GRID * PATCH, GRID * PATCH)


@torch.no_grad()
def test_dit_computes_what_the_original_computes_but_for_the_frequency_shift(tmp_path: Path) -> None:
    state = original_dit()
    torch.save(state, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "model")
    model, info = DiTTransformer2DModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config["time_freq_shift"] == 0.0  # kept for the dynamic class
    t, y = torch.tensor([0, 3, 500, 999]), torch.tensor([0, 2, 4, CLASSES])
    x = torch.randn(4, CHANNELS, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(3))
    expected = reference_dit(state, x, t, y)

    def errors() -> Tensor:
        difference = model(x, timestep=t, class_labels=y).sample - expected
        return difference.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)

    # The class's frequencies are up to 7 % lower: nothing at t = 0, then 0.1 %, 21 % and 28 % of the output's norm.
    assert errors().tolist() == pytest.approx([0, 0.001, 0.21, 0.28], rel=0.1, abs=1e-5)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert errors().max() < 1e-5


def test_flux_equals_diffusers_own_conversion_bit_for_bit() -> None:
    state = original_flux(dim=3072, head_dim=128, columns=1)  # diffusers' converter knows this width only
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    found: dict[str, Tensor] = {}
    for rule in FLUX.rules({"guidance_embeds": True, "num_layers": 1, "num_single_layers": 1}):
        found |= zip(rule.ours, rule.forward([state[name] for name in rule.originals]), strict=True)
    assert same(found, expected)


@torch.no_grad()
def test_flux_loads_and_runs(tmp_path: Path) -> None:
    save_file({f"model.diffusion_model.{n}": t for n, t in original_flux().items()}, tmp_path / "flux.safetensors")
    convert(tmp_path / "flux.safetensors", tmp_path / "model")
    model, info = FluxTransformer2DModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model(**flux_inputs(2)).sample.isfinite().all()


def flux_inputs(batch: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 12, generator=g),
        "encoder_hidden_states": torch.randn(batch, 3, 24, generator=g),
        "pooled_projections": torch.randn(batch, 20, generator=g),
        "timestep": torch.rand(batch, generator=g),
        "guidance": torch.ones(batch),
        "img_ids": image_ids(2, 2),
        "txt_ids": torch.zeros(3, 3),
    }


@torch.no_grad()
def test_dyflux_routes_as_the_release_does(tmp_path: Path) -> None:
    state = original_dyflux()
    torch.save({"module": state}, tmp_path / "dyflux.pth")
    assert convert(tmp_path / "dyflux.pth", tmp_path / "model").weights == "module"
    model, info = DyFluxTransformer2DModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dynamic.single_bypass == "attn_out+mlp" and not model.dynamic.heads and not model.dynamic.mlp
    g = torch.Generator().manual_seed(2)
    x, text, temb = (torch.randn(*size, generator=g) for size in ((2, 9, 64), (2, 3, 64), (2, 64)))
    for block in ("transformer_blocks.1", "single_transformer_blocks.0"):
        prefix = f"{block}.token_selection."
        w = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        modulation = F.linear(F.silu(temb), w["linear_t.weight"], w["linear_t.bias"])
        shift, scale, text_shift, text_scale = modulation[:, None].chunk(4, -1)
        norm = [F.layer_norm(h, (64,), w["norm.weight"], w["norm.bias"]) for h in (x, text)]
        mixed = norm[0] * (1 + scale) + shift + (norm[1] * (1 + text_scale) + text_shift).mean(1, keepdim=True)
        expected = F.linear(mixed, w["router.weight"], w["router.bias"])[..., 0]
        torch.testing.assert_close(model.get_submodule(block).dy_token(x, temb, text), expected)
    keep = model.eval()(**flux_inputs(3), collect=True).masks
    assert keep.heads.all() and keep.groups.all() and keep.tokens.shape == (3, 3, 4)


@pytest.mark.parametrize("rows", [HEADS - 1, HEADS])
def test_dydit_names_its_routers_as_the_dynamic_modules_do(rows: int) -> None:
    state = original_dydit(rows)
    converted = to_diffusers(state, "x.pt")
    always_on = rows == HEADS - 1
    assert converted.config["dynamic"]["always_on"] is always_on
    for i in range(DEPTH):
        for ours, original in (("heads", "attn_rate"), ("groups", "mlp_rate")):
            for s in ("weight", "bias"):
                row = converted.tensors[f"dy_width.{ours}.{s}"][i]
                assert torch.equal(row, state[f"blocks.{i}.{original}.router.{s}"])
    model = DyDiTTransformer2DModel.from_config(converted.config)
    model.load_state_dict(converted.tensors)
    t_emb = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([t_emb @ state[f"blocks.{i}.attn_rate.router.weight"].T for i in range(DEPTH)])
    logits += torch.stack([state[f"blocks.{i}.attn_rate.router.bias"] for i in range(DEPTH)])[:, None]
    heads = model.width_masks(t_emb, "threshold").heads
    assert heads is not None and heads.shape == (DEPTH, 3, HEADS)
    assert torch.equal(heads[..., -rows:], (logits > 0).float())
    noise = GateNoise(*(torch.zeros(DEPTH, 3, HEADS) for _ in range(3)))
    noisy = model.width_masks(t_emb, noise).heads
    assert noisy is not None and torch.equal(noisy.detach(), heads)


@pytest.mark.parametrize("choice", [None, "ema", "model"])
def test_training_files_with_their_arguments(choice: str | None, tmp_path: Path) -> None:
    states = {"model": original_dydit(HEADS - 1, seed=5), "ema": original_dydit(HEADS - 1, seed=6)}
    torch.save(
        {**states, "opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "x.pt"
    )
    done = convert(tmp_path / "x.pt", tmp_path / "model", weights=choice)
    assert done.weights == (choice or "ema")
    convert(tmp_path / "model", tmp_path / "back.safetensors", to="original")
    assert same(load_file(tmp_path / "back.safetensors"), states[choice or "ema"])


def test_sizes_that_are_not_in_the_file() -> None:
    assert [published_heads(dim) for dim in (384, 768, 1024, 1152)] == [6, 12, 16, 16]  # DiT, table 1
    assert rope_axes(128) == [16, 56, 56]
    assert to_diffusers(original_dit(), "x.pt").config["num_attention_heads"] == HEADS
    assert to_diffusers(original_dit(), "x.pt", heads=4).config["attention_head_dim"] == DIM // 4
    with pytest.raises(ValueError, match="--heads 3: the file has 2 heads"):
        to_diffusers(original_flux(), "x.pt", heads=3)
    with pytest.raises(ValueError, match="no published size has 100 channels"):
        published_heads(100)
    with pytest.raises(ValueError, match="multiple of 32"):
        rope_axes(40)
    with pytest.raises(ValueError, match=r"expected 3 rows .* or 4"):
        to_diffusers(original_dydit(HEADS), "x.pt", heads=4)


def changed(state: dict[str, Tensor], drop: str = "", **add: Tensor) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if n != drop} | {n.replace("__", "."): t for n, t in add.items()}


WRONG: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "missing": (lambda: changed(original_dit(), drop="blocks.1.attn.proj.bias"),
                r"taken for DiT or SiT .*blocks\.1\.attn\.proj\.bias is missing \(1 in all\)"),
    "misspelt": (lambda: changed(original_flux(), "single_blocks.1.linear1.bias",
                                 single_blocks__1__lin1__bias=torch.ones(1)),
                 r"linear1\.bias is missing .*; single_blocks\.1\.lin1\.bias is there, which it resembles"),
    "surplus": (lambda: changed(original_flux(), double_blocks__0__img_attn__qkv__scale=torch.ones(1)),
                r"double_blocks\.0\.img_attn\.qkv\.scale does not belong .*resembles double_blocks\.0\.img_attn\.qkv"),
    "shape": (lambda: changed(original_dit(), blocks__0__mlp__fc1__bias=torch.ones(7)),
              r"blocks\.0\.mlp\.fc1\.bias has shape \[7\] where \[512\] is expected"),
    "axes": (lambda: changed(original_dit(), x_embedder__proj__weight=torch.ones(7)), "expected 4 axes"),
    "dtypes": (lambda: changed(original_dit(), blocks__1__mlp__fc1__bias=torch.ones(512).half()),
               r"blocks\.1\.mlp\.fc1\.bias is torch\.float16 among weights of torch\.float32"),
    "a block is missing": (lambda: {n: t for n, t in original_dit().items() if "blocks.0." not in n},
                           r"blocks\.0 is missing"),
    "first weight is missing": (lambda: changed(original_dyflux(), drop="x_embedder.weight"),
                                r"taken for DyFLUX: x_embedder\.weight is missing"),
    "positions": (lambda: changed(original_dit(), pos_embed=original_dit()["pos_embed"] + 0.01),
                  "pos_embed differs from its formula; diffusers computes the positions"),
    "latte, missing": (lambda: changed(original_latte(False), drop="blocks.1.adaLN_modulation.1.weight"),
                       r"taken for Latte.*blocks\.1\.adaLN_modulation\.1\.weight is missing \(1 in all\)"),
    "latte, surplus": (lambda: changed(original_latte(), text_embedding_projection__1__bias=torch.ones(1)),
                       r"taken for Latte.*text_embedding_projection\.1\.bias does not belong there"),
    "latte, shape": (lambda: changed(original_latte(), final_layer__linear__bias=torch.ones(7)),
                     r"final_layer\.linear\.bias has shape \[7\] where \[32\] is expected"),
    "latte, times": (lambda: changed(original_latte(), temp_embed=torch.zeros(1, FRAMES, DIM)),
                     "temp_embed differs from its formula; the class computes the positions in time"),
    "latte, odd": (lambda: {n: t for n, t in original_latte().items() if "blocks.1." not in n},
                   "taken for Latte.*num_layers: expected an even number"),
    "done already": (lambda: to_diffusers(original_flux(), "x").tensors, "names of FluxTransformer2DModel already"),
    "unknown": (lambda: {"blocks.0.attn.qkv.weights": torch.ones(1), "head.weight": torch.ones(1)},
                r"no known layout; .*holds blocks\.#\.attn\.qkv\.weights, which resembles blocks\.#\.attn\.qkv"),
    "not finite": (lambda: changed(original_dit(), blocks__1__mlp__fc1__bias=torch.full((512,), torch.nan)),
                   r"blocks\.1\.mlp\.fc1\.bias has values that are NaN"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_told_and_nothing_is_written(case: str, suffix: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    state, file = make(), tmp_path / f"wrong{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    else:
        save_file({n: t.clone() for n, t in state.items()}, file)
    with pytest.raises(ValueError, match=message) as raised:
        convert(file, tmp_path / "model")
    assert str(raised.value).count(str(file)) == 1
    assert os.listdir(tmp_path) == [file.name]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def test_damaged_foreign_and_malicious_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(original_dit(), tmp_path / "whole.safetensors")
    torch.save(original_dit(), tmp_path / "whole.pt")
    torch.save({**original_dit(), "x": Payload()}, tmp_path / "malicious.pt")
    torch.save({"ema": original_dit()}, tmp_path / "ema.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "numbers.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("whole.safetensors", "whole.pt"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(data[: len(data) // 2])
    cases = {
        "cut_whole.safetensors": "not a whole safetensors file",
        "cut_whole.pt": "not a whole checkpoint",
        "empty.pt": "not a whole checkpoint",
        "malicious.pt": "more than weights and plain values",
        "list.pt": "expected a dict of tensors, got list",
        "numbers.pt": "epoch is a int; expected tensors",
        "absent.pt": "no such file",
        "absent.safetensors": "found none",
        "whole.ckpt": "expected a .safetensors, .pt or .pth file",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "model")
    with pytest.raises(ValueError, match="--weights model: the file has ema"):
        convert(tmp_path / "ema.pt", tmp_path / "model", weights="model")
    with pytest.raises(ValueError, match="one set of weights"):
        convert(tmp_path / "whole.safetensors", tmp_path / "model", weights="ema")
    with pytest.raises(ValueError, match="one set of weights only"):
        convert(tmp_path / "whole.pt", tmp_path / "model", weights="ema")
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "whole.pt", tmp_path)
    assert not (tmp_path / "model").exists() and not (tmp_path / "unpickled").exists()


def test_models_that_no_original_can_hold_are_refused(tmp_path: Path) -> None:
    copies = to_diffusers(original_dit(), "x")
    second = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match=f"{second} differs .* one y_embedder"):
        to_original({**copies.tensors, second: copies.tensors[second] + 1}, copies.config, "x")
    units = to_diffusers(original_dydit(HEADS), "x")
    table = "transformer_blocks.0.dy_head_unit"
    with pytest.raises(ValueError, match=f"{table} differs .* contiguous units only"):
        to_original({**units.tensors, table: units.tensors[table].flip(0)}, units.config, "x")
    with pytest.raises(ValueError, match="no original layout for UNet2DModel; there is one for DiT"):
        to_original(copies.tensors, {"_class_name": "UNet2DModel"}, "x")
    with pytest.raises(ValueError, match=r"config\.json says .* proj_out_1\.bias is missing"):
        to_original(changed(copies.tensors, drop="proj_out_1.bias"), copies.config, "x")
    with pytest.raises(ValueError, match="expected a model folder"):
        convert(tmp_path, tmp_path / "x.pt", to="original")
    with pytest.raises(ValueError, match="ends in"):
        convert(tmp_path, tmp_path / "x.bin", to="original")
    with pytest.raises(ValueError, match="are for original files"):
        convert(tmp_path, tmp_path / "x.pt", to="original", heads=2)


def test_folders_as_diffusers_writes_them_go_back(tmp_path: Path) -> None:
    state = original_flux()
    save_file(state, tmp_path / "flux.safetensors")
    convert(tmp_path / "flux.safetensors", tmp_path / "model")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "model")
    folder = tmp_path / "pipeline/transformer"
    model.save_pretrained(folder, max_shard_size="400KB")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    convert(tmp_path / "pipeline", tmp_path / "back.safetensors", to="original")
    assert same(load_file(tmp_path / "back.safetensors"), state)

    (folder / "copy.safetensors").write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match="is in another file of the folder too"):
        convert(folder, tmp_path / "x.pt", to="original")
    (folder / "copy.safetensors").unlink()
    shards[-1].unlink()
    with pytest.raises(ValueError, match="is missing"):
        convert(folder, tmp_path / "x.pt", to="original")
    for text, message in (("{", "not JSON"), ("[]", "expected an object, got list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "x.pt", to="original")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("choice", [None, "ema", "model"])
def test_training_files_of_latte(choice: str | None, tmp_path: Path) -> None:
    states = {"model": original_latte(seed=5), "ema": original_latte(seed=6)}
    torch.save({**states, "opt": {}, "args": argparse.Namespace(num_classes=101)}, tmp_path / "latte.pt")
    done = convert(tmp_path / "latte.pt", tmp_path / "model", weights=choice)
    assert done.weights == (choice or "ema")
    convert(tmp_path / "model", tmp_path / "back.pt", to="original")
    back, taken = read_checkpoint(tmp_path / "back.pt")
    assert taken == "ema" and same(back, states[choice or "ema"])  # its own loader looks under ema


@torch.no_grad()
def test_latte_computes_a_dit_where_time_changes_nothing(tmp_path: Path) -> None:
    """With temporal blocks whose gates are zero, each picture is what the DiT of the spatial blocks makes of it."""
    state = original_latte()
    for s in ("weight", "bias"):
        state[f"blocks.1.adaLN_modulation.1.{s}"].zero_()
    torch.save({"ema": state}, tmp_path / "latte.pt")
    convert(tmp_path / "latte.pt", tmp_path / "model")
    model, info = ClassLatteTransformer3DModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config["video_length"] == FRAMES and model.config["num_classes"] == CLASSES
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 4, CLASSES])
    pictures = torch.randn(3, CHANNELS, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(3))
    out = model.eval()(pictures[:, :, None], t, y, images=1).sample
    torch.testing.assert_close(out[:, :, 0], reference_dit(state, pictures, t, y), atol=1e-5, rtol=1e-4)


def test_quantised_files_are_told(tmp_path: Path) -> None:
    quantised = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in original_flux().items()}
    for name, save in (("fp8.safetensors", save_file), ("fp8.pt", torch.save)):
        save(quantised, tmp_path / name)
        with pytest.raises(ValueError, match=r"is torch\.float8_e4m3fn; expected unquantised"):
            convert(tmp_path / name, tmp_path / "model")


def test_routers_in_fp32_under_bf16_weights_go_back(tmp_path: Path) -> None:
    model = to_diffusers({n: t.bfloat16() for n, t in original_dyflux().items()}, "x")
    mixed = {n: t.float() if "dy_token" in n else t for n, t in model.tensors.items()}
    _, back = to_original(mixed, model.config, "x")
    assert back["x_embedder.weight"].dtype == torch.bfloat16
    assert back["transformer_blocks.0.token_selection.norm.weight"].dtype == torch.float32


def written(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_what_the_original_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    static = convert_of(original_dit(), tmp_path)
    cases = [
        (DyDiTTransformer2DModel.from_static(static, rank=False), {}, None),
        (DyDiTTransformer2DModel.from_static(static, DynamicConfig(heads=False)), {}, "dynamic.heads True, not False"),
        (DyDiTTransformer2DModel.from_static(static), {"time_freq_shift": 1.0}, "time_freq_shift 0.0, not 1.0"),
    ]
    for n, (model, changes, message) in enumerate(cases):
        folder = written(model, tmp_path / f"model{n}")
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        if message is None:
            assert convert(folder, tmp_path / f"back{n}.pt", to="original").layout.title == "DyDiT"
            continue
        with pytest.raises(ValueError, match=f"no original layout holds this DyDiTTransformer2DModel: .*{message}"):
            convert(folder, tmp_path / f"back{n}.pt", to="original")
        assert not (tmp_path / f"back{n}.pt").exists()


def convert_of(state: dict[str, Tensor], folder: Path) -> DiTTransformer2DModel:
    """The static model of an original file, loaded."""
    save_file(state, folder / "original.safetensors")
    convert(folder / "original.safetensors", folder / "static")
    return DiTTransformer2DModel.from_pretrained(folder / "static")


def test_routers_of_width_are_not_dropped_on_the_way_to_dyflux(tmp_path: Path) -> None:
    save_file(original_dyflux(), tmp_path / "original.safetensors")
    convert(tmp_path / "original.safetensors", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    static = DyFluxTransformer2DModel.from_pretrained(tmp_path / "model").to_static()
    wide = DynamicConfig(**{**config["dynamic"], "heads": True, "mlp": True})
    folder = written(DyFluxTransformer2DModel.from_static(static, wide), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"DyFLUX has dynamic\.heads False, not True"):
        convert(folder, tmp_path / "back.pt", to="original")
