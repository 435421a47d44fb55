from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydit_scale as dy
from dydit_scale.adapters.td_lora import TDLoraConfig, adapters_off, add_td_lora
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.class_latte import LATTE_CLASSES, ClassLatteTransformer3DModel, class_latte_config
from dydit_scale.models.dy_class_latte import DyClassLatteOutput, DyClassLatteTransformer3DModel
from tests.models.tiny import scramble, without_gradient

HEADS, FRAMES, ROWS, COLS, CLASSES, LAYERS = 4, 3, 4, 2, 5, 4
PATCHES = ROWS * COLS
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
    """set_attention_backend changes a default of the whole process."""
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def tiny_static(**changes: Any) -> ClassLatteTransformer3DModel:
    """Two spatial and two temporal blocks of width 32."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": HEADS, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
        "num_layers": LAYERS, "sample_size": 8, "num_classes": CLASSES, "video_length": FRAMES,
    }  # fmt: skip
    return ClassLatteTransformer3DModel(**{**settings, **changes}).eval()


def tiny_dynamic(static: dict[str, Any] | None = None, **config: Any) -> DyClassLatteTransformer3DModel:
    """The dynamic one, gates open."""
    return DyClassLatteTransformer3DModel.from_static(tiny_static(**(static or {})), DynamicConfig(**config))


def inputs(
    timesteps: list[int], images: int = 0, clip: int = FRAMES, own: bool = False, labels: bool = True, seed: int = 1
) -> dict[str, Any]:
    """Keyword arguments of a forward, one sample per timestep; ``own``: the pictures have labels of their own."""
    g, n = torch.Generator().manual_seed(seed), len(timesteps)
    x: dict[str, Any] = {
        "hidden_states": torch.randn(n, 3, clip + images, 2 * ROWS, 2 * COLS, generator=g),
        "timestep": torch.tensor(timesteps),
    }
    if labels:
        given = torch.randint(CLASSES + 1, (n, min(clip, 1) + images), generator=g)
        x["class_labels"] = given if own else given[:, 0]
    return {**x, "images": images} if images else x


CASES: dict[str, dict[str, Any]] = {
    "clips": {"timesteps": [999, 500, 3]},
    "clips and pictures": {"timesteps": [999, 500], "images": 2},
    "pictures with labels": {"timesteps": [999, 500], "images": 2, "own": True},
    "pictures alone": {"timesteps": [999, 500], "images": 2, "clip": 0, "own": True},
}


def noise(batch: int, groups: int = HEADS, frames: int = FRAMES) -> GateNoise:
    g = torch.Generator().manual_seed(2)
    return GateNoise(*(torch.randn(LAYERS, batch, n, generator=g) for n in (HEADS, groups, frames * PATCHES)))


def in_dtype(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {**x, "hidden_states": x["hidden_states"].to(dtype)}


def macs(model: Any, x: dict[str, Any]) -> float:
    """What the FLOP counter sees; the CPU's flash kernel would count as 0."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**x)
    return counter.get_total_flops() / 2


# The static class against the paper


