"""What diffusers offers around a model, on every dynamic class: saving, casting, adapters, caches, offloading."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models._modeling_parallel import TensorParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.models import test_class_latte as class_latte
from tests.models import test_latte as latte
from tests.models import test_pixart as pixart
from tests.models import tiny, tiny_dit
from tests.models.tiny import scramble
from tests.parallel.launch import Ranks


@dataclass(frozen=True)
class Family:
    """A dynamic class at toy size."""

    name: str
    make: Callable[..., Any]
    inputs: Callable[[list[Any]], dict[str, Tensor]]
    attention: str
    """Its self-attention, in a block."""
    unit: int
    """Timesteps go from 0 to this."""

    def x(self, *timesteps: float, seed: int = 1) -> dict[str, Tensor]:
        """A batch at timesteps in 0..1."""
        levels = [t if self.unit == 1 else int(t * self.unit) for t in timesteps]
        return self.inputs(levels, seed=seed)

    def steps(self, *timesteps: float) -> Tensor:
        """The schedule to pack for."""
        return torch.tensor([t * self.unit for t in timesteps])

    @property
    def adapted(self) -> str:
        return rf".*transformer_blocks\.\d+\.{self.attention}\.(to_q|to_v)"


FAMILIES = [
    Family("flux", tiny.tiny_dynamic, tiny.inputs, "attn", 1),
    Family("dit", tiny_dit.tiny_dynamic, tiny_dit.inputs, "attn1", 1000),
    Family("latte", latte.tiny_dynamic, latte.inputs, "attn1", 1000),
    Family("latte-classes", class_latte.tiny_dynamic, class_latte.inputs, "attn1", 1000),
    Family("pixart", pixart.tiny_dynamic, pixart.inputs, "attn1", 1000),
]
STEPS = (0.9, 0.5, 0.2)
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def native_attention() -> Iterator[None]:
    """set_attention_backend changes a default of the whole process."""
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def router_weights(model: Any) -> dict[str, Tensor]:
    found = {n: p.detach().clone() for n, p in model.named_parameters() if ".dy_" in f".{n}"}
    assert len(found) > 4
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


# Saved, loaded, cast


@each
@torch.no_grad()
def test_sharded_files_and_variants_come_back(family: Family, tmp_path: Path) -> None:
    model, x = scramble(family.make()), family.x(0.9, 0.2)
    routers, expected = router_weights(model), model(**x).sample
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True}):
        assert torch.equal(type(model).from_pretrained(tmp_path, **options).eval()(**x).sample, expected), options
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False)

    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    half = type(model).from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert same(router_weights(half), routers)
    assert all(p.dtype == torch.float16 for n, p in half.named_parameters() if ".dy_" not in f".{n}")
    x = {k: v.half() if v.is_floating_point() and k != "timestep" else v for k, v in x.items()}
    half.half()  # tables of positions, which no file holds, are loaded in fp32
    assert torch.equal(half.eval()(**x).sample, model(**x).sample)


@each
@torch.no_grad()
def test_a_static_checkpoint_is_mapped_onto_devices_with_new_routers(family: Family, tmp_path: Path) -> None:
    static = family.make().to_static()
    static.save_pretrained(tmp_path)
    model = type(family.make()).from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.bfloat16).eval()
    assert all(p.dtype == torch.float32 for p in router_weights(model).values())
    assert not any(p.is_meta for p in model.parameters())
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.x(0.9, 0.2).items()}
    model.bfloat16()  # the tables of positions too
    assert torch.equal(model(**x).sample, static.bfloat16()(**x).sample)


@each
def test_a_cast_leaves_routers_in_fp32(family: Family) -> None:
    model = scramble(family.make())
    routers = router_weights(model)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)):
        cast(model)
        assert same(router_weights(model), routers)
        assert not any(p.dtype == torch.float32 for n, p in model.named_parameters() if ".dy_" not in f".{n}")
    assert model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float64 for p in router_weights(model.double()).values())


@each
@torch.no_grad()
def test_layerwise_casting_stores_what_is_not_read_by_routers(family: Family) -> None:
    model, x = scramble(family.make()), family.x(0.9, 0.2)
    before, masks, t_emb = (
        router_weights(model),
        model(**x, collect=True).masks,
        model.routing_embedding(x["timestep"].float()),
    )
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert same(router_weights(model), before)
    stored = {n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert len(stored) > 15 and not any("norm" in n or "timestep_embedder" in n for n in stored)
    assert torch.equal(model.routing_embedding(x["timestep"].float()), t_emb)
    out = model(**x, collect=True)
    assert torch.equal(out.masks.heads, masks.heads) and bool(out.sample.isfinite().all())
    with pytest.raises(ValueError, match="has a hook around its forward"):
        model.pack(family.steps(0.5))
    packed = family.make()
    packed.pack(family.steps(0.5))
    with pytest.raises(ValueError, match=r"enable_layerwise_casting: the model is packed.*unpack\(\) it first"):
        packed.enable_layerwise_casting()


@each
@torch.no_grad()
def test_a_deep_copy_is_independent(family: Family) -> None:
    model, x = scramble(family.make()), family.x(0.5)
    model.pack(family.steps(0.5))
    expected, twin = model(**x).sample, copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(**x).sample, expected)
    twin.unpack()
    torch.testing.assert_close(twin(**x).sample, expected, atol=1e-5, rtol=0)


# Trained, compiled


@each
def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(family: Family) -> None:
    model, x = scramble(family.make()).train(), family.x(0.9, 0.2)
    calls = counted(model)
    extra = {"drop_labels": torch.zeros(2, dtype=torch.bool)} if family.name == "dit" else {}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        calls.clear()
        model(**x, **extra).sample.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, once = gradients(), dict(calls)
    for options in ({}, {"gradient_checkpointing_func": functools.partial(checkpoint, use_reentrant=False)}):
        model.enable_gradient_checkpointing(**options)
        assert same(gradients(), plain)
        assert calls == {i: 2 * n for i, n in once.items()} and set(once.values()) == {1}
        model.disable_gradient_checkpointing()


def test_repeated_blocks_compile() -> None:
    """In a process of its own: dynamo cannot trace the shape checks that these tests install."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.compiled"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [family.name for family in FAMILIES]


