from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydit_scale as dy
from dydit_scale.adapters.td_lora import TDLoraConfig, adapters_off, add_td_lora
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.encoders import small_text_encoders
from dydit_scale.models.latte import DyLatteOutput, DyLatteTransformer3DModel
from tests.models.tiny import scramble, without_gradient

HEADS, FRAMES, ROWS, COLS, TEXT, LAYERS = 4, 3, 4, 2, 5, 4
PATCHES = ROWS * COLS
TOKENS = FRAMES * PATCHES
CONFIGS: list[dict[str, Any]] = [
    {},
    {"mlp_groups": 8},
    {"heads": False},
    {"mlp": False},
    {"tokens": False},
    {"heads": False, "mlp": False},
]


@pytest.fixture(autouse=True)
def native_attention() -> Iterator[None]:
    """set_attention_backend changes a default of the whole process, which the stock processor does not follow."""
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def tiny_latte(**changes: Any) -> LatteTransformer3DModel:
    """Two spatial and two temporal blocks of width 32, with Latte-1's settings."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": HEADS, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "caption_channels": 24, "video_length": FRAMES,
    }  # fmt: skip
    return LatteTransformer3DModel(**{**settings, **changes}).eval()


def tiny_dynamic(**config: Any) -> DyLatteTransformer3DModel:
    """The dynamic one, gates open."""
    return DyLatteTransformer3DModel.from_static(tiny_latte(), DynamicConfig(**config))


def inputs(timesteps: list[int], frames: int = FRAMES, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of a forward, one video per timestep."""
    g, n = torch.Generator().manual_seed(seed), len(timesteps)
    return {
        "hidden_states": torch.randn(n, 4, frames, 2 * ROWS, 2 * COLS, generator=g),
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": torch.randn(n, TEXT, 24, generator=g),
    }


def with_images(timesteps: list[int], own: bool = False, clip: int = FRAMES) -> dict[str, Any]:
    """The same with two pictures behind the clip; ``own``: they have captions of their own."""
    x = inputs(timesteps, frames=clip + 2) | {"images": 2}
    if own:
        shape = (len(timesteps), min(clip, 1) + 2, TEXT, 24)
        x["encoder_hidden_states"] = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return x


def noise(batch: int, groups: int = HEADS, seed: int = 2, frames: int = FRAMES) -> GateNoise:
    g = torch.Generator().manual_seed(seed)
    return GateNoise(*(torch.randn(LAYERS, batch, n, generator=g) for n in (HEADS, groups, frames * PATCHES)))


