from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FirstBlockCacheConfig
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydit_scale as dy
from dydit_scale.adapters.td_lora import TDLoraConfig, adapters_off, add_td_lora
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.dit import (
    DyDiTOutput,
    DyDiTTransformer2DModel,
    dit_config,
    with_embedder_per_block,
    with_one_embedder,
)
from dydit_scale.models.encoders import PixelAutoencoder
from tests.models.tiny import scramble, without_gradient
from tests.models.tiny_dit import CLASSES, HEADS, LAYERS, SIDE, TOKENS, inputs, noise, tiny_dit, tiny_dynamic

KINDS: list[dict[str, Any]] = [
    {},
    {"mlp_groups": 8},
    {"heads": False},
    {"mlp": False},
    {"tokens": False},
    {"heads": False, "mlp": False},
]
STATICS: list[dict[str, Any]] = [
    {},
    {"out_channels": None},
    {"patch_size": 4, "attention_bias": False},
    {"norm_elementwise_affine": True, "norm_eps": 1e-6, "activation_fn": "gelu"},
]


# Equal to the static model


@pytest.mark.parametrize("config", KINDS, ids=str)
@torch.no_grad()
def test_all_gates_open_is_the_static_model_bit_for_bit(config: dict) -> None:
    static, model = tiny_dit(), tiny_dynamic(**config)
    x = inputs([999, 500, 3])
    expected = static(**x).sample
    assert torch.equal(model(**x).sample, expected)  # all routers start open
    scramble(model)
    assert torch.equal(model(**x, gates="open").sample, expected)
    assert not torch.equal(model(**x).sample, expected)