# Adapters


@each
@torch.no_grad()
def test_loras_are_added_switched_saved_and_deleted_and_packed_slices_follow(family: Family, tmp_path: Path) -> None:
    model, x = scramble(family.make()), family.x(0.5)
    base = model(**x).sample
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=family.adapted), adapter_name="style")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.4, generator=generator)
    styled = model(**x).sample
    assert not torch.allclose(styled, base, atol=1e-2)

    def output() -> Tensor:
        """Packed and masked, which are the same."""
        model.pack(family.steps(0.5))
        packed = model(**x).sample
        model.unpack()
        masked = model(**x).sample
        torch.testing.assert_close(packed, masked, atol=1e-5, rtol=1e-4)
        model.pack(family.steps(0.5))
        return masked

    for change, expected in (
        (lambda: None, styled),
        (model.disable_adapters, base),
        (model.enable_adapters, styled),
        (lambda: model.set_adapters("style", 0.0), base),
        (lambda: model.set_adapters("style", 1.0), styled),
        (model.fuse_lora, styled),
        (model.unfuse_lora, styled),
    ):
        change()
        torch.testing.assert_close(model(**x).sample, expected, atol=1e-5, rtol=1e-4)  # a stale plan would not
        torch.testing.assert_close(output(), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"to_static: .* adapted layer; merge or unload the adapter first"):
        model.to_static()
    model.unpack()
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.delete_adapters("style")
    torch.testing.assert_close(output(), base)
    other = scramble(family.make())
    other.pack(family.steps(0.5))
    other.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", use_safetensors=True)
    torch.testing.assert_close(other(**x).sample, styled, atol=1e-5, rtol=1e-4)
    other.pack(family.steps(0.5))
    other.unload_lora()
    assert torch.equal(other(**x).sample, base)


# Attention


@each
@torch.no_grad()
def test_the_attention_backend_stays_in_copies_and_packed_blocks(family: Family) -> None:
    model = scramble(family.make())
    model.set_attention_backend("_native_math")
    blocks = [*model.pack(family.steps(0.5)).blocks[0], *copy.deepcopy(model).dynamic_blocks()]
    backends = [getattr(block, family.attention).processor._attention_backend for block in blocks]
    assert {str(getattr(b, "value", b)) for b in backends} == {"_native_math"} and len(backends) >= 6


@each
def test_what_cannot_work_is_refused_with_a_reason(family: Family) -> None:
    model, x = family.make(), family.x(0.5)
    with pytest.raises(ValueError, match="cuts q, k and v by head; do not fuse"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"tensor parallelism splits heads .* not implemented"):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    reason = "reads the mean of all text tokens" if family.name == "flux" else "has no context parallel plan"
    with pytest.raises(ValueError, match=reason):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    assert model._parallel_config is None
    model(**x)
    foreign = FluxAttnProcessor() if family.name == "flux" else AttnProcessor2_0()
    getattr(model.dynamic_blocks()[1], family.attention).set_processor(foreign)
    with pytest.raises(ValueError, match=r"blocks\.\d\..*ignores head masks"):
        model(**x)