def macs(model: Any, x: dict[str, Any]) -> float:
    """What the FLOP counter sees; the CPU's flash kernel would count as 0."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_all_gates_open_is_the_static_model_bit_for_bit(config: dict[str, Any], dtype: torch.dtype) -> None:
    static = tiny_latte().to(dtype)
    model = DyLatteTransformer3DModel.from_static(static, DynamicConfig(**config))
    keep = torch.arange(TEXT).expand(3 * FRAMES, -1) < torch.tensor([2, 5, 3]).repeat_interleave(FRAMES)[:, None]
    for x in (
        inputs([10, 600, 999]),
        inputs([500]),
        inputs([10, 600], frames=1),
        inputs([10, 600], frames=2) | {"enable_temporal_attentions": False},
        inputs([10, 600, 999]) | {"encoder_attention_mask": keep},
        inputs([10, 600, 999]) | {"encoder_attention_mask": keep[:, None].float().log().clamp(min=-1e4)},
    ):
        x = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in x.items()}
        expected = static(**x).sample
        assert expected.dtype == dtype
        assert torch.equal(model(**x).sample, expected)  # all routers start open
        dynamic = scramble(copy.deepcopy(model))
        assert torch.equal(dynamic(**x, gates="open").sample, expected)
        assert not torch.equal(dynamic(**x).sample, expected)
        assert torch.equal(model(**x, return_dict=False)[0], expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_open_gates_train_like_the_static_model(checkpointing: bool, dtype: torch.dtype) -> None:
    static, model = tiny_latte().to(dtype).train(), scramble(tiny_dynamic()).to(dtype).train()
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs([10, 999]).items()}
    if checkpointing:
        static.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    samples = [static(**x).sample, model(**x, gates="open").sample]
    assert torch.equal(*samples)
    for sample in samples:
        sample.float().square().mean().backward()
    ours = dict(model.named_parameters())
    # The modulation's gradient is summed over rows here before it reaches the samples, there after: another rounding.
    tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.05}
    for name, parameter in static.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_a_text_mask_may_be_given_once_per_video() -> None:
    model = scramble(tiny_dynamic())
    keep = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    masked = model(**inputs([900, 200]), encoder_attention_mask=keep).sample
    repeated = model(**inputs([900, 200]), encoder_attention_mask=keep.repeat_interleave(FRAMES, dim=0)).sample
    bias = model(**inputs([900, 200]), encoder_attention_mask=(~keep)[:, None] * -1e4).sample
    assert torch.equal(masked, repeated)
    torch.testing.assert_close(masked, bias)
    assert not torch.allclose(masked[0], model(**inputs([900, 200])).sample[0], atol=1e-3)
    model.pack(torch.tensor([900.0, 200]))
    for mask in (keep, keep.repeat_interleave(FRAMES, dim=0)):
        packed = model(**inputs([900, 200]), encoder_attention_mask=mask).sample
        torch.testing.assert_close(packed, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_packed_equals_masked_for_mixed_batches_too(config: dict[str, Any]) -> None:
    model = scramble(tiny_dynamic(**config))
    still = {"enable_temporal_attentions": False}
    for x in (
        inputs([500] * 2),
        inputs([900, 200, 900, 500, 330]),
        inputs([200]),
        inputs([900, 200]) | still,
        with_images([900, 200, 330], own=True),
        with_images([900, 200], clip=0),
    ):
        masked = model(**x, collect=True)  # 330 is not planned: masked
        model.pack(torch.tensor([900.0, 500, 200]))
        packed = model(**x, collect=True)
        torch.testing.assert_close(packed.sample, masked.sample, atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(packed.masks, masked.masks, strict=True))
        assert torch.equal(model(**x).sample, packed.sample)
        model.unpack()


@pytest.mark.usefixtures("unpadded_rows")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_cost_equals_what_the_flop_counter_sees_on_the_packed_run(config: dict[str, Any]) -> None:
    model = scramble(tiny_dynamic(**config))
    cases = [
        (inputs([500]), {}),
        (inputs([900]), {}),
        (inputs([500], frames=1), {"frames": 1}),
        (inputs([500]) | {"enable_temporal_attentions": False}, {"temporal": False}),
        (with_images([500]), {"images": 2}),
        (with_images([500], clip=0), {"images": 2, "frames": 0}),
    ]
    for x, shape in cases:
        cost = model.cost(x["hidden_states"].shape[2] * PATCHES, TEXT, **shape)
        if "images" not in x:
            assert macs(tiny_latte(), x) == pytest.approx(cost.static, rel=1e-6)
        else:
            assert macs(model, x | {"gates": "open"}) == pytest.approx(cost.static, rel=0.02)  # and the width routers
        masks = model(**x, collect=True).masks
        assert float(cost.ratio(masks)) < 0.98
        model.pack(x["timestep"].float())
        assert macs(model, x) == pytest.approx(float(cost.ratio(masks)) * cost.static, rel=5e-3)
        model.unpack()
    with pytest.raises(ValueError, match="25 tokens cannot be cut into 3 equal frames"):
        model.cost(25, TEXT)


def test_cost_and_parameters_at_the_size_of_latte_1() -> None:
    with init_empty_weights():
        model = DyLatteTransformer3DModel(
            attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, cross_attention_dim=1152,
            attention_bias=True, sample_size=64, patch_size=2, activation_fn="gelu-approximate",
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=4096,
        )  # fmt: skip
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    d = 1152
    block = 4 * (d * d + d) + 8 * d * d + 5 * d + 6 * d
    base = 28 * (2 * block + 4 * (d * d + d)) + 4 * 4 * d + d + 2 * d + 32 * d + 32
    base += 256 * d + d + d * d + d + 6 * (d * d + d) + 4096 * d + d + d * d + d
    assert sum(n for name, n in sizes.items() if "dy_" not in name) == base
    routers = 56 * (2 * 15 * (d + 1) + d * 72 + 72 + 72 + 1)
    assert sum(n for name, n in sizes.items() if "dy_" in name) == routers
    cost = model.cost(16 * 32 * 32, 120)
    assert cost.floor(16, 16) < 0.3 < cost.floor(16, 16, tokens=False) + 0.2
    cross = sum(b.fixed for b in cost.blocks) / cost.static
    assert cross == pytest.approx(0.09, abs=0.005)


@pytest.mark.parametrize(
    ("own", "mask"), [(False, None), (False, "shared"), (True, None), (True, "shared"), (True, "own")]
)
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_pictures_and_clip_do_not_know_of_each_other(packed: bool, own: bool, mask: str | None) -> None:
    model = scramble(tiny_dynamic())
    if packed:
        model.pack(torch.tensor([900.0, 200]))
    x = with_images([900, 200], own=own)
    video, text = x["hidden_states"], x["encoder_hidden_states"]
    keep = None
    if mask == "shared":
        keep = torch.tensor([[True] * 2 + [False] * 3, [True] * 4 + [False]])
    if mask == "own":
        keep = torch.arange(TEXT) < torch.tensor([[[2], [3], [1]], [[5], [4], [2]]])
    out = model(**x, encoder_attention_mask=keep, collect=True)

    def alone(frames: slice, caption: int, **options: Any) -> DyLatteOutput:
        return model(
            video[:, :, frames],
            x["timestep"],
            text[:, caption] if own else text,
            encoder_attention_mask=keep[:, caption] if mask == "own" else keep,
            collect=True,
            **options,
        )

    clip = alone(slice(FRAMES), 0)
    torch.testing.assert_close(out.sample[:, :, :FRAMES], clip.sample, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.masks.tokens[..., :TOKENS], clip.masks.tokens)
    for i in (FRAMES, FRAMES + 1):
        picture = alone(slice(i, i + 1), i - FRAMES + 1, enable_temporal_attentions=False)
        torch.testing.assert_close(out.sample[:, :, i : i + 1], picture.sample, atol=1e-5, rtol=1e-5)
        tokens = out.masks.tokens[..., i * PATCHES : (i + 1) * PATCHES]
        assert torch.equal(tokens, picture.masks.tokens) and not tokens[1::2].any() and bool(tokens[0::2].any())
    if keep is not None:
        assert not torch.allclose(model(**x).sample, out.sample, atol=1e-3)


TARGETS = r".*transformer_blocks\.\d+\.(.*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2))|adaln_single\.linear|proj_out"


def adapted(kind: str) -> DyLatteTransformer3DModel:
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
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", ["td_lora", "lora"])
@torch.no_grad()
def test_packing_folds_the_adapter_in(kind: str) -> None:
    model, x = adapted(kind), inputs([900, 500, 500])
    masked, masks = model(**x, collect=True)
    with adapters_off(model):
        assert not torch.allclose(model(**x).sample, masked, atol=0.1)
    model.pack(torch.tensor([900.0, 500]))
    packed = model(**x, collect=True)
    torch.testing.assert_close(packed.sample, masked, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(packed.masks, masks, strict=True))
    assert not [n for b in model._plan.blocks[0] for n, _ in b.named_modules() if "td_" in n or "lora" in n]


def test_td_lora_trains_with_checkpointing_too() -> None:
    model = tiny_dynamic()
    add_td_lora(model, TDLoraConfig(target_modules=TARGETS, rank=2, experts=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".td_" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        one, two = (model.train()(**inputs(t), gates=noise(2)).sample for t in ([100, 900], [300, 400]))
        (one.square().mean() + two.square().mean()).backward()  # two forwards before one backward
        return {n: p.grad.clone() for n, p in model.named_parameters() if ".td_" in n}

    plain = gradients()
    assert plain and all(bool(g.any()) for g in plain.values())
    model.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(config: dict[str, Any], images: int) -> None:
    model = tiny_dynamic(**config).train()
    x = with_images([10, 600, 999], own=True) if images else inputs([10, 600, 999])
    gates = noise(3, groups=config.get("mlp_groups", HEADS), frames=FRAMES + images)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(**x, gates=gates, collect=True)
        other = model(**x, gates="open").sample  # two forwards before one backward
        cost = model.cost((FRAMES + images) * PATCHES, TEXT, images=images).ratio(out.masks).mean()
        (out.sample.square().mean() + other.square().mean() + cost).backward()
        assert without_gradient(model) == []
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one() -> None:
    model, x = scramble(tiny_dynamic()), inputs([10, 600, 999])
    out = model(**x, collect=True)
    assert not torch.equal(out.masks.heads[:, 0], out.masks.heads[:, 2])
    for i in range(3):
        alone = model(**{k: v[i : i + 1] for k, v in x.items()}, collect=True)
        torch.testing.assert_close(alone.sample[0], out.sample[i], atol=1e-5, rtol=1e-5)
        assert all(torch.equal(a[:, 0], b[:, i]) for a, b in zip(alone.masks, out.masks, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1], ids=["spatial", "temporal"])
def test_token_gates_are_counted_frame_by_frame_in_both_kinds_of_block(layer: int) -> None:
    model, frame, place = tiny_dynamic(heads=False, mlp=False), 2, 3
    outputs: list[torch.Tensor] = []
    model.dynamic_blocks()[layer].register_forward_hook(lambda m, args, out: outputs.append(out[0]))
    on = GateNoise(*(torch.full((LAYERS, 2, n), 100.0) for n in (HEADS, HEADS, TOKENS)))
    off = GateNoise(*(x.clone() for x in on))
    off.tokens[layer, 1, frame * PATCHES + place] = -100.0
    masks = [model(**inputs([10, 600]), gates=gates, collect=True).masks.tokens for gates in (on, off)]
    assert torch.equal(masks[0] - masks[1], (off.tokens < 0).float())
    changed = (outputs[0] != outputs[1]).any(-1).nonzero().tolist()
    assert changed == [[FRAMES + frame, place] if layer == 0 else [PATCHES + place, frame]]


@torch.no_grad()
def test_masks_are_named_and_full_where_nothing_is_dynamic() -> None:
    model, x = tiny_dynamic(heads=False, tokens=False, mlp_groups=8), inputs([300, 400])
    out = model(**x, collect=True)
    assert isinstance(out, DyLatteOutput) and out.sample.shape == (2, 8, FRAMES, 2 * ROWS, 2 * COLS)
    assert [tuple(m.shape) for m in out.masks] == [(LAYERS, 2, HEADS), (LAYERS, 2, 8), (LAYERS, 2, TOKENS)]
    assert all(bool(m.eq(1).all()) for m in out.masks)
    still = model(**x, collect=True, enable_temporal_attentions=False).masks
    assert all(bool(m[0::2].eq(1).all()) and not m[1::2].any() for m in still)


def test_from_static_shares_tensors_and_to_static_gives_them_back() -> None:
    static = tiny_latte()
    model = dy.make_dynamic(static)
    assert type(model) is DyLatteTransformer3DModel and model.dynamic.token_router == "dit"
    back = model.to_static()
    assert type(back) is LatteTransformer3DModel
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    for name, parameter in static.named_parameters():
        assert ours[name] is parameter and theirs[name] is parameter
    buffers = dict(static.named_buffers())
    assert len(buffers) == 2
    assert all(dict(m.named_buffers())[n] is buffer for n, buffer in buffers.items() for m in (model, back))
    with pytest.raises(ValueError, match="expected a LatteTransformer3DModel; got a dynamic DyLatte"):
        DyLatteTransformer3DModel.from_static(model)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = scramble(tiny_dynamic(mlp_groups=8))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "DyLatteTransformer3DModel" and config["dynamic"]["mlp_groups"] == 8
    x = inputs([100, 600])
    assert torch.equal(DyLatteTransformer3DModel.from_pretrained(tmp_path).eval()(**x).sample, model(**x).sample)
    half = DyLatteTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dy_width.heads.weight.dtype == torch.float32 and half.proj_out.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_a_static_checkpoint_loads_into_the_dynamic_class_with_open_routers(tmp_path: Path) -> None:
    static = tiny_latte()
    static.save_pretrained(tmp_path)
    model = DyLatteTransformer3DModel.from_pretrained(tmp_path).eval()
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(**inputs([100, 600])).sample, static(**inputs([100, 600])).sample)


@torch.no_grad()
def test_bf16_runs_packed_and_masked_alike() -> None:
    model = scramble(tiny_dynamic()).to(torch.bfloat16)
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs([500, 500]).items()}
    masked = model(**x).sample
    model.pack(torch.tensor([500.0]))
    assert masked.dtype == torch.bfloat16
    torch.testing.assert_close(model(**x).sample, masked, atol=0.05, rtol=0.05)


def test_ranking_puts_the_most_important_units_first() -> None:
    static = tiny_latte()
    with torch.no_grad():
        static.temporal_transformer_blocks[0].attn1.to_v.weight[16:24] *= 10  # head 2
        static.transformer_blocks[1].ff.net[0].proj.weight[5::4] *= 10  # every 4th channel
    blocks = DyLatteTransformer3DModel.from_static(static).dynamic_blocks()
    assert blocks[1].dy_head_unit[2] == 0
    assert bool((blocks[2].dy_channel_unit[5::4] == 0)[:-1].all())
    unranked = DyLatteTransformer3DModel.from_static(static, rank=False).dynamic_blocks()
    assert unranked[1].dy_head_unit.tolist() == list(range(HEADS))


@torch.no_grad()
def test_equal_sub_blocks_are_shared_and_memory_is_bounded() -> None:
    model, steps = tiny_dynamic(), torch.tensor([900.0, 600, 300])
    plan = model.pack(steps, max_bytes=0)
    assert plan.distinct == LAYERS and plan.bytes == 0  # all open: views of the model's own weights
    scramble(model)
    assert model.pack(steps).bytes > 0
    assert model.step_table(steps).heads.shape == (LAYERS, 3, HEADS)
    with pytest.raises(ValueError, match="more than max_bytes"):
        model.pack(steps, max_bytes=1000)


@torch.no_grad()
def test_the_chosen_attention_backend_is_used_packed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def record(*args: Any, backend: str, **kwargs: Any) -> torch.Tensor:
        used.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    for module in ("latte_blocks", "parts"):
        monkeypatch.setattr(f"dydit_scale.models.{module}.dispatch_attention_fn", record)
    model = scramble(tiny_dynamic())
    model.set_attention_backend("_native_math")
    model(**inputs([500]))
    model.pack(torch.tensor([500.0]))
    model(**inputs([500]))
    assert used == ["_native_math"] * 12  # 4 blocks' self-attention and 2 cross-attentions, twice


@torch.no_grad()
def test_deepcopy_keeps_the_timestep_state_inside_the_copy() -> None:
    model = tiny_dynamic()
    twin = copy.deepcopy(model)
    assert twin.timestep_state is not model.timestep_state
    assert all(b.timestep_state is twin.timestep_state for b in twin.dynamic_blocks())


def test_what_cannot_work_is_refused_with_a_reason() -> None:
    for config, message in (
        ({"token_router": "flux"}, "token_router: expected 'dit'.*temporal blocks have none"),
        ({"single_bypass": "attn_out+mlp"}, "single_bypass: expected 'mlp'"),
        ({"mlp_groups": 7}, "128 MLP channels cannot be cut into 7"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_dynamic(**config)
    for change, message in (
        ({"norm_type": "layer_norm"}, "norm_type: expected 'ada_norm_single'.*class-conditional"),
        ({"activation_fn": "geglu"}, "activation_fn: expected 'gelu-approximate'.*'geglu'"),
    ):
        with pytest.raises(ValueError, match=message):
            DyLatteTransformer3DModel.from_static(tiny_latte(**change))
    model, x = tiny_dynamic(), inputs([100, 600])
    for bad, message in (
        ({"timestep": torch.tensor([5])}, r"timestep: expected one for each of the 2 videos; got \[1\]"),
        ({"encoder_hidden_states": torch.zeros(1, TEXT, 24)}, r"encoder_hidden_states: expected .* got \[1, 5, 24\]"),
        ({"hidden_states": x["hidden_states"][:, :, 0]}, "hidden_states: expected .*frames"),
        ({"hidden_states": x["hidden_states"][:, :, :2]}, "2 frames, but the temporal positions are those of 3"),
        ({"images": 1}, "2 frames, but the temporal positions are those of 3"),
        ({"images": 4}, "images: expected 0 to 3, the number of frames; got 4"),
        (
            {"encoder_hidden_states": torch.zeros(2, 2, TEXT, 24)},
            r"or \[batch 2, 1, tokens, channels\].*\[2, 2, 5, 24\]",
        ),
        ({"encoder_attention_mask": torch.ones(2, TEXT)}, "holds booleans"),
        ({"encoder_attention_mask": torch.ones(5, TEXT).bool()}, r"got \[5, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**x, **bad})
    with pytest.raises(ValueError, match="do not fuse"):
        model.fuse_qkv_projections()
    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0].attn1)
    registry.register_hook(ModelHook(), "a cache, say")
    with pytest.raises(ValueError, match=r"Attention has a hook around its forward.*pack before"):
        model.pack(torch.tensor([500.0]))
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1.*ignores head masks"):
        model(**x)


def small_pipeline() -> LattePipeline:
    _, _, t5, tokenizer = small_text_encoders(("a", "red", "ball"), dim=32)
    transformer = tiny_latte(caption_channels=32)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipe = LattePipeline(
        tokenizer=tokenizer, text_encoder=t5, vae=vae.eval(), transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: LattePipeline) -> torch.Tensor:
    options = {"num_inference_steps": 3, "video_length": FRAMES, "height": 16, "width": 16, "clean_caption": False}
    generator = torch.Generator().manual_seed(0)
    return pipe(["a red ball", "a ball"], generator=generator, output_type="pt", **options).frames


def test_a_whole_pipeline_runs_packed_and_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = small_pipeline()
    static = video(pipe)
    assert static.shape == (2, FRAMES, 3, 16, 16) and bool(static.isfinite().all())
    pipe.register_modules(transformer=dy.make_dynamic(pipe.transformer))
    assert torch.equal(video(pipe), static)
    scramble(pipe.transformer)
    masked = video(pipe)
    assert not torch.allclose(masked, static, atol=1e-3)
    plan = dy.pack(pipe.transformer, pipe.scheduler.timesteps.float())
    assert len(plan.blocks) == 3 and plan.bytes > 0
    torch.testing.assert_close(video(pipe), masked, atol=1e-4, rtol=0)
    pipe.save_pretrained(tmp_path)
    back = LattePipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is DyLatteTransformer3DModel
    back.set_progress_bar_config(disable=True)
    assert torch.equal(video(back), masked)
