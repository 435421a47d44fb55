"""Where packed weights are kept: every way computes the same, and the budget is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dydit_scale.adapters.td_lora import add_td_lora
from dydit_scale.dynamic.kernel_layout import KernelLinear, has_kernel_layout
from dydit_scale.dynamic.packing import CutLinear, LowRankLinear
from dydit_scale.models import part_store, parts, plan
from dydit_scale.models.part_store import PartStore, allot
from dydit_scale.models.parts import CompressedLinear, MLPPart, MLPSource, Part
from tests.adapters.tiny import flux_config, shake
from tests.models.tiny import inputs, scramble, tiny_dynamic
from tests.models.tiny_families import STEPS, Family, each

needs_layout = pytest.mark.skipif(
    not has_kernel_layout(torch.device("cpu"), torch.float32), reason="this torch has no oneDNN"
)


def source(units: int = 4, size: int = 3, dim: int = 5) -> MLPSource:
    torch.manual_seed(0)
    unit_of = torch.arange(units).repeat(size)  # members of a unit lie apart
    return MLPSource(nn.Linear(dim, units * size), nn.GELU("tanh"), nn.Linear(units * size, dim), unit_of)


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def masked(mlp: MLPSource, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return mlp.down(mlp.activation(mlp.up(x)) * mask[mlp.unit_of])


@pytest.mark.parametrize("storage", ["own", "shared", "in place"])
@pytest.mark.parametrize("kernel_layout", [False, pytest.param(True, marks=needs_layout)])
@torch.no_grad()
def test_every_storage_computes_what_masks_do(storage: Any, kernel_layout: bool) -> None:
    mlp, rows, x = source(), masks("1100", "1110", "1011", "0001", "1111"), torch.randn(2, 7, 5)
    store = PartStore(mlp, rows, kernel_layout=kernel_layout)
    store.storage = storage
    for step, mask in enumerate(rows):
        part = store.at(step, torch.zeros(1, 1))
        assert isinstance(part.up, KernelLinear) == (storage == "own" and kernel_layout)
        torch.testing.assert_close(part(x), masked(mlp, mask, x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_nested_masks_are_views_of_one_copy() -> None:
    store = PartStore(source(), masks("0100", "0110", "1110", "0100"), kernel_layout=False)
    assert store.order is not None and store.order.tolist() == [1, 2, 0]  # unit 3 never works, and is not copied
    store.storage = "shared"
    unit = 3 * (5 + 5) * 4
    assert store.bytes_as("shared") == 3 * unit and store.bytes_as("own") == (1 + 2 + 3) * unit
    parts: list[Any] = [store.at(step, torch.zeros(1, 1)) for step in range(4)]
    assert parts[0] is parts[3]
    for name in ("up", "down"):
        assert len({getattr(part, name).weight.untyped_storage().data_ptr() for part in parts}) == 1
    assert [part.up.out_features for part in parts] == [3, 6, 9, 3]
    assert [part.down.in_features for part in parts] == [3, 6, 9, 3]


def test_units_that_lie_together_stay_in_the_model() -> None:
    mlp = source()
    mlp.unit_of.copy_(mlp.unit_of.sort().values)
    together, apart = PartStore(mlp, masks("0110", "1111")), PartStore(mlp, masks("1010", "1111"))
    assert together.bytes_as("in place") == 0 and apart.bytes_as("in place") == 2 * 3 * 10 * 4
    together.storage = "in place"
    part: Any = together.at(0, torch.zeros(1, 1))
    assert part.up.weight.untyped_storage().data_ptr() == mlp.up.weight.untyped_storage().data_ptr()


@needs_layout
def test_the_budget_goes_to_the_fastest_and_never_beyond() -> None:
    def stores() -> list[PartStore]:
        return [PartStore(source(), masks("0100", "0110", "1110")) for _ in range(3)]

    small, large = 3 * 120, 6 * 120
    for budget, own in ((3 * small, 0), (2 * small + large, 1), (3 * large, 3), (3 * large - 1, 2)):
        found = stores()
        allot(found, budget)
        assert [s.storage for s in found].count("own") == own
        assert sum(s.bytes_as(s.storage) for s in found) <= budget
    with pytest.raises(ValueError, match=r"take 0 MiB beside the model at the least, more than max_bytes"):
        allot(stores(), 3 * small - 1)
    found = stores()
    allot(found, None)
    assert all(store.storage == "own" for store in found)


@each
@pytest.mark.parametrize("storage", ["own", "shared", "in place"])
@torch.no_grad()
def test_whole_models_pack_alike_in_every_storage(
    family: Family, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(stores: list[PartStore], max_bytes: int | None) -> None:
        for store in stores:
            store.storage = storage

    monkeypatch.setattr(plan, "allot", forced)
    model = scramble(family.make())
    x = family.x(*STEPS)
    expected = model(**x, collect=True)
    for kernel_layout in (False, True):
        made = model.pack(family.steps(*STEPS), kernel_layout=kernel_layout)
        assert made.bytes > 0
        out = model(**x, collect=True)
        torch.testing.assert_close(out.sample, expected.sample, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(out.masks, expected.masks, strict=True))


@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_experts_are_folded_or_run_beside_slices_that_all_steps_share(
    folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(stores: list[PartStore], max_bytes: int | None) -> None:
        for store in stores:
            store.storage, store.folded = "own", folded and store.has_experts

    monkeypatch.setattr(plan, "allot", forced)
    model, times = shake(add_td_lora(scramble(tiny_dynamic(heads=False)), flux_config())), [0.9, 0.6, 0.3]
    expected = model(**inputs(times)).sample
    made = model.pack(torch.tensor(times))
    torch.testing.assert_close(model(**inputs(times)).sample, expected, atol=1e-5, rtol=1e-4)
    kinds = {type(m) for row in made.blocks for block in row for m in block.modules()}
    assert (LowRankLinear in kinds) is not folded
    queries = {id(row[0].attn.streams[0].qkv[0]) for row in made.blocks}  # heads are all on: one slice, three updates
    assert len(queries) == 3
    bases = {id(getattr(row[0].attn.streams[0].qkv[0], "base", row)) for row in made.blocks}
    assert len(bases) == (3 if folded else 1)


@needs_layout
def test_a_kernel_layout_is_for_the_cpu_and_says_so() -> None:
    linear = CutLinear([nn.Linear(4, 4, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"no kernel layout for torch\.float64"):
        KernelLinear(linear)
    assert not has_kernel_layout(torch.device("cuda"), torch.float32)
    assert part_store.copied_bytes([KernelLinear(CutLinear([nn.Linear(4, 8)]))], set()) >= 4 * 8 * 4


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_packs_to_within_its_rounding(family: Family, dtype: torch.dtype) -> None:
    exact = scramble(family.make(tokens=False))  # a rounded score may fall on the other side of a threshold
    expected = exact(**family.x(*STEPS)).sample
    model = scramble(family.make(tokens=False)).to(dtype)
    x = {n: v.to(dtype) if v.is_floating_point() and n != "timestep" else v for n, v in family.x(*STEPS).items()}
    masked = model(**x).sample
    model.pack(family.steps(*STEPS))
    packed = model(**x).sample
    assert packed.dtype == dtype
    rounding = float((masked.float() - expected).abs().mean())
    assert 0 < rounding < 0.05 * float(expected.abs().mean())
    assert float((packed.float() - expected).abs().mean()) < 1.5 * rounding


@each
@torch.no_grad()
def test_copies_in_eight_bits_take_that_and_are_nearly_right(family: Family) -> None:
    model = scramble(family.make(tokens=False))
    x = family.x(*STEPS)
    expected = model(**x).sample
    made = model.pack(family.steps(*STEPS), weights="int8")
    parts = [m for row in made.blocks for block in row for m in block.modules() if isinstance(m, Part)]
    layers = [m for part in parts for m in part.modules() if hasattr(m, "in_features")]
    assert layers and all(isinstance(m, CompressedLinear) and m.weight.dtype == torch.int8 for m in layers)
    error = float((model(**x).sample - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match=r"compress: fp8 weights on cpu.*use int8"):
        model.pack(family.steps(*STEPS), weights="fp8")


@each
@torch.no_grad()
def test_the_kernels_plain_path_computes_what_gather_and_scatter_do(family: Family) -> None:
    model, x = scramble(family.make()), family.x(*STEPS)
    expected = model(**x).sample
    plan = model.pack(family.steps(*STEPS), kernel_layout=False, fused_tokens=True)
    mlps = [m for row in plan.blocks for block in row for n, m in block.named_modules() if isinstance(m, MLPPart)]
    texts = [b.ff_context for row in plan.blocks for b in row if hasattr(b, "ff_context")]
    chosen = [mlp for mlp in mlps if all(mlp is not text for text in texts)]
    assert chosen and all(mlp.fuses for mlp in chosen) and not any(text.fuses for text in texts)
    torch.testing.assert_close(model(**x).sample, expected, atol=1e-5, rtol=1e-4)


FUSED = {"fused_tokens": True}


@each
@torch.no_grad()
def test_fused_kernels_that_cannot_run_are_told(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model = scramble(family.make())
    plan = model.pack(family.steps(*STEPS), **FUSED)
    reason = "they are for CUDA, and the model is on cpu"
    assert plan.fused_tokens == (plan.fused_tokens.parts, 0, reason) and plan.fused_tokens.parts >= 2
    assert caplog.messages == [f"fused_tokens: no MLP runs in the fused kernels: {reason}"]
    assert model.pack(family.steps(*STEPS)).fused_tokens is None and len(caplog.messages) == 1
    whole = family.make(tokens=False).pack(family.steps(0.5), **FUSED).fused_tokens
    assert (whole.parts, whole.fused) == (0, 0) and "no token is routed" in caplog.messages[1]


@torch.no_grad()
def test_mlps_that_fuse_are_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As on a GPU whose kernels run."""
    monkeypatch.setattr(parts, "why_plain", lambda x, *weights: None)

    def counted(model: Any, **options: Any) -> plan.FusedTokens:
        return model.pack(torch.tensor([0.9, 0.5]), **FUSED, **{"kernel_layout": False, **options}).fused_tokens

    model = scramble(tiny_dynamic())
    everything = counted(model)
    assert everything.parts == everything.fused > 0 and everything.reason is None and not caplog.records
    assert counted(model, weights="int8").fused > 0
    laid_out = counted(model, kernel_layout=True)
    assert laid_out.fused == 0 and laid_out.reason == "weights are in the layout of the CPU's kernels"
    assert laid_out.reason in caplog.text
    together = counted(scramble(tiny_dynamic(single_bypass="attn_out+mlp")))
    assert 0 < together.fused == together.parts < everything.parts, "single blocks do not fuse"
    silu = scramble(tiny_dynamic())
    for block in silu.single_transformer_blocks:
        block.act_mlp = nn.SiLU()
    some = counted(silu)
    assert 0 < some.fused < some.parts == everything.parts and "the MLP has a SiLU" in str(some.reason)
    adapted: Any = shake(add_td_lora(scramble(tiny_dynamic()), flux_config()))
    folded = counted(adapted)
    assert folded.fused == folded.parts

    def unfolded(stores: list[PartStore], max_bytes: int | None) -> None:
        for store in stores:
            store.storage = "own"

    monkeypatch.setattr(plan, "allot", unfolded)
    beside = counted(adapted)
    assert beside.fused < beside.parts and "TD-LoRA's experts stay beside the slices" in str(beside.reason)


