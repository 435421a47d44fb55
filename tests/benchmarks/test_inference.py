"""The benchmark of inference, at a tiny size: its masks, its variants, its file and its page."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from benchmarks import inference
from benchmarks.inference_masks import drawn_shares, mean_ratio, set_width, shares_of_run
from benchmarks.inference_page import PAGE, write_page
from benchmarks.inference_peers import FixedK, cacheable, twin_of
from benchmarks.inference_plan import Comparison
from benchmarks.inference_sizes import SIZES
from benchmarks.inference_variants import COMPILED, ON_REQUEST, VARIANTS, build
from dydit_scale.models.plan import PackedPlan

CPU = torch.device("cpu")
TINY = ("--layers", "2", "--side", "4", "--text", "8", "--steps", "3", "--repetitions", "2", "--dtype", "float32")
DIT = SIZES["dit-s"].cut(layers=2, side=4)


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    """The result of a run of the command."""
    monkeypatch.setattr(sys, "argv", ["inference", "--out", str(out), "--device", "cpu", *TINY, *words])
    inference.main()
    (file,) = out.glob("*.json")
    assert file.name == "inference-cpu-float32.json"
    return json.loads(file.read_text())


def setting(target: float = 0.5, steps: int = 3) -> Any:
    """A comparison of the tiny DiT."""
    sigmas = DIT.sigmas(steps, of=28)
    shares = drawn_shares(DIT.cost(), target, sigmas, units=6, token_keep=None)
    comparison = Comparison(size=DIT, batch=1, few=False, target=target, sigmas=sigmas, shares=shares, ratio=target)
    return comparison.setting(DIT.make_static(CPU, torch.float32))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return measured(monkeypatch, tmp_path_factory.mktemp("result"), "--sizes", "dit-s")


def test_every_variant_has_a_row_or_a_reason(result: dict[str, Any]) -> None:
    rows, skipped = ([row["variant"] for row in result[kind]] for kind in ("rows", "skipped"))
    assert sorted(rows + skipped) == sorted(set(VARIANTS) - {*COMPILED, *ON_REQUEST, "fused"})
    assert set(skipped) <= {"tomesd"} and all(row["reason"] for row in result["skipped"])
    assert 0.99 < result["flops_checks"]["dit-s"] < 1.1  # of 32 tokens, those that fill up a piece are some
    assert result["settings"]["repetitions"] == 2 and result["process_peak_bytes"] > 0
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["first_seconds"] > 0
        assert row["peak_bytes"] > row["plan_bytes"] and row["macs"] == sum(row["macs_each"]) / 2
        assert (row["layers"], row["image_tokens"], row["samples"], row["steps"]) == (2, 16, 2, 3)
        assert len(set(row["timesteps"])) == 3


def test_ideal_is_the_ratio_of_macs_and_realised_that_of_seconds(result: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in result["rows"]}
    static = rows["static"]
    for row in rows.values():
        assert row["cost_ratio"] == pytest.approx(row["macs"] / static["macs"])
        pairs = [a / b for a, b in zip(static["seconds"], row["seconds"], strict=True)]
        ideals = [a / b for a, b in zip(static["macs_each"], row["macs_each"], strict=True)]
        each = [a / b for a, b in zip(pairs, ideals, strict=True)]
        assert row["ideal"] == pytest.approx(sum(ideals) / 2)
        assert row["realised"] == pytest.approx(sum(pairs) / 2) and row["share"] == pytest.approx(sum(each) / 2)
        assert row["realised_iqr"][0] <= row["realised"] <= row["realised_iqr"][1]
    assert rows["open"]["ideal"] == 1
    for name in ("static", "open", "width", "capacity", "fixed-k"):  # whatever picture is drawn
        assert len(set(rows[name]["macs_each"])) == 1
    assert len(set(rows["both"]["macs_each"])) == 2 and rows["masked"]["macs_each"] == pytest.approx(
        rows["both"]["macs_each"], rel=0.02
    )
    assert rows["capacity"]["stored"] == rows["both"]["stored"] == {"own": 4}
    assert rows["both"]["cost_ratio"] == pytest.approx(0.5, abs=0.03)
    assert rows["masked"]["cost_ratio"] == pytest.approx(rows["both"]["cost_ratio"], abs=0.01)
    assert rows["width"]["plan_bytes"] > 0 and rows["both"]["cost_ratio"] < rows["width"]["cost_ratio"] < 1
    assert rows["both"]["cost_ratio"] < rows["tokens"]["cost_ratio"] < 1
    assert rows["capacity"]["cost_ratio"] > rows["both"]["cost_ratio"]  # of 16 tokens, rounded up to 64: all
    assert rows["fixed-k"]["cost_ratio"] == pytest.approx(0.5, abs=0.05)


def test_caches_leave_out_every_second_step(result: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in result["rows"]}
    for base in ("static", "both"):
        for kind, blocks in (("fbc", 5), ("taylor", 4), ("mag", 4)):  # of two blocks in three steps
            row = rows[f"{base}-{kind}"]
            assert row["blocks_computed"] == pytest.approx(blocks / 6) and row["macs_from"] == "blocks that ran"
            assert row["macs"] < rows[base]["macs"]


def test_few_steps_of_flux_with_masks_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: small\n")
    (run / "metrics.jsonl").write_text("")
    heads = np.zeros((2, 3, 4))  # steps, layers, heads
    heads[0, :, :1], heads[1, :, :3] = 1, 1
    np.savez(
        run / "evaluation" / "widths.npz", timesteps=np.array([1.0, 0.25]), heads=heads, groups=np.ones((2, 3, 4)),
        tokens=np.full((2, 3), 0.5), names=np.array(["a", "b", "c"]),
    )  # fmt: skip
    small = {"num_attention_heads": 4, "attention_head_dim": 8, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2)}
    lite = SIZES["flux-lite"]
    small_lite = replace(lite, config={**lite.config, **small, "pooled_projection_dim": 8})
    monkeypatch.setitem(SIZES, "flux-lite", small_lite)
    found = measured(monkeypatch, tmp_path / "out", "--sizes", "flux-lite", "--masks", str(run), "--schedules", "few",
                     "--variants", "both", "static-fbc", "both-taylor", "tokens")  # fmt: skip
    rows = {row["variant"]: row for row in found["rows"]}
    assert set(rows) == {"static", "open", "both", "static-fbc", "both-taylor"}
    assert {row["steps"] for row in rows.values()} == {4} and rows["both"]["target"] is None
    assert rows["both-taylor"]["blocks_computed"] == 0.75  # diffusers' default: the first three steps compute
    shares = shares_of_run(run, 2, lite.sigmas(4, of=4), units=4)
    assert shares.heads.tolist() == [[0.25, 0.25, 0.75, 0.75]] * 2 and shares.tokens.unique().tolist() == [0.5]


def test_masks_are_the_shares_that_were_drawn() -> None:
    sigmas = DIT.sigmas(4, of=28)
    cost = DIT.cost()
    shares = drawn_shares(cost, 0.5, sigmas, units=6, token_keep=None)
    assert mean_ratio(cost, shares) == pytest.approx(0.5, abs=0.01)
    assert shares.tokens.std(0).min() > 0 and bool((shares.tokens.diff(dim=1) >= 0).all())  # narrow at noisy steps
    model = DIT.make_dynamic(DIT.make_static(CPU, torch.float32))
    set_width(model, shares, DIT.timesteps(sigmas))
    table = model.step_table(DIT.timesteps(sigmas))
    torch.testing.assert_close(table.heads.float().mean(-1), shares.heads.float())
    torch.testing.assert_close(table.groups.float().mean(-1), shares.groups.float())
    for masks in (table.heads, table.groups):
        assert bool((masks[:, :-1] <= masks[:, 1:]).all()) and len(masks.unique(dim=1)[0]) > 1, "nested, not equal"
    with pytest.raises(ValueError, match=r"ratio 0\.01: 2 layers of 6 units come to"):
        drawn_shares(cost, 0.01, sigmas, units=6, token_keep=None)


@torch.no_grad()
def test_packed_and_masked_choose_the_same_tokens() -> None:
    here = setting()
    packed, masked = here.both, here.routed(packed=False)
    assert packed.model._plan is not None and masked.model._plan is None
    for step, (a, b) in enumerate(zip(packed.masks, masked.masks, strict=True)):
        assert torch.equal(a.heads, b.heads) and torch.equal(a.groups, b.groups)
        kept = here.shares.tokens[:, step]
        for masks in (a, b):  # of 32 tokens of both samples
            torch.testing.assert_close(masks.tokens.mean((1, 2)), (kept * 32).round().float() / 32)
    torch.testing.assert_close(
        build("masked", here).run(here.inputs), build("both", here).run(here.inputs), atol=1e-4, rtol=1e-3
    )


@torch.no_grad()
def test_a_packed_variant_that_ran_masked_has_no_row() -> None:
    here = setting()
    elsewhere = replace(here, timesteps=here.timesteps + 0.5)  # packed for others than those that come
    wanted = ["static", "open", "masked", "both", "fused"]
    rows, skipped = inference.compare(elsewhere, wanted, 1, CPU)
    assert [row["variant"] for row in rows] == ["static", "open", "masked"]
    reasons = {row["variant"]: row["reason"] for row in skipped}
    assert "some forwards ran masked: timestep" in reasons["both"] and "fused kernels" in reasons["fused"]


@torch.no_grad()
def test_copies_that_a_cache_has_had_cut_anew_are_not_kept() -> None:
    here = setting()
    variants = [build(name, here) for name in ("both", "capacity", "both-fbc", "both-taylor", "both-mag")]
    for variant in variants:
        with variant.ready():
            variant.run(here.inputs)
    gc.collect()
    capacity = variants[1]
    with capacity.ready():
        assert capacity.model._plan.blocks is here.both.model._plan.blocks
    capacity.model.unpack()
    plans = [x for x in gc.get_objects() if type(x) is PackedPlan]
    assert plans == [here.both.model._plan]


def test_all_copies_have_equal_parts_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "free_memory", lambda device: 1000)
    assert inference._budget(["static", "open", "masked", "width"], CPU) == 700
    for names in (["width", "both"], ["width", "capacity"], ["width", "both-fbc", "both-mag", "capacity"]):
        assert inference._budget(["static", "open", *names], CPU) == 350, "of the copies of both there is one set"


@torch.no_grad()
def test_what_is_not_packed_or_has_no_partner_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(setting(), max_bytes=1)
    rows, skipped = inference.compare(here, ["static", "open", "both"], 1, CPU)
    assert [row["variant"] for row in rows] == ["static", "open"]
    assert "the sub-networks take" in skipped[0]["reason"]

    variants = [build("static", here), replace(build("open", here), beside="static-compile")]
    gone: list[dict[str, Any]] = []
    kept, _ = inference._as_named(variants, [{}, {}], gone, "a size")
    assert kept == variants[:1] and gone[0]["reason"] == "so is what it is compared with, static, torch.compile"


@torch.no_grad()
def test_a_variant_that_falls_back_while_it_is_timed_is_left_out() -> None:
    here = setting()
    variants = [build(name, here) for name in ("static", "both")]
    rows: list[dict[str, Any]] = [{"variant": variant.name} for variant in variants]
    variants[1].model.train()
    skipped: list[dict[str, Any]] = []
    kept, named = inference._as_named(variants, rows, skipped, "a size")
    assert kept == variants[:1] and named == rows[:1] and "train() was called" in skipped[0]["reason"]


@torch.no_grad()
def test_peers_compute_what_they_say() -> None:
    here = setting()
    ff, x = here.static.transformer_blocks[0].ff, torch.randn(2, 16, 384)
    torch.testing.assert_close(FixedK(ff, 16)(x), ff(x))
    some = FixedK(ff, 4)(x)
    assert ((some != 0).any(-1).sum(1) == 4).all()
    chosen = (some != 0).any(-1)
    torch.testing.assert_close(some[chosen], ff(x)[chosen])
    twin = twin_of(here.static)
    assert twin.transformer_blocks is not here.static.transformer_blocks
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in here.static.parameters()]
    assert isinstance(cacheable(here.static), DiTTransformer2DModel) and not hasattr(here.static, "enable_cache")
    assert torch.equal(build("open", here).run(here.inputs), build("static", here).run(here.inputs))


def test_an_old_result_is_summed_up_anew(result: dict[str, Any]) -> None:
    old = copy.deepcopy(result)
    for row in old["rows"]:
        row |= {"ideal": 0.0, "share": 0.0}
    assert inference.summarised(old) == result


def test_the_page_shows_every_row(result: dict[str, Any], tmp_path: Path) -> None:
    write_page([result], tmp_path)
    page, plot = (tmp_path / "speed.md").read_text(), (tmp_path / "speed.svg").read_text()
    lines = [line for line in page.partition("## Results")[2].splitlines() if line.startswith("| ")]
    (both,) = (row for row in result["rows"] if row["variant"] == "both")
    assert len(lines) == 3 + len(result["rows"])  # with both headers and the summary
    assert lines[1].startswith("| dit-s, 2 blocks, 16 tokens, batch 1, 3 steps, ratio 0.5 | cpu float32 | ")
    assert f"| {both['ideal']:.2f} | {both['realised']:.2f} | {both['share']:.0%} |" in lines[1]
    for row in result["rows"]:
        (line,) = (line for line in lines if line.startswith(f"| {VARIANTS[row['variant']]} |"))
        assert f"| {row['ideal']:.2f} | {row['realised']:.2f} (" in line
        assert f" | {row['setup_seconds']:.1f} | {row['first_seconds']:.2f} | " in line
        assert f">{VARIANTS[row['variant']]}<" in plot
    assert "There is no result from a GPU yet." in page and "There is no result from a CPU yet." not in page
    few = {**result, "rows": [row for row in result["rows"] if row["variant"] in ("static", "open", "both")]}
    write_page([few], tmp_path)
    assert "torch.compile" not in (tmp_path / "speed.md").read_text().partition("## Results")[2]
    few["rows"][-1] |= {"recompilations": 3, "warmup_seconds": 4.2, "stored": {"own": 3, "shared": 1}}
    write_page([few], tmp_path)
    page, plot = (tmp_path / "speed.md").read_text(), (tmp_path / "speed.svg").read_text()
    assert "packed, both: 3 codes or graphs in 4.2 s." in page and "(3 own, 1 shared)" in page
    assert ">dit-s, cpu float32, batch 1, 3 steps, ratio 0.5<" in plot
    assert f">{VARIANTS['open']}<" not in plot, "too few variants for a panel of their own"
    write_page([], tmp_path)
    assert (tmp_path / "speed.md").read_text().count("There is no result from") == 2
    prose = PAGE.read_text().partition("## Results")[0]
    assert page.startswith(prose)
    assert all(re.search(rf"`{name}`", prose) for name in SIZES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "29"), "--steps: the sampler has 28; got 29"),
        (("--ratios", "1.5"), "--ratios: expected numbers between 0 and 1"),
        (("--batch", "0"), "--batch: expected 1 or more; got 0"),
        (("--ratios", "0.05"), "choose a ratio between"),
        (("--masks", "nowhere"), "expected a run folder"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: Any, said: str
) -> None:
    with pytest.raises(SystemExit):
        measured(monkeypatch, tmp_path / "out", "--sizes", "dit-s", *words)
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
