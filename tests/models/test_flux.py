from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dydit_scale.adapters.td_lora import TDLoraConfig, adapters_off, add_td_lora
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.flux import DyFluxOutput, DyFluxTransformer2DModel
from dydit_scale.models.small import small_flux_pipeline
from tests.models.tiny import (
    BATCH,
    HEADS,
    IMAGE,
    LAYERS,
    TEXT,
    inputs,
    noise,
    scramble,
    tiny_dynamic,
    tiny_flux,
    without_gradient,
)

TOKENS = TEXT + IMAGE
KINDS = [
    {"token_router": router, "single_bypass": bypass, "mlp_groups": groups}
    for router in ("dit", "flux")
    for bypass in ("mlp", "attn_out+mlp")
    for groups in (None, 8)
]
PARTS = [{"heads": False}, {"mlp": False}, {"tokens": False}, {"heads": False, "mlp": False}]


@pytest.mark.parametrize("config", KINDS + PARTS, ids=str)
@torch.no_grad()
def test_all_gates_open_is_the_static_model_bit_for_bit(config: dict) -> None:
    static, model = tiny_flux(), tiny_dynamic(**config)
    x = inputs([0.1, 0.6, 0.95])
    expected = static(**x).sample
    assert torch.equal(model(**x).sample, expected)  # all routers start open
    scramble(model)
    assert torch.equal(model(**x, gates="open").sample, expected)
    assert not torch.equal(model(**x).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_open_gates_train_like_the_static_model(dtype: torch.dtype, checkpointing: bool) -> None:
    static, model = tiny_flux().to(dtype).train(), scramble(tiny_dynamic()).to(dtype).train()
    x = {k: v.to(dtype) if k != "timestep" and v.is_floating_point() else v for k, v in inputs([0.1, 0.95]).items()}
    if checkpointing:
        static.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    expected, sample = static(**x).sample, model(**x, gates="open").sample
    assert torch.equal(sample, expected)
    expected.float().square().mean().backward()
    sample.float().square().mean().backward()
    ours = dict(model.named_parameters())
    for name, parameter in static.named_parameters():
        assert parameter.grad is not None and parameter.grad.any()
        tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 0.05}
        torch.testing.assert_close(ours[name].grad, parameter.grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("config", KINDS + PARTS, ids=str)
@torch.no_grad()
def test_packed_equals_masked_for_mixed_batches_too(config: dict) -> None:
    timesteps = [0.9, 0.5, 0.2]
    model = scramble(tiny_dynamic(**config))
    for x in (inputs([0.5] * 4), inputs([0.9, 0.2, 0.9, 0.5, 0.33]), inputs([0.2])):  # 0.33 is not planned: masked
        masked = model(**x).sample
        model.pack(torch.tensor(timesteps))
        torch.testing.assert_close(model(**x).sample, masked, atol=1e-5, rtol=0)
        model.unpack()


@pytest.mark.parametrize("bypass", ["mlp", "attn_out+mlp"])
@pytest.mark.parametrize(
    "shape", [(3, 1, 1, TOKENS), (3, TOKENS), (3, 1, TOKENS, TOKENS), (1, 1, TOKENS, TOKENS), (TOKENS, TOKENS)], ids=str
)
@torch.no_grad()
def test_an_attention_mask_reaches_packed_blocks(shape: tuple[int, ...], bypass: str) -> None:
    model, x = scramble(tiny_dynamic(single_bypass=bypass)), inputs([0.5, 0.5, 0.2])
    options = {"attention_mask": 8 * torch.rand(shape, generator=torch.Generator().manual_seed(0))}
    masked = model(**x, joint_attention_kwargs=options).sample
    assert not torch.allclose(masked, model(**x).sample, atol=1e-3)
    model.pack(torch.tensor([0.5, 0.2]))
    torch.testing.assert_close(model(**x, joint_attention_kwargs=options).sample, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, TOKENS), (3, HEADS, 1, TOKENS), (3, 1, TOKENS - 1, TOKENS), (TOKENS,)], ids=str)
@torch.no_grad()
def test_packed_blocks_refuse_a_mask_that_they_cannot_follow(shape: tuple[int, ...]) -> None:
    model, x = scramble(tiny_dynamic()), inputs([0.5, 0.5, 0.2])
    model.pack(torch.tensor([0.5, 0.2]))
    with pytest.raises(ValueError, match=rf"for 3 samples of {TOKENS} tokens; got \[{shape[0]}"):
        model(**x, joint_attention_kwargs={"attention_mask": torch.zeros(shape)})


