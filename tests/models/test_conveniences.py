"""What diffusers offers around a model, on every dynamic class: saving, casting, adapters, offloading."""

from __future__ import annotations

import copy
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models._modeling_parallel import TensorParallelConfig
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import IA3Config, LoHaConfig, LoraConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.models import tiny
from tests.models.tiny import scramble
from tests.models.tiny_families import FAMILIES, RELEASED, Family, counted, each
from tests.parallel.launch import Ranks


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


@pytest.mark.slow  # compiling takes some minutes
@pytest.mark.timeout(1200)
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
    names = [line for family in FAMILIES for line in (family.name, f"{family.name} execution")]
    names += [f"{RELEASED.name} execution", "limit"]
    assert done.stdout.splitlines() == [*names, "td_lora layer", "td_lora network"]


# Adapters


@each
@pytest.mark.parametrize("config", [IA3Config(feedforward_modules=[]), LoHaConfig(r=2)], ids=lambda c: type(c).__name__)
def test_other_adapters_of_peft_are_refused_when_packing(family: Family, config: Any) -> None:
    model = family.make()
    model.add_adapter(dataclasses.replace(config, target_modules=family.adapted))
    with pytest.raises(ValueError, match=r"(ia3|loha): of peft's adapters only LoRA and DoRA can be cut"):
        model.pack(family.steps(0.5))
    model.disable_adapters()
    model.pack(family.steps(0.5))


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


def check_backend(name: str, backend: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """A packed model attends there as the masked one does by plain products; skips where the masked model itself cannot
    attend on that backend."""
    family = next(family for family in FAMILIES if family.name == name)
    model = scramble(family.make()).to(device, dtype)
    x = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in family.x(0.5).items()}
    try:
        model.set_attention_backend(backend)
        model(**x)
    except (RuntimeError, ImportError) as error:  # not installed, or not for heads of this size
        pytest.skip(f"{backend}: {error}")
    model.set_attention_backend("_native_math")
    expected = model(**x).sample
    model.set_attention_backend(backend)
    model.pack(family.steps(0.5))
    torch.testing.assert_close(model(**x).sample, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dit", "flux", "latte-classes"])
@pytest.mark.parametrize("backend", ["native", "_native_flash"])
@torch.no_grad()
def test_packed_attention_on_other_backends(name: str, backend: str) -> None:
    """Whose heads lie strided in one fused product."""
    check_backend(name, backend, "cpu", torch.float32, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dit", "flux", "latte-classes"])
@pytest.mark.parametrize("backend", ["_native_flash", "_native_efficient", "_native_cudnn", "flash", "xformers"])
@torch.no_grad()
def test_packed_attention_on_the_backends_of_a_gpu(name: str, backend: str) -> None:
    check_backend(name, backend, "cuda", torch.bfloat16, 5e-2)


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