@pytest.mark.launch
def test_context_parallel_flux_on_two_ranks_computes_what_it_computes_alone() -> None:
    with Ranks("tests.models.context_parallel") as ranks:
        ranks.wait()
    model = tiny.tiny_dynamic(token_router="dit")
    model.pack(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="Ulysses exchanges equally many heads"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


# Caches


def counted(model: Any, part: str = "") -> Counter[int]:
    """Calls of the first norm of each block, or of ``part``; packed blocks share the norm."""
    calls: Counter[int] = Counter()
    for i, block in enumerate(model.dynamic_blocks()):
        name = part or ("norm1" if hasattr(block, "norm1") else "norm")
        block.get_submodule(name).register_forward_hook(lambda *_, i=i: calls.update([i]))
    return calls


def latents(module: Any, args: Any, kwargs: dict[str, Tensor]) -> list[Tensor]:
    """SeaCache's view of the input, (channels, frames, height, width)."""
    return [kwargs["hidden_states"][0].flatten()[:24].view(2, 1, 3, 4)]


BLOCK_CACHES: dict[str, Callable[[bool], Any]] = {
    "FirstBlockCache": lambda skip: FirstBlockCacheConfig(threshold=1e9 if skip else 0.0),
    "MagCache": lambda skip: MagCacheConfig(
        threshold=1e9 if skip else -1.0, mag_ratios=[1.0] * 4, num_inference_steps=4, retention_ratio=0.0
    ),
    "SeaCache": lambda skip: SeaCacheConfig(
        threshold=1e9 if skip else 0.0, residual_order=0, cache_end_steps=0, raw_vision_callback=latents
    ),
    "TaylorSeerLite": lambda skip: TaylorSeerCacheConfig(
        cache_interval=100 if skip else 1,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    ),
}
"""Caches that leave out whole blocks."""


def sampled(model: Any, family: Family) -> list[Tensor]:
    """Outputs at each step, as a pipeline asks for them."""
    out = []
    for i, t in enumerate(STEPS):
        with model.cache_context("cond", step_index=i, sigma=t, num_inference_steps=len(STEPS)):
            out.append(model(**family.x(t, seed=i)).sample)
    return out


@pytest.mark.parametrize("kind", BLOCK_CACHES)
@each
@torch.no_grad()
def test_caches_of_whole_blocks(family: Family, kind: str) -> None:
    model = scramble(family.make())
    calls, layers = counted(model), len(model.dynamic_blocks())
    expected = sampled(model, family)
    if family.name == "latte" and kind != "TaylorSeerLite":
        with pytest.raises(ValueError, match=f"{kind}Config takes .* alternate between two layouts"):
            model.enable_cache(BLOCK_CACHES[kind](False))
        assert not model.is_cache_enabled and torch.equal(sampled(model, family)[1], expected[1])
        return

    outputs: dict[str, list[Tensor]] = {}
    for order in ("masked", "pack, then cache", "cache, then pack"):
        model.unpack()
        if order == "pack, then cache":
            model.pack(family.steps(*STEPS))
        model.enable_cache(BLOCK_CACHES[kind](False))
        if order == "cache, then pack":
            model.pack(family.steps(*STEPS))
        calls.clear()
        for ours, theirs in zip(sampled(model, family), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert calls == dict.fromkeys(range(layers), len(STEPS)), order
        model.disable_cache()

        model.enable_cache(BLOCK_CACHES[kind](True))
        calls.clear()
        outputs[order] = sampled(model, family)
        head = len(STEPS) if kind == "FirstBlockCache" else None
        full = 2 if kind == "TaylorSeerLite" else 1
        assert calls == {i: head if i == 0 and head else full for i in range(layers)}, order
        assert not torch.allclose(outputs[order][2], expected[2], atol=1e-3)
        with pytest.raises(ValueError, match=r"collect: .*disable_cache\(\) first"):
            model(**family.x(0.5), collect=True)
        if order != "masked":
            assert model._plan is not None
            with pytest.raises(ValueError, match="one timestep in a batch of packed sampling"):
                model(**family.x(0.9, 0.2))
        model.disable_cache()
        for ours, theirs in zip(sampled(model, family), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for order, out in outputs.items():
        for ours, theirs in zip(out, outputs["masked"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=order)


class Clock:
    """The timestep that attention caches ask for, 0..1000."""

    now = 900

    def __call__(self) -> int:
        return self.now


def attention_cache(kind: str, skip: bool, clock: Clock, family: Family) -> Any:
    if kind == "PyramidAttentionBroadcast":
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=1000 if skip else 1,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=clock,
        )
    if kind == "FasterCache":
        return FasterCacheConfig(
            spatial_attention_block_skip_range=1000,
            temporal_attention_block_skip_range=1000,
            spatial_attention_timestep_skip_range=(-1, 681) if skip else (-2, -1),
            temporal_attention_timestep_skip_range=(-1, 681) if skip else (-2, -1),
            attention_weight_callback=lambda _: 0.0,
            is_guidance_distilled=True,
            current_timestep_callback=clock,
        )
    return TaylorSeerCacheConfig(
        cache_interval=100 if skip else 1,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf".*transformer_blocks\.\d+\.{family.attention}"],
    )


@pytest.mark.parametrize("kind", ["PyramidAttentionBroadcast", "FasterCache", "TaylorSeer"])
@each
@torch.no_grad()
def test_caches_inside_blocks_act_on_the_masked_model_only(family: Family, kind: str) -> None:
    model, clock = scramble(family.make()), Clock()
    calls, layers = counted(model, f"{family.attention}.to_q"), len(model.dynamic_blocks())

    def two_steps() -> list[Tensor]:
        out = []
        for i, t in enumerate(STEPS[:2]):
            clock.now = int(1000 * t)
            with model.cache_context("cond"):
                out.append(model(**family.x(t, seed=i)).sample)
        return out

    expected = two_steps()
    for skip in (False, True):
        model.enable_cache(attention_cache(kind, skip, clock, family))
        calls.clear()
        out = two_steps()
        assert calls == dict.fromkeys(range(layers), 1 if skip else 2)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1]) is not skip
        with pytest.raises(ValueError, match=r"has a hook around its forward .*; pack before"):
            model.pack(family.steps(0.5))
        model.disable_cache()
    model.pack(family.steps(*STEPS))  # what the removed hooks left behind does not matter
    for ours, theirs in zip(two_steps(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"{kind}.*acts inside blocks .*\.{family.attention}\).*unpack\(\) first"):
        model.enable_cache(attention_cache(kind, True, clock, family))
    assert not model.is_cache_enabled and model._plan is not None


@each
def test_a_cache_that_would_do_nothing_or_the_wrong_thing_is_refused(family: Family) -> None:
    model = family.make()
    with pytest.raises(ValueError, match="TextKVCacheConfig finds no module"):
        model.enable_cache(TextKVCacheConfig())
    if family.name == "flux":
        model.enable_cache(TaylorSeerCacheConfig())
        model.disable_cache()
    else:
        with pytest.raises(ValueError, match=r"TaylorSeerCacheConfig finds no module .* cache_identifiers"):
            model.enable_cache(TaylorSeerCacheConfig())
    if family.name != "latte":
        with pytest.raises(ValueError, match=r"unconditional half .* set is_guidance_distilled=True"):
            model.enable_cache(FasterCacheConfig(current_timestep_callback=Clock()))
    assert not model.is_cache_enabled


@torch.no_grad()
def test_faster_cache_leaves_out_lattes_unconditional_half() -> None:
    family, clock, rows = FAMILIES[2], Clock(), []
    model = scramble(family.make())
    model.temporal_transformer_blocks[0].attn1.to_q.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    model.enable_cache(
        FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-2, -1),
            unconditional_batch_skip_range=1000,
            current_timestep_callback=clock,
        )
    )
    for t in STEPS:
        clock.now = int(1000 * t)
        assert len(model(**family.x(t, t)).sample) == 2
    assert rows == [2 * latte.PATCHES, latte.PATCHES, latte.PATCHES]