@pytest.mark.parametrize("settings", STATICS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_static_class_is_followed_in_every_setting_size_and_dtype(settings: dict, dtype: torch.dtype) -> None:
    static = tiny_dit(**settings).to(dtype)
    model = scramble(DyDiTTransformer2DModel.from_static(static))
    for x in (inputs([999, 500, 3]), inputs([0.9, 0.25]), inputs([7, 7], side=12), inputs([7], side=4)):
        x["hidden_states"] = x["hidden_states"].to(dtype)
        expected = static(**x).sample
        assert expected.dtype == dtype
        assert torch.equal(model(**x, gates="open").sample, expected)
        assert torch.equal(model(**x, gates="open", return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_static_model(dtype: torch.dtype, checkpointing: bool) -> None:
    static = tiny_dit().to(dtype)
    model = DyDiTTransformer2DModel.from_static(copy.deepcopy(static))
    if checkpointing:
        static.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    x = inputs([999, 500, 3])
    x["hidden_states"] = x["hidden_states"].to(dtype)
    expected, sample = static(**x).sample, model(**x, gates="open").sample
    assert torch.equal(sample, expected)
    expected.float().square().mean().backward()
    sample.float().square().mean().backward()
    theirs, ours = dict(static.named_parameters()), dict(model.named_parameters())
    names = [n for n in theirs if ".norm1.emb." not in n]
    assert len(names) == 2 + 14 * LAYERS + 4
    for name in names:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, msg=name)
    copies = [theirs[f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.bias"].grad for i in range(LAYERS)]
    shared = ours["time_class_embed.timestep_embedder.linear_1.bias"].grad
    distance = float((shared - sum(copies)).norm() / shared.norm())
    assert distance < (0.02 if dtype == torch.bfloat16 else 1e-5)  # one sum is rounded, the other is of rounded parts


def original_forward(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """DiT as its paper's code computes it: cosines first, frequencies 10000^(-i/128), every norm with 1e-6."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "time_class_embed.timestep_embedder.linear_1")
    time = linear(F.silu(time), "time_class_embed.timestep_embedder.linear_2")
    c = F.silu(time + state["time_class_embed.class_embedder.embedding_table.weight"][y])

    def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    p = F.conv2d(x, state["pos_embed.proj.weight"], state["pos_embed.proj.bias"], stride=2)
    x = p.flatten(2).transpose(1, 2) + state["pos_embed.pos_embed"]
    for i in range(LAYERS):
        block = f"transformer_blocks.{i}"
        s1, g1, a1, s2, g2, a2 = linear(c, f"{block}.norm1.linear").chunk(6, dim=1)
        h = modulated(x, s1, g1)
        q, k, v = (linear(h, f"{block}.attn1.to_{n}").unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
        h = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + a1[:, None] * linear(h, f"{block}.attn1.to_out.0")
        h = F.gelu(linear(modulated(x, s2, g2), f"{block}.ff.net.0.proj"), approximate="tanh")
        x = x + a2[:, None] * linear(h, f"{block}.ff.net.2")
    x = linear(modulated(x, *linear(c, "proj_out_1").chunk(2, dim=1)), "proj_out_2")
    out = torch.empty(len(x), x.shape[-1] // 4, SIDE, SIDE)
    for token in range(TOKENS):
        row, col = 2 * (token // (SIDE // 2)), 2 * (token % (SIDE // 2))
        patch = x[:, token].unflatten(-1, (2, 2, -1))
        out[:, :, row : row + 2, col : col + 2] = patch.movedim(-1, 1)
    return out


@torch.no_grad()
def test_shift_0_and_eps_1e_6_compute_the_original_and_the_defaults_do_not() -> None:
    model = tiny_dynamic()
    state = {**model.state_dict(), "pos_embed.pos_embed": model.pos_embed.pos_embed}
    settings = {k: v for k, v in model.config.items() if not k.startswith("_")}
    original = DyDiTTransformer2DModel.from_config({**settings, "norm_eps": 1e-6, "time_freq_shift": 0.0}).eval()
    original.load_state_dict(model.state_dict())
    for x in (inputs([999, 500, 3]), inputs([0.9, 0.25])):  # DiT's integers; SiT's time
        expected = original_forward(state, *x.values())
        torch.testing.assert_close(original(**x, gates="open").sample, expected, atol=1e-5, rtol=1e-5)
    x = inputs([999])
    assert not torch.allclose(model(**x).sample, original_forward(state, *x.values()), atol=1e-2)


# Packed, masked, counted


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one() -> None:
    model = scramble(tiny_dynamic())
    x = inputs([999, 500, 3])
    out = model(**x, collect=True)
    assert len(out.sample) == 3 and not torch.equal(out.masks.heads[:, 0], out.masks.heads[:, 1])
    for i in range(3):
        alone = model(**{k: v[i : i + 1] for k, v in x.items()}, collect=True)
        torch.testing.assert_close(alone.sample[0], out.sample[i], atol=1e-5, rtol=1e-5)
        assert all(torch.equal(a[:, 0], b[:, i]) for a, b in zip(alone.masks, out.masks, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("config", KINDS, ids=str)
@torch.no_grad()
def test_packed_equals_masked_for_mixed_batches_too(config: dict, seed: int) -> None:
    model = scramble(tiny_dynamic(**config), seed)
    for x in (inputs([500] * 4), inputs([900, 200, 900, 500, 501]), inputs([200])):  # 501 is not planned: masked
        masked = model(**x, collect=True)
        model.pack(torch.tensor([900.0, 500.0, 200.0]))
        packed = model(**x, collect=True)
        torch.testing.assert_close(packed.sample, masked.sample, atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(packed.masks, masked.masks, strict=True))
        assert torch.equal(model(**x).sample, packed.sample)
        model.unpack()


@pytest.mark.parametrize("static", STATICS, ids=str)
@torch.no_grad()
def test_packed_equals_masked_in_every_setting(static: dict) -> None:
    model, x = scramble(tiny_dynamic(static)), inputs([500, 500], side=12)
    masked = model(**x).sample
    assert model.pack(torch.tensor([500.0])).distinct == LAYERS
    torch.testing.assert_close(model(**x).sample, masked, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_timestep_serves_a_whole_batch() -> None:
    model, x = scramble(tiny_dynamic()), inputs([500, 500, 500])
    expected = model(**x, collect=True)
    one = {**x, "timestep": x["timestep"][:1]}
    for _ in range(2):
        out = model(**one, collect=True)
        torch.testing.assert_close(out.sample, expected.sample, atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(out.masks, expected.masks, strict=True))
        model.pack(torch.tensor([500.0]))


@torch.no_grad()
def test_a_neighbour_of_a_planned_timestep_is_masked() -> None:
    model = scramble(tiny_dynamic())
    plan = model.pack(torch.tensor([999.0, 500.0, 0.0]))
    assert [plan.step_of(t) for t in (999.0, 998.0, 500.0, 499.0, 1.0, 0.0)] == [0, None, 1, None, None, 2]


def macs(model: torch.nn.Module, x: dict[str, torch.Tensor]) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # CPU's flash kernel counts as 0
        model(**x)
    return counter.get_total_flops() / 2


@pytest.mark.usefixtures("unpadded_rows")
@pytest.mark.parametrize("config", KINDS, ids=str)
@pytest.mark.parametrize("static", STATICS[:3], ids=str)
@torch.no_grad()
def test_cost_equals_what_the_flop_counter_sees_on_the_packed_run(static: dict, config: dict) -> None:
    model = scramble(tiny_dynamic(static, **config))
    tokens = (12 // static.get("patch_size", 2)) ** 2
    cost = model.cost(tokens)
    for t in (900, 500):
        x = inputs([t], side=12)
        ratio = float(cost.ratio(model(**x, collect=True).masks))
        assert ratio < 1
        model.pack(torch.tensor([float(t)]))
        assert macs(model, x) == pytest.approx(ratio * cost.static, rel=5e-3)
    unrouted = tiny_dynamic(static, **{**config, "tokens": False})
    unrouted.pack(torch.tensor([500.0]))
    assert macs(unrouted, inputs([500], side=12)) == pytest.approx(cost.static, rel=1e-6)


@torch.no_grad()
def test_packed_blocks_compute_up_to_three_tokens_more_than_they_cost() -> None:
    model, x = scramble(tiny_dynamic()), inputs([500], side=12)
    cost = model.cost(36)
    exact = float(cost.ratio(model(**x, collect=True).masks)) * cost.static
    model.pack(torch.tensor([500.0]))
    a_token = sum(block.groups_tokens for block in cost.blocks) / 36  # through all channels of all MLPs
    assert exact < macs(model, x) < 1.005 * exact + 3 * a_token


def test_cost_has_a_gradient_and_knows_no_text() -> None:
    model = tiny_dynamic()
    out = model(**inputs([999, 500]), gates=noise(2), collect=True)
    model.cost(TOKENS).ratio(out.masks).mean().backward()
    assert model.dy_width.heads.bias.grad.any() and model.transformer_blocks[0].dy_token.up.bias.grad.any()
    with pytest.raises(ValueError, match="no text tokens; got 5"):
        model.cost(TOKENS, 5)


# Class labels


def test_labels_are_dropped_once_for_all_blocks() -> None:
    model = tiny_dynamic().train()
    model.enable_gradient_checkpointing()
    calls: list[int] = []
    model.time_class_embed.register_forward_hook(lambda *_: calls.append(1))
    x = inputs([500] * 32)
    x["class_labels"] = torch.zeros(32, dtype=torch.long)
    torch.manual_seed(3)
    drawn = model(**x, gates="open").sample
    drawn.sum().backward()
    assert len(calls) == 1  # also while blocks are recomputed
    torch.manual_seed(3)
    drop = torch.rand(32) < 0.1
    assert 0 < int(drop.sum()) < 32
    assert torch.equal(model(**x, gates="open", drop_labels=drop).sample, drawn)
    assert torch.equal(drawn, model.eval()(**{**x, "class_labels": drop.long() * CLASSES}, gates="open").sample)


# Static and back, saved and loaded


def test_from_static_shares_tensors_and_to_static_gives_them_back(tmp_path: Path) -> None:
    static = tiny_dit()
    model = dy.make_dynamic(static)
    assert type(model) is dy.DyDiTTransformer2DModel
    back = model.to_static()
    assert type(back) is DiTTransformer2DModel
    settings = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (back, static)]
    assert settings[0] == settings[1] and len(settings[0]) == 16
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    assert sorted(theirs) == sorted(dict(static.named_parameters()))
    for name, parameter in static.named_parameters():
        if ".norm1.emb." not in name:
            assert ours[name] is parameter and theirs[name] is parameter
        else:
            assert ours["time_class_embed." + name.split(".norm1.emb.")[1]].equal(theirs[name])
    first = "norm1.emb.class_embedder.embedding_table.weight"
    assert theirs[f"transformer_blocks.0.{first}"] is dict(static.named_parameters())[f"transformer_blocks.0.{first}"]
    assert theirs[f"transformer_blocks.1.{first}"] is not theirs[f"transformer_blocks.0.{first}"]
    assert model.pos_embed.pos_embed is static.pos_embed.pos_embed is back.pos_embed.pos_embed
    back.save_pretrained(tmp_path)
    x = inputs([999, 500])
    with torch.no_grad():
        again = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**x).sample, static(**x).sample)
    with pytest.raises(ValueError, match="expected a DiTTransformer2DModel; got a dynamic DyDiT"):
        DyDiTTransformer2DModel.from_static(model)


def test_name_maps_are_inverse() -> None:
    state = tiny_dit().state_dict()
    ours = with_one_embedder(state)
    assert len(ours) == len(state) - 5 * (LAYERS - 1)
    back = with_embedder_per_block(ours, LAYERS)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    assert with_one_embedder(ours) == ours


def test_blocks_with_different_embedders_are_refused() -> None:
    static = tiny_dit()
    with torch.no_grad():
        static.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias[3] += 1e-6
    message = r"transformer_blocks\.2\.norm1\.emb\.timestep_embedder\.linear_2\.bias differs"
    with pytest.raises(ValueError, match=message):
        DyDiTTransformer2DModel.from_static(static)


def test_to_static_refuses_a_frequency_shift_that_the_static_class_has_not() -> None:
    model = DyDiTTransformer2DModel(**dit_config("S/8") | {"num_layers": 1})
    with pytest.raises(ValueError, match=r"time_freq_shift is 0\.0, but DiTTransformer2DModel always computes with 1"):
        model.to_static()


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = scramble(tiny_dynamic(mlp_groups=8))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "DyDiTTransformer2DModel" and config["dynamic"]["mlp_groups"] == 8
    assert config["num_layers"] == LAYERS and config["time_freq_shift"] == 1.0
    x = inputs([999, 500])
    again = DyDiTTransformer2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**x).sample, model(**x).sample)
    half = DyDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dy_width.heads.weight.dtype == torch.float32
    assert half.time_class_embed.timestep_embedder.linear_1.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_static_checkpoint_loads_into_the_dynamic_class(tmp_path: Path) -> None:
    static, x = tiny_dit(), inputs([999, 500])
    static.save_pretrained(tmp_path / "one")
    model = DyDiTTransformer2DModel.from_pretrained(tmp_path / "one").eval()
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(**x).sample, static(**x).sample)
    original = DyDiTTransformer2DModel.from_pretrained(tmp_path / "one", time_freq_shift=0.0, norm_eps=1e-6)
    assert (
        original.time_class_embed.time_proj.downscale_freq_shift == 0
        and original.transformer_blocks[0].norm3.eps == 1e-6
    )
    static.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    with pytest.raises(ValueError, match=r"several files; load it with DiTTransformer2DModel\.from_pretrained"):
        DyDiTTransformer2DModel.from_pretrained(tmp_path / "many")
    model.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert torch.equal(
        DyDiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()(**x).sample, static(**x).sample
    )


@torch.no_grad()
def test_a_pipeline_of_diffusers_is_saved_loaded_and_packed(tmp_path: Path) -> None:
    static = tiny_dit(in_channels=12, out_channels=24, num_embeds_ada_norm=1000, num_layers=1)
    vae, scheduler = PixelAutoencoder(block_out_channels=(1, 1)), DDIMScheduler()
    pipe = DiTPipeline(scramble(DyDiTTransformer2DModel.from_static(static)), vae, scheduler)
    pipe.save_pretrained(tmp_path)
    back = DiTPipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is DyDiTTransformer2DModel
    scheduler.set_timesteps(2)
    plan = dy.pack(back.transformer, scheduler.timesteps.float())
    assert len(plan.blocks) == 2
    options = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "np"}
    one, two = (p(generator=torch.Generator().manual_seed(0), **options).images for p in (pipe, back))
    assert one.shape == (2, 2 * SIDE, 2 * SIDE, 3) and abs(one - two).max() < 1e-5


# Adapters


TARGETS = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear)"


def adapted(kind: str) -> DyDiTTransformer2DModel:
    """Random routers and a random adapter that changes the output a lot."""
    model = scramble(tiny_dynamic())
    if kind == "td_lora":
        add_td_lora(model, TDLoraConfig(target_modules=TARGETS, rank=2, experts=2))
    else:
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(3)
    found = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".td_" in name or ".lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
                found += 1
    assert found == 7 * LAYERS * {"td_lora": 4, "lora": 2}[kind]
    return model.eval()


@pytest.mark.usefixtures("unpadded_rows")
@pytest.mark.parametrize("kind", ["td_lora", "lora"])
@torch.no_grad()
def test_packing_folds_the_adapter_in(kind: str) -> None:
    model, x = adapted(kind), inputs([900, 500, 500])
    masked, masks = model(**x, collect=True)
    with adapters_off(model):
        assert not torch.allclose(model(**x).sample, masked, atol=0.1)
    half = model(**x, cross_attention_kwargs={"scale": 0.5}).sample
    assert not torch.allclose(half, masked, atol=1e-3)
    plan = model.pack(torch.tensor([900.0, 500.0]))
    assert not any("td_" in n or "lora_" in n for block in plan.blocks[0] for n, _ in block.named_parameters())
    packed = model(**x, collect=True)
    torch.testing.assert_close(packed.sample, masked, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(packed.masks, masks, strict=True))
    ratio = float(model.cost(TOKENS).ratio(model(**inputs([500]), collect=True).masks))
    assert macs(model, inputs([500])) == pytest.approx(ratio * model.cost(TOKENS).static, rel=5e-3)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs: scale 0\.5 would not reach the packed"):
        model(**x, cross_attention_kwargs={"scale": 0.5})


def test_a_new_adapter_changes_nothing_and_learns() -> None:
    model = tiny_dynamic()
    x = inputs([999, 500])
    before = model(**x).sample
    add_td_lora(model, TDLoraConfig(target_modules=TARGETS, rank=2, experts=2))
    assert torch.equal(model(**x).sample, before)
    model.enable_gradient_checkpointing()
    model(**x).sample.square().mean().backward()
    ups = [p for n, p in model.named_parameters() if ".td_up." in n]
    assert len(ups) == 7 * LAYERS and all(bool(p.grad.any()) for p in ups)


# Training


@pytest.mark.parametrize("groups", [None, 8])
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(groups: int | None) -> None:
    model = tiny_dynamic(mlp_groups=groups).train()
    x, gates = inputs([999, 500, 3]), noise(3, groups or HEADS)
    drop = torch.tensor([False, True, False])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(**x, gates=gates, collect=True, drop_labels=drop)
        other = model(**x, gates="open", drop_labels=drop).sample  # two forwards before one backward
        cost = model.cost(TOKENS).ratio(out.masks).mean()
        (out.sample.square().mean() + other.square().mean() + cost).backward()
        assert without_gradient(model) == []
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)


# The rest of the contract


@torch.no_grad()
def test_masks_are_named_and_full_where_nothing_is_dynamic() -> None:
    out = tiny_dynamic(heads=False, tokens=False, mlp_groups=8)(**inputs([300, 400]), collect=True)
    assert isinstance(out, DyDiTOutput)
    assert [tuple(m.shape) for m in out.masks] == [(LAYERS, 2, HEADS), (LAYERS, 2, 8), (LAYERS, 2, TOKENS)]
    assert all(bool(m.eq(1).all()) for m in out.masks)


@torch.no_grad()
def test_step_table_says_which_units_work() -> None:
    model = scramble(tiny_dynamic(mlp_groups=8))
    table = model.step_table(torch.tensor([900.0, 500.0]))
    masks = model(**inputs([900, 500]), collect=True).masks
    assert torch.equal(table.heads, masks.heads.bool()) and torch.equal(table.groups, masks.groups.bool())


@torch.no_grad()
def test_bf16_runs_packed_and_masked_alike() -> None:
    model = scramble(tiny_dynamic()).to(torch.bfloat16)
    x = inputs([500, 500])
    x["hidden_states"] = x["hidden_states"].bfloat16()
    masked = model(**x).sample
    model.pack(torch.tensor([500.0]))
    assert masked.dtype == torch.bfloat16
    torch.testing.assert_close(model(**x).sample, masked, atol=0.05, rtol=0.05)


def test_ranking_puts_the_most_important_units_first() -> None:
    static = tiny_dit()
    with torch.no_grad():
        static.transformer_blocks[1].attn1.to_v.weight[16:24] *= 10  # head 2
        static.transformer_blocks[0].ff.net[0].proj.weight[5::16] *= 10  # every 16th channel
    model = DyDiTTransformer2DModel.from_static(static)
    assert model.transformer_blocks[1].dy_head_unit[2] == 0
    assert bool((model.transformer_blocks[0].dy_channel_unit[5::16] == 0).all())
    unranked = DyDiTTransformer2DModel.from_static(static, rank=False)
    assert unranked.transformer_blocks[1].dy_head_unit.tolist() == list(range(HEADS))


@torch.no_grad()
def test_the_chosen_attention_backend_is_used_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scramble(tiny_dynamic())
    model.set_attention_backend("_native_math")
    seen = []
    from dydit_scale.models import dit_blocks, parts

    dispatch = dit_blocks.dispatch_attention_fn
    for module in (dit_blocks, parts):
        monkeypatch.setattr(
            module, "dispatch_attention_fn", lambda *a, backend, **k: (seen.append(backend), dispatch(*a, **k))[1]
        )
    model(**inputs([500]))
    model.pack(torch.tensor([500.0]))
    model(**inputs([500]))
    assert [b.value for b in seen] == ["_native_math"] * 2 * LAYERS


@torch.no_grad()
def test_first_block_cache_finds_the_blocks() -> None:
    model, x = tiny_dynamic(), inputs([500])
    expected = model(**x).sample
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        assert torch.equal(model(**x).sample, expected)
        assert torch.allclose(model(**x).sample, expected, atol=1e-5)
    model.disable_cache()


def test_what_would_silently_be_wrong_is_refused() -> None:
    model = tiny_dynamic()
    with pytest.raises(ValueError, match="do not fuse"):
        model.fuse_qkv_projections()
    for height, width in ((8, 12), (7, 7)):
        x = {**inputs([500]), "hidden_states": torch.randn(1, 3, height, width)}
        with pytest.raises(ValueError, match=f"multiple of the patch, 2; got {height} x {width}"):
            model(**x)
    with pytest.raises(ValueError, match="'flux' reads text tokens"):
        tiny_dynamic(token_router="flux")
    with pytest.raises(ValueError, match=r"activation_fn 'geglu'.*second, gating projection"):
        tiny_dynamic({"activation_fn": "geglu"})
    with pytest.raises(ValueError, match="128 MLP channels cannot be cut into 7"):
        tiny_dynamic(mlp_groups=7)
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1.*ignores head masks"):
        model(**inputs([500]))


@torch.no_grad()
def test_deepcopy_keeps_the_timestep_state_inside_the_copy() -> None:
    model = tiny_dynamic()
    twin = copy.deepcopy(model)
    assert twin.timestep_state is not model.timestep_state
    assert all(b.timestep_state is twin.timestep_state for b in twin.dynamic_blocks())


def test_the_token_router_follows_the_family_where_none_is_named() -> None:
    assert DynamicConfig().for_family("dit").token_router == "dit"
    assert DynamicConfig(token_router="flux").for_family("dit").token_router == "flux"
    assert tiny_dynamic().dynamic.token_router == "dit"
