"""Packed equals masked: every family with every number format and way to keep weights; ways to choose tokens, and
adapters, in turn."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dydit_scale.adapters.td_lora import TDLoraConfig, add_td_lora
from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.dynamic.kernel_layout import has_kernel_layout
from dydit_scale.dynamic.masks import DynamicMasks, GateNoise
from dydit_scale.models import plan
from dydit_scale.models.part_store import PartStore
from tests.adapters.tiny import shake
from tests.models.tiny import scramble
from tests.models.tiny_families import FAMILIES, RELEASED, STEPS, Family

SUBJECTS = [*FAMILIES, RELEASED]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = {
    "laid out": {}, "own": {"kernel_layout": False}, "shared": {"kernel_layout": False}, "in place": {},
    "int8": {"weights": "int8"},
}  # fmt: skip
TOKENS = ("threshold", "capacity", "none")
ADAPTERS = ("none", "lora", "lora with bias", "td_lora")
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.004}
"""Of the output, relative; half precision rounds sums that packing takes in another order."""
CASES = [
    (family.name, dtype, kept, TOKENS[(k + d) % 3], ADAPTERS[(f + k + d) % 4])
    for (f, family), (k, kept), (d, dtype) in product(enumerate(SUBJECTS), enumerate(KEPT), enumerate(DTYPES))
]


def test_all_pairs_are_there() -> None:
    ways = ([f.name for f in SUBJECTS], list(DTYPES), list(KEPT), list(TOKENS), list(ADAPTERS))
    for a, b in combinations(range(5), 2):
        assert {(case[a], case[b]) for case in CASES} == set(product(ways[a], ways[b])), (ways[a], ways[b])


@pytest.mark.parametrize(("name", "dtype", "kept", "tokens", "adapter"), CASES)
@torch.no_grad()
def test_packed_is_masked(
    name: str, dtype: str, kept: str, tokens: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept == "laid out" and not has_kernel_layout(torch.device("cpu"), DTYPES[dtype]):
        pytest.skip(f"no kernel layout for {dtype} here")
    family = next(f for f in SUBJECTS if f.name == name)
    model = _adapted(scramble(family.make(tokens=tokens != "none")), family, adapter).to(DTYPES[dtype])
    steps, counts = family.steps(*STEPS), torch.randint(1, 6, (len(STEPS), 8), generator=torch.manual_seed(0))
    capacity = TokenCapacity(steps, counts[:, : len(model.dynamic_blocks())]) if tokens == "capacity" else None
    if kept in ("shared", "in place"):
        monkeypatch.setattr(plan, "allot", lambda stores, max_bytes: _keep(stores, kept))
    made = model.pack(steps, capacity=capacity, **KEPT[kept])
    for times in (STEPS[:1], STEPS[1:2], STEPS[2:], (*STEPS, *STEPS[:2])):  # alone, and in one batch
        x = _halved(family.x(*times), DTYPES[dtype])
        packed = model(**x, collect=True)
        with_masks = model(**x, gates=_forced(packed.masks)).sample  # those that the packed blocks took
        limit = max(LARGEST_ERROR[dtype], 0.05 if kept == "int8" else 0.0)
        assert packed.sample.dtype == DTYPES[dtype] and relative(packed.sample, with_masks) < limit
        assert tokens == "none" or bool((packed.masks.tokens == 0).any())
    assert made.run.fallback is None and bool((packed.masks.heads == 0).any())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _adapted(model: Any, family: Family, adapter: str) -> Any:
    if adapter == "td_lora":
        return shake(add_td_lora(model, TDLoraConfig(target_modules=family.adapted, rank=2, alpha=3.0, experts=3)))
    if adapter != "none":
        bias = adapter == "lora with bias"
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=family.adapted, lora_bias=bias))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def _keep(stores: list[PartStore], storage: Any) -> None:
    for store in stores:
        store.storage = storage


def _halved(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: v.to(dtype) if v.is_floating_point() and n != "timestep" else v for n, v in inputs.items()}


def _forced(masks: DynamicMasks) -> GateNoise:
    """Noise that leaves the gates no choice."""
    return GateNoise(*(1e4 * (2 * mask.float() - 1) for mask in masks))