# Offloading


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@each
@torch.no_grad()
def test_group_offloading_finds_every_weight(
    family: Family, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing moves, so what is offloaded (to disk) is spoilt: a weight read outside its hook shows."""
    offload = ModuleGroup._offload_to_disk

    def spoiling(group: ModuleGroup) -> None:
        offload(group)
        for tensor in group.tensor_to_key:
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 10**6)

    monkeypatch.setattr(ModuleGroup, "_offload_to_disk", spoiling)
    model, x = scramble(family.make()), family.x(0.9, 0.2)
    expected = model(**x, collect=True)
    model.pack(family.steps(0.5))
    options = {"onload_device": torch.device("cpu"), "offload_type": level, "offload_to_disk_path": str(tmp_path)}
    options |= {"num_blocks_per_group": 1}
    with pytest.raises(ValueError, match="enable_group_offload: the model is packed"):
        model.enable_group_offload(**options)
    model.unpack()
    model.enable_group_offload(**options)
    assert bool(model.dynamic_blocks()[0].get_submodule(family.attention).to_q.weight.isnan().all())
    for _ in range(2):
        out = model(**x, collect=True)
        assert torch.equal(out.sample, expected.sample)
        assert all(torch.equal(a, b) for a, b in zip(out.masks, expected.masks, strict=True))
    with pytest.raises(ValueError, match="offloaded in groups"):
        model.pack(family.steps(0.5))
