from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydit_scale as dy
from dydit_scale.adapters.td_lora import TDLoraConfig, adapters_off, add_td_lora
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.families.pixart import (
    DyPixArtOutput,
    DyPixArtTransformer2DModel,
    PixArtSigmaFamily,
    small_pixart_pipeline,
)
from dydit_scale.models.family import Prompts, SampleConfig, SampleSize
from dydit_scale.models.loading import load_transformer
from tests.models.tiny import scramble, without_gradient

HEADS, ROWS, COLS, TEXT, LAYERS = 4, 4, 3, 5, 3
TOKENS = ROWS * COLS
CONFIGS: list[dict[str, Any]] = [
    {},
    {"mlp_groups": 8},
    {"heads": False},
    {"mlp": False},
    {"tokens": False},
    {"heads": False, "mlp": False},
]
KEEP = torch.arange(TEXT) < torch.tensor([2, 5, 3])[:, None]
WORDS = ("a", "red", "ball")


def tiny_pixart(**changes: Any) -> PixArtTransformer2DModel:
    """Three blocks of width 32, with PixArt-Sigma's settings."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": HEADS, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
        "num_layers": LAYERS, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 24,
        "use_additional_conditions": False,
    }  # fmt: skip
    return PixArtTransformer2DModel(**{**settings, **changes}).eval()


def tiny_dynamic(**config: Any) -> DyPixArtTransformer2DModel:
    """The dynamic one, gates open."""
    return DyPixArtTransformer2DModel.from_static(tiny_pixart(), DynamicConfig(**config))


def inputs(timesteps: list[int], seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of a forward, one picture per timestep; padded text in the first and third."""
    g, n = torch.Generator().manual_seed(seed), len(timesteps)
    return {
        "hidden_states": torch.randn(n, 4, 2 * ROWS, 2 * COLS, generator=g),
        "encoder_hidden_states": torch.randn(n, TEXT, 24, generator=g),
        "timestep": torch.tensor(timesteps),
        "encoder_attention_mask": KEEP.long().repeat(-(-n // 3), 1)[:n],
    }


def cast(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}


def noise(batch: int, groups: int = HEADS, seed: int = 2) -> GateNoise:
    g = torch.Generator().manual_seed(seed)
    return GateNoise(*(torch.randn(LAYERS, batch, n, generator=g) for n in (HEADS, groups, TOKENS)))


def macs(model: Any, x: dict[str, Any]) -> float:
    """What the FLOP counter sees; the CPU's flash kernel would count as 0."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_all_gates_open_is_the_static_model_bit_for_bit(config: dict[str, Any], dtype: torch.dtype) -> None:
    static = tiny_pixart().to(dtype)
    model = DyPixArtTransformer2DModel.from_static(static, DynamicConfig(**config))
    dynamic, x = scramble(copy.deepcopy(model)), inputs([10, 600, 999])
    unmasked = {k: v for k, v in x.items() if k != "encoder_attention_mask"}
    for kwargs in (
        x,
        inputs([500]),
        unmasked,
        unmasked | {"encoder_attention_mask": (~KEEP)[:, None] * -1e4},
        x | {"hidden_states": torch.randn(3, 4, 8, 8)},
    ):
        kwargs = cast(kwargs, dtype) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        expected = static(**kwargs).sample
        assert expected.dtype == dtype
        assert torch.equal(model(**kwargs).sample, expected)  # all routers start open
        assert torch.equal(dynamic(**kwargs, gates="open").sample, expected)
        assert not torch.equal(dynamic(**kwargs).sample, expected)
        assert torch.equal(model(**kwargs, return_dict=False)[0], expected)


@pytest.mark.parametrize("changes", [{"caption_channels": None}, {"caption_channels": None, "cross_attention_dim": 24}])
@torch.no_grad()
def test_text_may_come_without_a_projection(changes: dict[str, Any]) -> None:
    static = tiny_pixart(**changes)
    width = static.config["cross_attention_dim"]
    model, x = dy.make_dynamic(static), inputs([10, 600]) | {"encoder_hidden_states": torch.randn(2, TEXT, width)}
    assert torch.equal(model(**x).sample, static(**x).sample)
    assert macs(static, inputs([500]) | {"encoder_hidden_states": torch.randn(1, TEXT, width)}) == pytest.approx(
        model.cost(TOKENS, TEXT).static, rel=1e-6
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_open_gates_train_like_the_static_model(checkpointing: bool, dtype: torch.dtype) -> None:
    static, model = tiny_pixart().to(dtype).train(), scramble(tiny_dynamic()).to(dtype).train()
    x = cast(inputs([10, 999]), dtype)
    if checkpointing:
        static.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    samples = [static(**x).sample, model(**x, gates="open").sample]
    assert torch.equal(*samples)
    for sample in samples:
        sample.float().square().mean().backward()
    ours = dict(model.named_parameters())
    for name, parameter in static.named_parameters():
        assert torch.equal(ours[name].grad, parameter.grad), name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_packed_equals_masked_for_mixed_batches_too(config: dict[str, Any]) -> None:
    model = scramble(tiny_dynamic(**config))
    for x in (inputs([500] * 2), inputs([900, 200, 900, 500, 330]), inputs([200])):
        masked = model(**x, collect=True)  # 330 is not planned: masked
        model.pack(torch.tensor([900.0, 500, 200]))
        packed = model(**x, collect=True)
        torch.testing.assert_close(packed.sample, masked.sample, atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(packed.masks, masked.masks, strict=True))
        assert torch.equal(model(**x).sample, packed.sample)
        model.unpack()


@torch.no_grad()
def test_bf16_runs_packed_and_masked_alike() -> None:
    model, x = scramble(tiny_dynamic()).to(torch.bfloat16), cast(inputs([500, 500]), torch.bfloat16)
    masked = model(**x).sample
    model.pack(torch.tensor([500.0]))
    assert masked.dtype == torch.bfloat16
    torch.testing.assert_close(model(**x).sample, masked, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one() -> None:
    model, x = scramble(tiny_dynamic()), inputs([10, 600, 999])
    out = model(**x, collect=True)
    assert not torch.equal(out.masks.heads[:, 0], out.masks.heads[:, 2])
    for i in range(3):
        alone = model(**{k: v[i : i + 1] for k, v in x.items()}, collect=True)
        torch.testing.assert_close(alone.sample[0], out.sample[i], atol=1e-5, rtol=1e-5)
        assert all(torch.equal(a[:, 0], b[:, i]) for a, b in zip(alone.masks, out.masks, strict=True))


@pytest.mark.usefixtures("unpadded_rows")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_cost_equals_what_the_flop_counter_sees_on_the_packed_run(config: dict[str, Any]) -> None:
    model = scramble(tiny_dynamic(**config))
    cost = model.cost(TOKENS, TEXT)
    assert macs(tiny_pixart(), inputs([500])) == pytest.approx(cost.static, rel=1e-6)
    for t in (500, 900):
        x = inputs([t])
        masks = model(**x, collect=True).masks
        assert float(cost.ratio(masks)) < 0.98
        model.pack(x["timestep"].float())
        assert macs(model, x) == pytest.approx(float(cost.ratio(masks)) * cost.static, rel=5e-3)
        model.unpack()


def test_cost_and_parameters_at_the_size_of_pixart_sigma() -> None:
    with init_empty_weights():
        model = DyPixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(n for name, n in sizes.items() if "dy_" not in name) == 610_856_096  # the paper's 0.6 B
    d = 1152
    assert sum(n for name, n in sizes.items() if "dy_" in name) == 28 * (2 * 15 * (d + 1) + d * 72 + 72 + 72 + 1)
    cost = model.cost(64 * 64, 300)
    cross = sum(block.fixed for block in cost.blocks) / cost.static
    assert cross == pytest.approx(0.12, abs=0.005) and cost.floor(16, 16) < 0.3


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none() -> None:
    for config in CONFIGS[:2]:
        model = tiny_dynamic(**config).train()
        gates = noise(3, groups=config.get("mlp_groups", HEADS))

        def gradients(model: Any = model, gates: GateNoise = gates) -> dict[str, torch.Tensor]:
            model.zero_grad()
            out = model(**inputs([10, 600, 999]), gates=gates, collect=True)
            other = model(**inputs([10, 600, 999]), gates="open").sample  # two forwards before one backward
            cost = model.cost(TOKENS, TEXT).ratio(out.masks).mean()
            (out.sample.square().mean() + other.square().mean() + cost).backward()
            assert without_gradient(model) == []
            return {n: p.grad.clone() for n, p in model.named_parameters()}

        plain = gradients()
        assert any(".dy_token" in n for n in plain) and any(n.startswith("dy_width") for n in plain)
        model.enable_gradient_checkpointing()
        again = gradients()
        assert all(torch.equal(plain[n], again[n]) for n in plain)


def with_td_lora() -> DyPixArtTransformer2DModel:
    """Random routers and a random adapter that changes the output a lot, cross-attention included."""
    model = scramble(tiny_dynamic())
    targets = r".*transformer_blocks\.\d+\..*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)|adaln_single\.linear"
    add_td_lora(model, TDLoraConfig(target_modules=targets, rank=2, experts=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".td_" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


@torch.no_grad()
def test_packing_folds_td_lora_in() -> None:
    model, x = with_td_lora(), inputs([900, 500, 500])
    masked, masks = model(**x, collect=True)
    with adapters_off(model):
        assert not torch.allclose(model(**x).sample, masked, atol=0.1)
    model.pack(torch.tensor([900.0, 500]))
    packed = model(**x, collect=True)
    torch.testing.assert_close(packed.sample, masked, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(packed.masks, masks, strict=True))


def test_td_lora_gets_the_same_gradients_under_checkpointing() -> None:
    model = with_td_lora().train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        one, two = (model(**inputs(t), gates=noise(2)).sample for t in ([100, 900], [300, 400]))
        (one.square().mean() + two.square().mean()).backward()  # two forwards before one backward
        return {n: p.grad.clone() for n, p in model.named_parameters() if ".td_" in n}

    plain = gradients()
    assert plain and all(bool(g.any()) for g in plain.values())
    model.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@torch.no_grad()
def test_masks_are_named_and_full_where_nothing_is_dynamic() -> None:
    out = tiny_dynamic(heads=False, tokens=False, mlp_groups=8)(**inputs([300, 400]), collect=True)
    assert isinstance(out, DyPixArtOutput) and out.sample.shape == (2, 8, 2 * ROWS, 2 * COLS)
    assert [tuple(m.shape) for m in out.masks] == [(LAYERS, 2, HEADS), (LAYERS, 2, 8), (LAYERS, 2, TOKENS)]
    assert all(bool(m.eq(1).all()) for m in out.masks)


def test_from_static_shares_tensors_and_to_static_gives_them_back() -> None:
    static = tiny_pixart(interpolation_scale=2)
    model = dy.make_dynamic(static)
    assert type(model) is DyPixArtTransformer2DModel and model.dynamic.token_router == "dit"
    back = model.to_static()
    assert type(back) is PixArtTransformer2DModel
    changed = {k for k, v in static.config.items() if not k.startswith("_") and back.config[k] != v}
    assert changed == set() and back.config["num_layers"] == LAYERS
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    for name, parameter in static.named_parameters():
        assert ours[name] is parameter and theirs[name] is parameter
    assert model.pos_embed.pos_embed is static.pos_embed.pos_embed is back.pos_embed.pos_embed
    with pytest.raises(ValueError, match="expected a PixArtTransformer2DModel; got a dynamic DyPixArt"):
        DyPixArtTransformer2DModel.from_static(model)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model, x = scramble(tiny_dynamic(mlp_groups=8)), inputs([100, 600])
    model.save_pretrained(tmp_path / "dynamic")
    config = json.loads((tmp_path / "dynamic" / "config.json").read_text())
    assert config["_class_name"] == "DyPixArtTransformer2DModel" and config["dynamic"]["mlp_groups"] == 8
    back = DyPixArtTransformer2DModel.from_pretrained(tmp_path / "dynamic").eval()
    assert torch.equal(back(**x).sample, model(**x).sample)
    half = DyPixArtTransformer2DModel.from_pretrained(tmp_path / "dynamic", dtype=torch.bfloat16)
    assert half.dy_width.heads.weight.dtype == torch.float32 and half.proj_out.weight.dtype == torch.bfloat16
    static = tiny_pixart()
    static.save_pretrained(tmp_path / "static")
    opened = DyPixArtTransformer2DModel.from_pretrained(tmp_path / "static").eval()
    assert torch.equal(opened(**x).sample, static(**x).sample)


def test_what_cannot_work_is_refused_with_a_reason() -> None:
    for config, message in (
        ({"token_router": "flux"}, "token_router: expected 'dit'; got 'flux'.*cross-attention only"),
        ({"single_bypass": "attn_out+mlp"}, "single_bypass: expected 'mlp'"),
        ({"mlp_groups": 7}, "128 MLP channels cannot be cut into 7"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_dynamic(**config)
    alpha = r"use_additional_conditions: {} with sample_size {} is PixArt-alpha at 1024 pixels.*expected False"
    for change, message in (
        ({"activation_fn": "geglu"}, "activation_fn: expected 'gelu-approximate' or 'gelu'.*got 'geglu'"),
        ({"attention_type": "gated"}, "attention_type: expected 'default'"),
        ({"use_additional_conditions": True, "attention_head_dim": 12}, alpha.format("True", 8)),
        ({"use_additional_conditions": None, "sample_size": 128, "attention_head_dim": 12}, alpha.format("None", 128)),
    ):
        with pytest.raises(ValueError, match=message):
            DyPixArtTransformer2DModel.from_static(tiny_pixart(**change))
    model, x = tiny_dynamic(), inputs([100, 600])
    for bad, message in (
        ({"timestep": torch.tensor([5])}, r"timestep: expected \[batch\] for a batch of 2; got \[1\]"),
        ({"timestep": None}, "timestep: expected .* got None"),
        ({"encoder_hidden_states": torch.zeros(1, TEXT, 24)}, r"encoder_hidden_states: expected .* got \[1, 5, 24\]"),
        ({"encoder_attention_mask": KEEP}, r"encoder_attention_mask: expected \[batch, tokens\] or .* got \[3, 5\]"),
        ({"hidden_states": torch.zeros(2, 4, 7, 8)}, r"multiples of the patch, 2; got \[2, 4, 7, 8\]"),
        ({"hidden_states": torch.zeros(2, 4, 8)}, r"expected \[batch, channels, height, width\]"),
        ({"attention_mask": KEEP[:2]}, "attention_mask, cross_attention_kwargs: .* takes neither"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**x, **bad})
    model.transformer_blocks[0].attn2.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn2.*ignores head masks"):
        model(**x)


# The family


def tiny_pipeline() -> PixArtSigmaPipeline:
    """The classes of the published pipeline, with its scheduler."""
    pipe = small_pixart_pipeline(WORDS, heads=HEADS, head_dim=8, layers=2)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=12, scaling_factor=0.13025,
    )  # fmt: skip
    pipe.register_modules(
        vae=vae.eval(), scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: PixArtSigmaPipeline) -> torch.Tensor:
    options = {"num_inference_steps": 3, "height": 16, "width": 24, "clean_caption": False}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        ["a red ball", "a ball"], generator=generator, output_type="pt", use_resolution_binning=False,
        max_sequence_length=12, **options,
    ).images  # fmt: skip


def test_a_whole_pipeline_runs_packed_and_is_loaded_where_only_the_package_is_imported(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    static = pictures(pipe)
    assert static.shape == (2, 3, 16, 24) and bool(static.isfinite().all())
    pipe.register_modules(transformer=dy.make_dynamic(pipe.transformer))
    assert torch.equal(pictures(pipe), static)
    scramble(pipe.transformer)
    masked = pictures(pipe)
    assert not torch.allclose(masked, static, atol=1e-3)
    plan = dy.pack(pipe.transformer, dy.sampler_timesteps(pipe, dy.SampleConfig(steps=3)))
    assert len(plan.blocks) == 3 and plan.bytes > 0
    torch.testing.assert_close(pictures(pipe), masked, atol=1e-4, rtol=0)
    pipe.save_pretrained(tmp_path)
    script = (
        "import dydit_scale, sys; from diffusers import PixArtSigmaPipeline;"
        "print(type(PixArtSigmaPipeline.from_pretrained(sys.argv[1]).transformer).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["DyPixArtTransformer2DModel"], done.stderr[-2000:]


@torch.no_grad()
def test_what_training_sees_is_what_the_pipeline_gives_its_transformer() -> None:
    pipe, family = tiny_pipeline(), PixArtSigmaFamily()
    size, calls = SampleSize(height=16, width=24), []
    pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    config = SampleConfig(steps=3, height=16, width=24, text_tokens=12, cfg=2.0)
    noise = torch.randn(2, *family.latent_shape(pipe, size))
    assert noise.shape == (2, 12, 8, 12) and family.image_tokens(pipe, size) == 24
    drawn = family.draw(pipe, ["a red ball", ""], noise, [torch.Generator()] * 2, config)
    assert drawn.shape == (2, 16, 24, 3)
    assert [float(call["timestep"][0]) for call in calls] == family.timesteps(pipe, config).tolist()
    ours = family.conditions(pipe, Prompts(captions=["a red ball", ""], text_tokens=12), size)
    assert ours["encoder_attention_mask"].sum(1).tolist() == [4, 1]
    for name, tensor in ours.items():
        assert torch.equal(tensor, calls[0][name][2:]), name  # prompts come last
    with pytest.raises(ValueError, match="picture width 18: expected a multiple of 4"):
        family.latent_shape(pipe, SampleSize(height=16, width=18))


def test_the_published_config_names_an_older_class(tmp_path: Path) -> None:
    pipe = small_pixart_pipeline(WORDS, heads=HEADS, head_dim=8, layers=1)
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"PixArtTransformer2DModel"', '"Transformer2DModel"'))
    back = load_transformer(str(tmp_path), PixArtSigmaFamily())
    assert type(back) is PixArtTransformer2DModel
    assert torch.equal(back.proj_out.weight, pipe.transformer.proj_out.weight)
    file.write_text(file.read_text().replace('"ada_norm_single"', '"ada_norm_zero"'))
    with pytest.raises(ValueError, match="its transformer is a DiTTransformer2DModel; expected PixArt"):
        load_transformer(str(tmp_path), PixArtSigmaFamily())