@each
@torch.no_grad()
def test_a_budget_holds_for_what_is_really_copied(family: Family) -> None:
    for settings in ({}, {"heads": False}, {"mlp": False}):
        model = scramble(family.make(**settings))
        least = model.pack(family.steps(*STEPS), max_bytes=10**9).bytes
        assert least > 0
        for budget in (0, least // 4, least // 2, least):
            try:
                plan = model.pack(family.steps(*STEPS), max_bytes=budget)
            except ValueError as error:
                assert "beside the model at the least" in str(error)
                continue
            assert plan.bytes <= budget + part_bytes_of_biases(plan), (settings, budget)
    whole = family.make(heads=False, mlp=False)
    assert whole.pack(family.steps(*STEPS), max_bytes=0).bytes == 0


def part_bytes_of_biases(plan: Any) -> int:
    parts = [m for row in plan.blocks for block in row for m in block.modules() if isinstance(m, Part)]
    biases = [b for part in parts for name, b in part.named_parameters() if name.endswith("bias")]
    return sum(b.nbytes for b in {id(b): b for b in biases}.values())


@torch.no_grad()
def test_folded_loras_are_counted_and_keep_nothing_else_alive() -> None:
    model: Any = add_td_lora(scramble(tiny_dynamic()), flux_config())
    store = PartStore(model.dynamic_blocks()[0].pack_sources()["ff"], None)
    assert store.is_made and store.bytes_as("in place") > 0
    linear = nn.Linear(4, 8)
    linear.weight_at = lambda t: linear.weight + 1  # type: ignore[assignment, operator]
    cut = CutLinear([linear], rows=torch.arange(2, 4), t_emb=torch.zeros(1, 1))
    assert cut.weight.untyped_storage().nbytes() == cut.weight.nbytes


@pytest.mark.parametrize("storage", ["own", "shared", "in place"])
@torch.no_grad()
def test_an_mlp_may_have_nothing_to_do(storage: Any) -> None:
    mlp, rows, x = source(), masks("0000", "0110"), torch.randn(2, 7, 5)
    store = PartStore(mlp, rows)
    store.storage = storage
    torch.testing.assert_close(store.at(0, torch.zeros(1, 1))(x), masked(mlp, rows[0], x))
    never = PartStore(mlp, masks("0000"))
    allot([never], None)
    torch.testing.assert_close(never.at(0, torch.zeros(1, 1))(x), mlp.down.bias.expand_as(x))