def reference(
    state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, images: int
) -> torch.Tensor:
    """One sample [channels, frames, height, width] as Latte's paper has it (variant 1, adaLN, joint training), frame by
    frame and place by place; ``labels`` [frames]."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def waves(position: float, dim: int) -> torch.Tensor:
        angles = position * torch.exp(-math.log(10000) * torch.arange(dim // 2).double() / (dim // 2))
        return torch.cat([angles.sin(), angles.cos()]).float()

    def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def block(i: int, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        name = f"transformer_blocks.{i}"
        s1, g1, a1, s2, g2, a2 = linear(F.silu(c), f"{name}.norm1.linear").chunk(6)
        h = modulated(x, s1, g1)
        q, k, v = (linear(h, f"{name}.attn1.to_{n}").unflatten(-1, (HEADS, -1)).transpose(0, 1) for n in "qkv")
        h = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + a1 * linear(h, f"{name}.attn1.to_out.0")
        h = F.gelu(linear(modulated(x, s2, g2), f"{name}.ff.net.0.proj"), approximate="tanh")
        return x + a2 * linear(h, f"{name}.ff.net.2")

    dim, frames = state["proj_out_1.weight"].shape[1], x.shape[1]
    sines, cosines = waves(float(t), 256).chunk(2)
    time = linear(torch.cat([cosines, sines]), "time_class_embed.timestep_embedder.linear_1")
    time = linear(F.silu(time), "time_class_embed.timestep_embedder.linear_2")
    c = time.expand(frames, -1)
    if labels is not None:
        c = c + state["time_class_embed.class_embedder.embedding_table.weight"][labels]
    h = F.conv2d(x.transpose(0, 1), state["pos_embed.proj.weight"], state["pos_embed.proj.bias"], stride=2)
    rows, cols = h.shape[2:]
    # A table for 4 x 4 patches, taken at other sizes as diffusers' PatchEmbed does: the same span of coordinates.
    where = [torch.cat([waves(4 / cols * j, dim // 2), waves(4 / rows * i, dim // 2)]) for i in range(rows)
             for j in range(cols)]  # fmt: skip
    tokens = [h[f].flatten(1).T + torch.stack(where) for f in range(frames)]
    clip = frames - images
    for i in range(LAYERS):
        if i % 2 == 0:
            tokens = [block(i, tokens[f], c[f]) for f in range(frames)]
        elif clip:
            over_time = torch.stack(tokens[:clip])
            if i == 1:
                over_time = over_time + torch.stack([waves(f, dim) for f in range(clip)])[:, None]
            over_time = torch.stack([block(i, over_time[:, p], c[0]) for p in range(rows * cols)], dim=1)
            tokens = [*over_time, *tokens[clip:]]
    out = torch.empty(6, frames, *x.shape[2:])
    for f in range(frames):
        patches = linear(modulated(tokens[f], *linear(F.silu(c[f]), "proj_out_1").chunk(2)), "proj_out_2")
        for n, patch in enumerate(patches):
            row, col = 2 * (n // cols), 2 * (n % cols)
            out[:, f, row : row + 2, col : col + 2] = patch.view(2, 2, 6).movedim(-1, 0)
    return out


@pytest.mark.parametrize("classes", [CLASSES, None])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_static_class_computes_what_the_paper_says(case: str, classes: int | None) -> None:
    model = tiny_static(num_classes=classes)
    x = inputs(**CASES[case], labels=classes is not None)
    x["hidden_states"] = torch.cat([x["hidden_states"]] * 2, dim=4)[..., : 2 * ROWS]  # the table's own size
    out = model(**x).sample
    assert out.shape == (len(out), 6, *x["hidden_states"].shape[2:])
    images = x.get("images", 0)
    for i, video in enumerate(x["hidden_states"]):
        labels = None
        if classes is not None:
            labels = x["class_labels"][i].reshape(-1)
            clip = video.shape[1] - images
            own = len(labels) > 1
            labels = torch.cat([labels[:1].expand(clip), labels[bool(clip) :]]) if own else labels.expand(clip + images)
        expected = reference(model.state_dict(), video, x["timestep"][i], labels, images)
        torch.testing.assert_close(out[i], expected, atol=2e-5, rtol=1e-4)


def test_published_models() -> None:
    assert {name: class_latte_config(name)["num_classes"] for name in LATTE_CLASSES} == {
        "FaceForensics": None, "SkyTimelapse": None, "Taichi": None, "UCF101": 101,
    }  # fmt: skip
    with init_empty_weights():
        models = {
            (name, size): DyClassLatteTransformer3DModel(**class_latte_config(name, size=size))
            for name, size in (
                ("SkyTimelapse", "XL/2"), ("UCF101", "Latte-XL/2"), ("Taichi", "L/2"), ("FaceForensics", "B/4"),
                ("Taichi", "S/8"),
            )
        }  # fmt: skip
    sizes = {
        key: sum(p.numel() for n, p in model.named_parameters() if ".dy_" not in f".{n}")
        for key, model in models.items()
    }
    assert sizes["SkyTimelapse", "XL/2"] == 673_681_568  # 673 M in the paper
    assert sizes["UCF101", "Latte-XL/2"] == 673_681_568 + 102 * 1152
    small = ("Taichi", "L/2"), ("FaceForensics", "B/4"), ("Taichi", "S/8")
    assert [round(sizes[key] / 1e6) for key in small] == [457, 130, 33]
    routers = sum(p.numel() for n, p in models["UCF101", "Latte-XL/2"].named_parameters() if ".dy_" in f".{n}")
    assert routers == 28 * (2 * 15 * 1153 + 1152 * 72 + 72 + 72 + 1)
    model, d, n = models["UCF101", "Latte-XL/2"], 1152, 16 * 256
    blocks = 28 * (12 * d * d * n + 6 * d * d) + 14 * 2 * n * d * (256 + 16)
    outside = n * d * 4 * (4 + 8) + 256 * d + 3 * d * d
    assert model.config["video_length"] == 16 and model.cost(n).static == blocks + outside
    with pytest.raises(ValueError, match=r"expected one of FaceForensics, .*got 'MSR-VTT'"):
        class_latte_config("MSR-VTT")
    with pytest.raises(ValueError, match=r"expected one of S/2, .*got 'XL/3'"):
        class_latte_config("Taichi", size="XL/3")


# The dynamic class against the static one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_all_gates_open_is_the_static_model_bit_for_bit(config: dict[str, Any], dtype: torch.dtype) -> None:
    for classes in (CLASSES, None):
        static = tiny_static(num_classes=classes).to(dtype)
        model = DyClassLatteTransformer3DModel.from_static(static, DynamicConfig(**config))
        dynamic = scramble(copy.deepcopy(model))
        for case in CASES.values():
            x = in_dtype(inputs(**case, labels=classes is not None), dtype)
            expected = static(**x).sample
            assert expected.dtype == dtype
            assert torch.equal(model(**x).sample, expected)  # all routers start open
            assert torch.equal(dynamic(**x, gates="open").sample, expected)
            assert not torch.equal(dynamic(**x).sample, expected)
            assert torch.equal(model(**x, return_dict=False)[0], expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_open_gates_train_like_the_static_model(checkpointing: bool, dtype: torch.dtype) -> None:
    static, model = tiny_static().to(dtype).train(), scramble(tiny_dynamic()).to(dtype).train()
    x = in_dtype(inputs([999, 500], images=2, own=True), dtype)
    if checkpointing:
        static.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    samples = []
    for network, options in ((static, {}), (model, {"gates": "open"})):
        torch.manual_seed(4)  # both draw the same labels to drop
        samples.append(network(**x, **options).sample)
        samples[-1].float().square().mean().backward()
    assert torch.equal(*samples)
    ours = dict(model.named_parameters())
    assert len(list(static.parameters())) == 2 + 5 + 14 * LAYERS + 4
    for name, parameter in static.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name)


def test_labels_are_dropped_as_told_or_drawn() -> None:
    model = tiny_static()
    x = inputs([500] * 32, images=1, own=True)
    with torch.no_grad():
        torch.manual_seed(3)
        drawn = model.train()(**x).sample
        torch.manual_seed(3)
        drop = (torch.rand(64) < 0.1).view(32, 2)
        assert 0 < int(drop.sum()) < 64
        assert torch.equal(model(**x, drop_labels=drop).sample, drawn)
        x["class_labels"] = x["class_labels"].where(~drop, torch.tensor(CLASSES))
        assert torch.equal(model.eval()(**x).sample, drawn)


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one() -> None:
    model = scramble(tiny_dynamic())
    for case in CASES.values():
        x = inputs(**case)
        out = model(**x, collect=True)
        assert not torch.equal(out.masks.heads[:, 0], out.masks.heads[:, 1])
        for i in range(len(out.sample)):
            one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
            alone = model(**one, collect=True)
            torch.testing.assert_close(alone.sample[0], out.sample[i], atol=1e-5, rtol=1e-5)
            assert all(torch.equal(a[:, 0], b[:, i]) for a, b in zip(alone.masks, out.masks, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_packed_equals_masked_for_mixed_batches_too(config: dict[str, Any]) -> None:
    model = scramble(tiny_dynamic(**config))
    cases = [{**case, "timesteps": [900, 200, 900, 500, 330]} for case in CASES.values()]  # 330 is masked
    for case in [*cases, {"timesteps": [500] * 2}, {"timesteps": [200]}]:
        x = inputs(**case)
        masked = model(**x, collect=True)
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
    static, model = tiny_static(), scramble(tiny_dynamic(**config))
    for t, images, clip in ((500, 0, FRAMES), (900, 0, FRAMES), (500, 2, FRAMES), (500, 2, 0)):
        x = inputs([t], images=images, clip=clip)
        cost = model.cost((clip + images) * PATCHES, frames=clip, images=images)
        assert macs(static, x) == pytest.approx(cost.static, rel=1e-6)
        masks = model(**x, collect=True).masks
        assert float(cost.ratio(masks)) < 0.98
        model.pack(x["timestep"].float())
        assert macs(model, x) == pytest.approx(float(cost.ratio(masks)) * cost.static, rel=5e-3)
        model.unpack()
    assert model.cost(FRAMES * PATCHES).static == model.cost(FRAMES * PATCHES, frames=FRAMES).static
    assert model.cost(5 * PATCHES, images=2).floor(1, 1, tokens=False) >= 1  # the clip's share of temporal tokens
    with pytest.raises(ValueError, match="25 tokens cannot be cut into 3 equal frames"):
        model.cost(25)
    with pytest.raises(ValueError, match="no text tokens; got 5"):
        model.cost(24, 5)


# Videos and pictures together


@pytest.mark.parametrize("kind", ["static", "masked", "packed"])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_pictures_and_clip_do_not_know_of_each_other(kind: str, own: bool) -> None:
    model = tiny_static() if kind == "static" else scramble(tiny_dynamic())
    if kind == "packed":
        model.pack(torch.tensor([999.0, 500]))
    x = inputs([999, 500], images=2, own=own)
    video, labels = x["hidden_states"], x["class_labels"]
    out = model(**x).sample

    def alone(frames: torch.Tensor, label: torch.Tensor, images: int) -> torch.Tensor:
        return model(frames, x["timestep"], class_labels=label, images=images).sample

    label = labels if not own else labels[:, 0]
    torch.testing.assert_close(out[:, :, :FRAMES], alone(video[:, :, :FRAMES], label, 0), atol=1e-5, rtol=1e-5)
    for i in (FRAMES, FRAMES + 1):
        label = labels if not own else labels[:, i - FRAMES + 1]
        expected = alone(video[:, :, i : i + 1], label, 1)
        torch.testing.assert_close(out[:, :, i : i + 1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_cover_the_pictures_in_spatial_blocks() -> None:
    model = scramble(tiny_dynamic())
    x = inputs([999, 500], images=2, own=True)
    masks = model(**x, collect=True).masks
    assert masks.tokens.shape == (LAYERS, 2, (FRAMES + 2) * PATCHES)
    clip = model(x["hidden_states"][:, :, :FRAMES], x["timestep"], x["class_labels"][:, 0], collect=True).masks
    assert torch.equal(masks.tokens[..., : FRAMES * PATCHES], clip.tokens)
    pictures = masks.tokens[..., FRAMES * PATCHES :]
    assert not pictures[1::2].any() and 0 < float(pictures[0::2].mean()) < 1
    still = model(**inputs([999, 500], images=2, clip=0), collect=True)
    assert isinstance(still, DyClassLatteOutput)
    assert all(not m[1::2].any() and bool(m[0::2].any()) for m in still.masks)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1], ids=["spatial", "temporal"])
def test_token_gates_are_counted_frame_by_frame_in_both_kinds_of_block(layer: int) -> None:
    model, token = tiny_dynamic(heads=False, mlp=False), 2 * PATCHES + 3
    outputs: list[torch.Tensor] = []
    model.dynamic_blocks()[layer].register_forward_hook(lambda m, args, out: outputs.append(out[0]))
    on = GateNoise(*(torch.full((LAYERS, 2, n), 100.0) for n in (HEADS, HEADS, (FRAMES + 1) * PATCHES)))
    off = GateNoise(*(x.clone() for x in on))
    off.tokens[layer, 1, token] = -100.0
    x = inputs([10, 600], images=1)
    masks = [model(**x, gates=gates, collect=True).masks.tokens for gates in (on, off)]
    assert torch.equal(masks[0] - masks[1], (off.tokens < 0).float())
    assert (outputs[0] != outputs[1]).any(-1).nonzero().tolist() == [[1, token]]


@pytest.mark.parametrize("groups", [None, 8])
@pytest.mark.parametrize("classes", [CLASSES, None])
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(
    groups: int | None, classes: int | None
) -> None:
    model = tiny_dynamic({"num_classes": classes}, mlp_groups=groups).train()
    x, gates = inputs([10, 600], images=2, own=True, labels=bool(classes)), noise(2, groups or HEADS, FRAMES + 2)
    if classes:
        x["drop_labels"] = torch.tensor([[False, True, False], [True, False, False]])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(**x, gates=gates, collect=True)
        other = model(**x, gates="open").sample  # two forwards before one backward
        cost = model.cost((FRAMES + 2) * PATCHES, images=2).ratio(out.masks).mean()
        (out.sample.square().mean() + other.square().mean() + cost).backward()
        assert without_gradient(model) == []
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[n], again[n]) for n in plain)


# Static and back, saved and loaded


def test_from_static_shares_tensors_and_to_static_gives_them_back() -> None:
    static = tiny_static()
    model = dy.make_dynamic(static)
    assert type(model) is dy.DyClassLatteTransformer3DModel and model.dynamic.token_router == "dit"
    back = model.to_static()
    assert type(back) is ClassLatteTransformer3DModel
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    for name, parameter in static.named_parameters():
        assert ours[name] is parameter and theirs[name] is parameter
    buffers = dict(static.named_buffers())
    assert sorted(buffers) == ["pos_embed.pos_embed", "temp_embed"]
    assert all(dict(m.named_buffers())[n] is buffer for n, buffer in buffers.items() for m in (model, back))
    with pytest.raises(ValueError, match="expected a ClassLatteTransformer3DModel; got a dynamic DyClassLatte"):
        DyClassLatteTransformer3DModel.from_static(model)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    static, x = tiny_static(), inputs([999, 500])
    static.save_pretrained(tmp_path / "static")
    assert torch.equal(
        ClassLatteTransformer3DModel.from_pretrained(tmp_path / "static").eval()(**x).sample, static(**x).sample
    )
    fresh = DyClassLatteTransformer3DModel.from_pretrained(tmp_path / "static").eval()
    assert not any(p.is_meta for p in fresh.parameters())
    assert torch.equal(fresh(**x).sample, static(**x).sample)
    model = scramble(tiny_dynamic(mlp_groups=8))
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["_class_name"] == "DyClassLatteTransformer3DModel" and config["dynamic"]["mlp_groups"] == 8
    assert config["num_layers"] == LAYERS and config["num_classes"] == CLASSES
    again = DyClassLatteTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**x).sample, model(**x).sample)
    half = DyClassLatteTransformer3DModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert half.dy_width.heads.weight.dtype == torch.float32 and half.proj_out_2.weight.dtype == torch.bfloat16


# Adapters, caches, kernels


TARGETS = (
    r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear)|proj_out_[12]"
)


@pytest.mark.parametrize("kind", ["td_lora", "lora"])
@torch.no_grad()
def test_packing_folds_the_adapter_in(kind: str) -> None:
    model, x = scramble(tiny_dynamic()), inputs([900, 500, 500], images=1, own=True)
    if kind == "td_lora":
        add_td_lora(model, TDLoraConfig(target_modules=TARGETS, rank=2, experts=2))
    else:
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".td_" in name or ".lora_" in name:
            parameter.normal_(std=0.3, generator=generator)
    model.eval()
    masked, masks = model(**x, collect=True)
    with adapters_off(model):
        assert not torch.allclose(model(**x).sample, masked, atol=0.1)
    plan = model.pack(torch.tensor([900.0, 500.0]))
    assert not any("td_" in n or "lora_" in n for block in plan.blocks[0] for n, _ in block.named_parameters())
    packed = model(**x, collect=True)
    torch.testing.assert_close(packed.sample, masked, atol=1e-4, rtol=1e-4)  # adapters this large reach 10
    assert all(torch.equal(a, b) for a, b in zip(packed.masks, masks, strict=True))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_first_block_cache_knows_the_blocks_and_adds_positions_once(kind: str) -> None:
    model, x = tiny_static() if kind == "static" else tiny_dynamic(), inputs([500])
    expected = model(**x).sample
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        assert torch.equal(model(**x).sample, expected)
        torch.testing.assert_close(model(**x).sample, expected, atol=1e-5, rtol=1e-5)
    model.disable_cache()


@torch.no_grad()
def test_the_chosen_attention_backend_is_used_packed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def record(*args: Any, backend: str, **kwargs: Any) -> torch.Tensor:
        used.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    for module in ("dit_blocks", "parts"):
        monkeypatch.setattr(f"dydit_scale.models.{module}.dispatch_attention_fn", record)
    static, model, x = tiny_static(), scramble(tiny_dynamic()), inputs([500])
    for network in (static, model):
        network.set_attention_backend("_native_math")
        network(**x)
    model.pack(torch.tensor([500.0]))
    model(**x)
    assert used == ["_native_math"] * 3 * LAYERS


@torch.no_grad()
def test_bf16_runs_packed_and_masked_alike() -> None:
    model = scramble(tiny_dynamic()).to(torch.bfloat16)
    x = in_dtype(inputs([500, 500]), torch.bfloat16)
    masked = model(**x).sample
    model.pack(torch.tensor([500.0]))
    assert masked.dtype == torch.bfloat16
    torch.testing.assert_close(model(**x).sample, masked, atol=0.05, rtol=0.05)


def test_what_cannot_work_is_refused_with_a_reason() -> None:
    for config, message in (
        ({"token_router": "flux"}, "token_router: expected 'dit'"),
        ({"single_bypass": "attn_out+mlp"}, "single_bypass: expected 'mlp'"),
        ({"mlp_groups": 7}, "128 MLP channels cannot be cut into 7"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_dynamic(**config)
    for cls in (ClassLatteTransformer3DModel, DyClassLatteTransformer3DModel):
        with pytest.raises(ValueError, match=r"num_layers: expected an even number.*got 3"):
            cls(num_layers=3, attention_head_dim=8, num_attention_heads=4)
    x = inputs([100, 600])
    video = x["hidden_states"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"hidden_states": video[:, :, :2]}, "expected a clip of 3 frames or none, then the 0 pictures.*got 2 frames"),
        ({"hidden_states": video[:, :, 0]}, "hidden_states: expected .*frames, height, width.; got"),
        ({"images": 1}, "the 1 pictures that images= says; got 3 frames"),
        ({"images": -1}, "got 3 frames"),
        ({"images": 4}, "got 3 frames"),
        ({"hidden_states": video[..., :3]}, "multiples of the patch, 2; got 8 x 3"),
        ({"timestep": torch.tensor([5])}, r"timestep: expected one for each of the 2 samples; got shape \[1\]"),
        ({"class_labels": None}, r"class_labels: expected \[2\], or \[2, 1\].*; got None"),
        ({"class_labels": torch.zeros(2, 2, dtype=torch.long)}, r"class_labels: expected .*; got \[2, 2\]"),
        ({"drop_labels": torch.zeros(2, 1, dtype=torch.bool)}, r"drop_labels: expected \[2\].*; got \[2, 1\]"),
    ]
    for model in (tiny_static(), tiny_dynamic()):
        for change, message in bad:
            with pytest.raises(ValueError, match=message):
                model(**{**x, **change})
    for model in (tiny_static(num_classes=None), tiny_dynamic({"num_classes": None})):
        with pytest.raises(ValueError, match=r"unconditional .*leave them out"):
            model(**x)
    model = tiny_dynamic()
    with pytest.raises(ValueError, match="do not fuse"):
        model.fuse_qkv_projections()
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1.*ignores head masks"):
        model(**x)