@torch.no_grad()
def test_tokens_that_miss_attention_ask_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, asked = scramble(tiny_dynamic(single_bypass="attn_out+mlp")), inputs([0.5]), []

    def record(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append((query.shape[1], key.shape[1]))
        return dispatch_attention_fn(query, key, *args, **kwargs)

    monkeypatch.setattr("dydit_scale.models.parts.dispatch_attention_fn", record)
    model.pack(torch.tensor([0.5]), kernel_layout=False)  # no rows to fill up
    kept = model(**x, collect=True).masks.tokens.sum(-1).flatten().int().tolist()
    doubles = len(model.transformer_blocks)
    assert min(kept[doubles:]) < IMAGE
    assert asked == [(TOKENS, TOKENS)] * doubles + [(TEXT + n, TOKENS) for n in kept[doubles:]]


@torch.no_grad()
def test_without_an_always_on_unit_the_first_may_be_off_but_not_all_heads() -> None:
    model, x = scramble(tiny_dynamic(always_on=False)), inputs([0.5, 0.5])
    for router in (model.dy_width.heads, model.dy_width.groups):
        assert router is not None and router.bias.shape == (LAYERS, HEADS)
        router.weight.zero_()
        router.bias.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    masks = model(**x, collect=True).masks
    assert masks.heads[..., 0].sum() == 0 and masks.heads.mean() == masks.groups.mean() == 0.5
    masked = model(**x).sample
    model.pack(torch.tensor([0.5]))
    torch.testing.assert_close(model(**x).sample, masked, atol=1e-5, rtol=0)
    model.dy_width.heads.bias[1].fill_(-1.0)
    with pytest.raises(ValueError, match=r"layer 1 has no head on at timestep 0\.5"):
        model.pack(torch.tensor([0.5]))


@pytest.mark.usefixtures("unpadded_rows")
@pytest.mark.parametrize("config", KINDS + PARTS, ids=str)
@torch.no_grad()
def test_cost_equals_what_the_flop_counter_sees_on_the_packed_run(config: dict) -> None:
    model = scramble(tiny_dynamic(**config))
    cost = model.cost(IMAGE, TEXT)
    for t in (0.9, 0.5):
        x = inputs([t])
        masks = model(**x, collect=True).masks
        model.pack(torch.tensor([t]))
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):  # the CPU's flash kernel counts as 0
            model(**x)
        predicted = float(cost.ratio(masks)) * cost.static
        assert counter.get_total_flops() / 2 == pytest.approx(predicted, rel=5e-3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny_flux()(**inputs([0.5]))
    assert counter.get_total_flops() / 2 == pytest.approx(cost.static, rel=1e-6)


TARGETS = (
    r".*transformer_blocks\.\d+\..*(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out"
    r"|net\.0\.proj|net\.2|proj_mlp|proj_out|norm1?\.linear)"
)


def adapted(kind: str) -> DyFluxTransformer2DModel:
    """Random routers and a random adapter that changes the output a lot."""
    model = scramble(tiny_dynamic())
    if kind == "td_lora":
        add_td_lora(model, TDLoraConfig(target_modules=TARGETS, rank=2, experts=2))
    else:
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".td_" in name or ".lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.usefixtures("unpadded_rows")
@pytest.mark.parametrize("kind", ["td_lora", "lora"])
@torch.no_grad()
def test_packing_folds_the_adapter_in(kind: str) -> None:
    model, x = adapted(kind), inputs([0.9, 0.5, 0.5])
    masked, masks = model(**x, collect=True)
    with adapters_off(model):
        assert not torch.allclose(model(**x).sample, masked, atol=0.1)
    model.pack(torch.tensor([0.9, 0.5]))
    packed = model(**x, collect=True)
    torch.testing.assert_close(packed.sample, masked, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(packed.masks, masks, strict=True))
    one = inputs([0.5])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ratio = float(model.cost(IMAGE, TEXT).ratio(model(**one, collect=True).masks))
    assert counter.get_total_flops() / 2 == pytest.approx(ratio * model.cost(IMAGE, TEXT).static, rel=5e-3)
    with pytest.raises(ValueError, match="unpack it first"), adapters_off(model):
        pass


@torch.no_grad()
def test_packed_slices_refuse_another_strength_of_the_adapter() -> None:
    model, x = adapted("lora"), inputs([0.5])
    full = model(**x).sample
    half = model(**x, joint_attention_kwargs={"scale": 0.5}).sample
    assert not torch.allclose(half, full, atol=1e-3)
    model.pack(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="would not reach the packed"):
        model(**x, joint_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(model(**x, joint_attention_kwargs={"scale": 1.0}).sample, full, atol=1e-5, rtol=1e-4)


def test_training_and_moving_forget_the_plan_and_staying_does_not() -> None:
    model = tiny_dynamic()
    model.pack(torch.tensor([0.5]))
    model.to("cpu")
    assert model._plan is not None
    model.train()
    assert model._plan is None


@torch.no_grad()
def test_a_whole_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = small_flux_pipeline(("a", "red"), heads=4, head_dim=8, double_blocks=1, single_blocks=1)
    dynamic = scramble(DyFluxTransformer2DModel.from_static(pipe.transformer.eval()))
    pipe.register_modules(transformer=dynamic)
    pipe.save_pretrained(tmp_path)
    back = FluxPipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is DyFluxTransformer2DModel
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 8, "output_type": "np"}
    one, two = (p("a red", generator=torch.Generator().manual_seed(0), **options).images for p in (pipe, back))
    assert (one == two).all()


def test_cost_counts_the_guidance_embedder() -> None:
    static = tiny_flux(guidance=True)
    model = DyFluxTransformer2DModel.from_static(static)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        static(**inputs([0.5]), guidance=torch.ones(1))
    assert counter.get_total_flops() / 2 == pytest.approx(model.cost(IMAGE, TEXT).static, rel=1e-6)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(config: dict) -> None:
    model = tiny_dynamic(**config).train()
    x, gates = inputs([0.1, 0.6, 0.95]), noise(groups=config["mlp_groups"] or HEADS)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(**x, gates=gates, collect=True)
        other = model(**x, gates="open").sample  # two forwards before one backward
        cost = model.cost(IMAGE, TEXT).ratio(out.masks).mean()
        (out.sample.square().mean() + other.square().mean() + cost).backward()
        assert without_gradient(model) == []
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one() -> None:
    model = scramble(tiny_dynamic())
    x = inputs([0.1, 0.6, 0.95])
    out = model(**x, collect=True)
    for i in range(BATCH):
        one = {k: v[i : i + 1] if v.shape[0] == BATCH else v for k, v in x.items()}
        alone = model(**one, collect=True)
        torch.testing.assert_close(alone.sample[0], out.sample[i], atol=1e-5, rtol=1e-5)
        assert all(torch.equal(a[:, 0], b[:, i]) for a, b in zip(alone.masks, out.masks, strict=True))


@torch.no_grad()
def test_masks_are_named_and_full_where_nothing_is_dynamic() -> None:
    out = tiny_dynamic(heads=False, tokens=False, mlp_groups=8)(**inputs([0.3, 0.4]), collect=True)
    assert isinstance(out, DyFluxOutput)
    assert [tuple(m.shape) for m in out.masks] == [(LAYERS, 2, HEADS), (LAYERS, 2, 8), (LAYERS, 2, IMAGE)]
    assert all(bool(m.eq(1).all()) for m in (out.masks.heads, out.masks.tokens))


def test_from_static_shares_tensors_and_to_static_gives_them_back() -> None:
    static = tiny_flux()
    model = DyFluxTransformer2DModel.from_static(static)
    back = model.to_static()
    assert type(back) is FluxTransformer2DModel
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    for name, parameter in static.named_parameters():
        assert ours[name] is parameter and theirs[name] is parameter
    with pytest.raises(ValueError, match="expected a FluxTransformer2DModel; got a dynamic DyFlux"):
        DyFluxTransformer2DModel.from_static(model)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = scramble(tiny_dynamic(mlp_groups=8, single_bypass="attn_out+mlp"))
    model.save_pretrained(tmp_path / "dynamic")
    config = json.loads((tmp_path / "dynamic" / "config.json").read_text())
    assert config["_class_name"] == "DyFluxTransformer2DModel" and config["dynamic"]["mlp_groups"] == 8
    x = inputs([0.1, 0.6])
    assert torch.equal(
        DyFluxTransformer2DModel.from_pretrained(tmp_path / "dynamic").eval()(**x).sample, model(**x).sample
    )
    half = DyFluxTransformer2DModel.from_pretrained(tmp_path / "dynamic", dtype=torch.bfloat16)
    assert half.dy_width.heads.weight.dtype == torch.float32 and half.x_embedder.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_static_checkpoint_loads_into_the_dynamic_class_with_open_routers(tmp_path: Path) -> None:
    static = tiny_flux()
    static.save_pretrained(tmp_path)
    model = DyFluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert not any(p.is_meta for p in model.parameters())
    x = inputs([0.1, 0.6])
    assert torch.equal(model(**x).sample, static(**x).sample)


@torch.no_grad()
def test_bf16_runs_packed_and_masked_alike() -> None:
    model = scramble(tiny_dynamic()).to(torch.bfloat16)
    x = {k: v if k == "timestep" else v.bfloat16() for k, v in inputs([0.5, 0.5]).items()}
    masked = model(**x).sample
    model.pack(torch.tensor([0.5]))
    assert masked.dtype == torch.bfloat16
    torch.testing.assert_close(model(**x).sample, masked, atol=0.05, rtol=0.05)


def test_ranking_puts_the_most_important_units_first() -> None:
    static = tiny_flux()
    with torch.no_grad():
        static.single_transformer_blocks[0].attn.to_v.weight[16:24] *= 10  # head 2
        static.transformer_blocks[0].ff.net[0].proj.weight[5::16] *= 10  # every 16th channel
    model = DyFluxTransformer2DModel.from_static(static)
    assert model.single_transformer_blocks[0].dy_head_unit[2] == 0
    assert bool((model.transformer_blocks[0].dy_channel_unit[5::16] == 0).all())
    unranked = DyFluxTransformer2DModel.from_static(static, rank=False)
    assert unranked.single_transformer_blocks[0].dy_head_unit.tolist() == list(range(HEADS))


@torch.no_grad()
def test_equal_sub_blocks_are_shared_and_memory_is_bounded() -> None:
    model = tiny_dynamic()
    plan = model.pack(torch.linspace(1, 0.1, 10), max_bytes=0)
    assert plan.distinct == LAYERS and plan.bytes == 0  # all open: views of the model's own weights
    scramble(model)
    assert model.pack(torch.linspace(1, 0.1, 10)).bytes > 0
    with pytest.raises(ValueError, match="more than max_bytes"):
        model.pack(torch.linspace(1, 0.1, 10), max_bytes=1000)
    model.pack(torch.tensor([0.5]))
    model.to(torch.float64)
    assert model._plan is None  # slices of the old dtype would be wrong


def test_what_would_silently_drop_masks_is_refused() -> None:
    model = tiny_dynamic()
    with pytest.raises(ValueError, match="do not fuse"):
        model.fuse_qkv_projections()
    model.transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn.*ignores head masks"):
        model(**inputs([0.5]))


@torch.no_grad()
def test_the_chosen_attention_backend_stays() -> None:
    model = scramble(tiny_dynamic())
    model.set_attention_backend("_native_math")
    backends = {type(p).__name__: p._attention_backend for p in model.attn_processors.values()}
    assert list(backends) == ["DyFluxAttnProcessor"] and backends["DyFluxAttnProcessor"] is not None
    plan = model.pack(torch.tensor([0.5]))
    assert all(b.attn.processor._attention_backend == backends["DyFluxAttnProcessor"] for b in plan.blocks[0])


@torch.no_grad()
def test_controlnet_residuals_are_added_where_the_static_model_adds_them() -> None:
    static, model = tiny_flux(), tiny_dynamic()
    x = inputs([0.2, 0.3])
    g = torch.Generator().manual_seed(0)
    control = {
        "controlnet_block_samples": [torch.randn(2, IMAGE, 32, generator=g)],
        "controlnet_single_block_samples": [torch.randn(2, IMAGE, 32, generator=g)],
    }
    assert torch.equal(model(**x, **control).sample, static(**x, **control).sample)


@torch.no_grad()
def test_deepcopy_keeps_the_timestep_state_inside_the_copy() -> None:
    model = tiny_dynamic()
    twin = copy.deepcopy(model)
    assert twin.timestep_state is not model.timestep_state
    assert all(b.timestep_state is twin.timestep_state for b in twin.dynamic_blocks())


def test_bad_configs_name_the_field() -> None:
    cases = {"token_router": "x", "single_bypass": "x", "temperature": 0.0, "mlp_groups": 0, "token_bottleneck": -1}
    for field, value in cases.items():
        with pytest.raises((ValueError, TypeError), match=field):  # TypeError: the tests' own type checks
            DynamicConfig(**{field: value})
    with pytest.raises(ValueError, match="128 MLP channels cannot be cut into 7"):
        tiny_dynamic(mlp_groups=7)
