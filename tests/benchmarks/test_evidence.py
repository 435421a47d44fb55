"""The evidence: its controls, its statistics, what it keeps and what its page says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.evidence import claims, controls, page, plots, pool, results, tables, units
from benchmarks.evidence.sizes import SIZES
from benchmarks.evidence.units import VARIANTS, Place, Unit
from benchmarks.inference_masks import equal_keep
from dydit_scale.dynamic.cost import KeepRates
from dydit_scale.sampling.speed import machine
from dydit_scale.train.build import Parts
from dydit_scale.train.frozen import even_numbers
from dydit_scale.train.objective import Objective
from dydit_scale.train.recipe import Recipe
from tests.families.journey import family_recipe, write_world

FAMILIES = ("dit", "sit", "flux", "latte-classes")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    for family in FAMILIES:
        write_world(folder / family, family)
    return folder


def recipe_of(worlds: Path, family: str, **dynamic: Any) -> Recipe:
    recipe = family_recipe(worlds / family, family, "none", seed=3)
    assert recipe.dynamic is not None
    return replace(recipe, dynamic=replace(recipe.dynamic, **dynamic), cost=replace(recipe.cost, target=0.6))


def routers(parts: Parts) -> list[torch.nn.Parameter]:
    found = [p for name, p in parts.network.named_parameters() if "dy_" in name]
    assert found
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_width_is_the_same_everywhere_and_costs_the_target(worlds: Path, family: str) -> None:
    recipe = recipe_of(worlds, family, tokens=False)
    parts = controls.uniform(recipe)
    objective = Objective(recipe, parts.network, parts.pipeline, None, torch.device("cpu"))
    levels = objective.process.even_levels(even_numbers()[::50])
    table = parts.network.step_table(objective.process.timestep(levels).float())
    for masks in (table.heads, table.groups):
        assert (masks == masks[:1, :1]).all(), "one set of units for all layers and timesteps"
        kept = int(masks[0, 0].sum())
        assert masks[0, 0, :kept].all(), "the most important units are those of the lowest numbers"
    assert not any(p.requires_grad for p in routers(parts))
    assert all(p.requires_grad for n, p in parts.network.named_parameters() if "attn" in n and "dy_" not in n)
    cost = controls._cost(recipe, parts)
    units_ = parts.network.config["num_attention_heads"]
    counts = range(1, units_ + 1)
    off = {(h, g): abs(ratio(cost, h, g, units_) - 0.6) for h in counts for g in counts}
    near = [pair for pair in off if off[pair] <= controls.NEAR]
    own = int(table.heads[0, 0].sum()), int(table.groups[0, 0].sum())
    assert off[own] <= max(controls.NEAR, min(off.values()))
    assert not near or abs(own[0] - own[1]) == min(abs(h - g) for h, g in near)


def ratio(cost: Any, heads: int, groups: int, units_: int) -> float:
    layers = len(cost.blocks)
    rates = KeepRates(*(torch.full((layers, 1), share) for share in (heads / units_, groups / units_, 1.0)))
    return float(cost.dynamic(rates) / cost.static)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_routers_choose_by_chance_and_learn_nothing(worlds: Path, family: str) -> None:
    recipe = recipe_of(worlds, family)
    parts = controls.random(recipe)
    keep = equal_keep(controls._cost(recipe, parts), 0.6)
    network = parts.network
    objective = Objective(recipe, network, parts.pipeline, None, torch.device("cpu"))
    levels = objective.process.even_levels(even_numbers())
    timesteps = objective.process.timestep(levels).float()
    width = network.width_masks(network.routing_embedding(timesteps), "threshold")
    for masks in width:
        share = masks.mean(1)  # over timesteps: [layers, units]
        assert share[:, 0].eq(1).all()
        assert masks.mean() == pytest.approx(max(keep, 1 / masks.shape[-1]), abs=0.02)
        assert (masks[:, :1] != masks).any(1)[:, 1:].all(), "each unit is off at some timesteps and on at others"
    again = controls.random(recipe)
    other = controls.random(replace(recipe, seed=4))
    for a, b in zip(routers(parts), routers(again), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert any(not torch.equal(a, c) for a, c in zip(routers(parts), routers(other), strict=True))


def test_random_routers_keep_their_share_of_tokens(worlds: Path) -> None:
    recipe = recipe_of(worlds, "dit")
    parts = controls.random(recipe)
    keep = equal_keep(controls._cost(recipe, parts), 0.6)
    objective = Objective(recipe, parts.network, parts.pipeline, None, torch.device("cpu"))
    batch = next(iter(controls.make_loader(
        recipe.data, controls.open_data(recipe.data), seed=3, rank=0, world_size=1, global_batch=64, micro_batch=64,
        consumed=0,
    )))  # fmt: skip
    inputs = objective.prepare(batch, objective.process.even_levels((torch.arange(64) + 0.5) / 64), 3)
    with torch.no_grad():
        _, masks = objective.forward_dynamic(parts.network, inputs, "threshold")
    assert masks.tokens.mean() == pytest.approx(keep, abs=0.02)


@pytest.mark.parametrize("name", ["td-lora-1", "td-lora-2", "td-lora-8", "lora"])
def test_adapters_of_a_comparison_are_of_one_size(tmp_path: Path, name: str) -> None:
    place = Place(tmp_path, "small")
    reference = units.adapter_parameters(
        units.build_parts(units.recipe_of(place, Unit("flux", "td-lora-4", 0))).network
    )
    size = units.adapter_parameters(units.build_parts(units.recipe_of(place, Unit("flux", name, 0))).network)
    assert size == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_the_narrow_model_costs_half(name: str) -> None:
    trial = SIZES["small"].trials[name]
    full = units.small_class_latte_pipeline(["a"]) if name == "latte" else units.small_class_pipeline(["a"], kind=name)
    assert units._macs(trial, units._narrow(trial)) / units._macs(trial, full) == pytest.approx(0.5, abs=0.03)


def test_what_was_measured_is_not_measured_again_unless_settings_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def trained(recipe: Recipe, *others: Any) -> dict[str, Any]:
        made.append(recipe.run)
        return {"ratio": 0.5}

    monkeypatch.setattr(units, "_trained", trained)
    place, unit = Place(tmp_path, "quick"), Unit("flux", "dynamic-0.5", 1)
    first = units.run_unit(place, unit)
    assert units.run_unit(place, unit) == first
    assert len(made) == 1
    monkeypatch.setitem(VARIANTS, "dynamic-0.5", VARIANTS["dynamic-0.5"]._replace(overrides=("cost.target=0.6",)))
    units.run_unit(place, unit)
    assert len(made) == 2


def test_a_failed_unit_is_named_after_all_others_ran(tmp_path: Path) -> None:
    tasks: list[pool.Task] = [("bad", int, ("no number",)), ("good", Path.touch, (tmp_path / "done",))]
    with pytest.raises(RuntimeError, match=r"1 of 2 failed:\nbad: .*no number"):
        pool.run_all(tasks, workers=1, logs=tmp_path / "logs", title="units")
    assert (tmp_path / "done").exists()
    assert "ValueError" in (tmp_path / "logs" / "bad.log").read_text()


def made_up(scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"variant": variant, "seed": seed, "score": score, "ratio": 0.5, "mse": 1 - score, "frechet": 10 * (1 - score)}
        for variant, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_differences_are_told_by_a_paired_t_test() -> None:
    rows = made_up({"static": [0.80, 0.90, 0.70], "dynamic-0.5": [0.70, 0.81, 0.61], "width": [0.81, 0.80, 0.78]})
    # differences -.10, -.09, -.09: mean -.0933, standard error .00333, times 4.30
    assert tables.difference(rows, "dynamic-0.5", "static", "score") == "**-0.093 ± 0.014** worse"
    assert tables.difference(rows, "static", "dynamic-0.5", "score") == "**+0.093 ± 0.014** better"
    assert tables.is_worse(rows, "dynamic-0.5", "static", "mse"), "more error is worse"
    assert tables.difference(rows, "width", "static", "score") == "-0.003 ± 0.225"
    one = [row for row in rows if row["seed"] == 0]
    assert tables.difference(one, "dynamic-0.5", "static", "score") == "-0.100", "one seed tells nothing"
    text = tables.comparisons(rows, [("dynamic-0.5", "static", "ours"), ("dynamic-0.5", "narrow", "none")], ("score",))
    assert text.splitlines()[2:] == ["| ours | 0.50 / 0.50 | **-0.093 ± 0.014** worse |"]


def test_equal_differences_of_all_seeds_tell_no_spread() -> None:
    rows = made_up({"static": [0.5, 0.6, 0.7], "dynamic-0.5": [0.6, 0.7, 0.8]})
    assert tables.difference(rows, "dynamic-0.5", "static", "score") == "+0.100"
    assert not tables.is_worse(rows, "static", "dynamic-0.5", "score")


def test_the_answer_follows_the_numbers() -> None:
    lost = made_up({"static": [0.8, 0.9, 0.7], "dynamic-0.5": [0.70, 0.81, 0.61]})
    assert page.answer(lost).startswith(
        "**It fails here: at 0.50 of the MACs the judge's score, the Fréchet distance and the denoising error are"
    )
    assert "88% of the judge's score" in page.answer(lost)
    assert "66% of the judge's score" in page.answer([*lost, *made_up({"base": [1.0, 1.1, 1.1]})]), "the better one"
    assert page.answer([*lost, *made_up({"base": [0.1, 0.2, 0.3]})]) == page.answer(lost)
    level = made_up({"static": [0.8, 0.9, 0.7], "dynamic-0.5": [0.83, 0.86, 0.71]})
    assert page.answer(level).startswith("**At 0.50 of the MACs no loss is told")
    off = [row | {"ratio": 0.56} for row in lost]
    assert page.answer(off).startswith("**Not tested: the dynamic model came to 0.56")


def test_a_missed_ratio_is_named() -> None:
    rows = made_up({"static": [0.8], "tokens": [0.1], "dynamic-0.3": [0.5]})
    rows = [row | {"ratio": {"static": 1.0, "tokens": 0.56, "dynamic-0.3": 0.31}[row["variant"]]} for row in rows]
    assert page._missed(rows).endswith("asked for: dynamic, tokens only (0.56).")


def test_the_answer_on_experts_follows_the_numbers() -> None:
    plain, full = [0.8, 0.9, 0.7], [0.8, 0.88, 0.73]
    for mixed, said in (
        ([0.9, 0.99, 0.81], "**It holds here: with four experts the judge's score, the Fréchet distance and"),
        ([0.7, 0.81, 0.6], "**It fails here: with four experts the judge's score"),
        ([0.83, 0.86, 0.71], "**It is not shown here: four experts differ from plain LoRA by no more"),
    ):
        rows = made_up({"td-lora-4": mixed, "lora": plain, "dynamic-0.5": full})
        assert page._of_experts(rows).startswith(said)


def test_the_answer_on_temperatures_follows_the_numbers() -> None:
    rows = [
        {"variant": v, "rule": "threshold", "tokens": t}
        for v, t in zip(claims.TEMPERATURES, (0.7, 0.9, 1.0), strict=True)
    ]
    told = page._of_temperatures({1: 0.028, 2: -0.025, 5: -0.068}, rows)
    assert told.startswith(
        "**Trained and sampled ratio differ by +0.028 at 1, -0.025 at 2, -0.068 at 5.** At temperature 5 "
    )
    assert page._of_temperatures({1: 0.0, 2: 0.0, 5: 0.0}, [row | {"tokens": 0.5} for row in rows]).endswith("at 5.**")


def test_the_answer_on_time_follows_the_numbers() -> None:
    def row(variant: str, seconds: float, score: float, cache: float | None = None) -> dict[str, Any]:
        return {"variant": variant, "seconds": seconds, "score": score, "frechet": -score, "cache": cache}

    rows = [row("static", 1, 0.8), row("static", 2, 0.9), row("static", 0.1, 1.0, cache=0.3)]
    rows += [row("dynamic-0.5", 1.5, 0.85), row("dynamic-0.5", 1.5, 0.8), row("dynamic-0.3", 0.9, 0.5)]
    assert "in no more time as 1 of 3 dynamic samplers by the judge's score, and as 1 by" in page._of_time(rows)


def test_prose_of_one_size_is_not_said_of_another() -> None:
    assert "<!--" not in page.prose("small") + page.prose("gpu")
    assert "Latte's base has hardly begun" in page.prose("small")
    assert "Latte's base has hardly begun" not in page.prose("gpu")


def fake_results(place: Place) -> dict[str, Any]:
    """As of the claim half-dit, with pictures."""
    for variant in ("static", "dynamic-0.5", "uniform", "random"):
        file = place.pictures(Unit("dit", variant, 0))
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    rows = made_up({v: [0.8, 0.7 + 0.01 * i] for i, v in enumerate(claims.HALF)})
    return {
        "units": [row | {"seconds": 1.0, "trial": "dit", "pictures": 3} for row in rows],
        "real": {"dit": 1.5, "sit": 1.5},
        "seconds": {"prepared": {"dit-base": 60.0}, "units": 60.0, "more": 0.0},
        "measured": [machine()],
    }


def test_the_page_shows_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    place = Place(tmp_path, "quick")
    page.write_page(
        {"size": "quick", "claims": {"half-dit": fake_results(place)}}, place, tmp_path / "docs", ["half-dit"]
    )
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert text.count(page.ABSENT) == 6, "longer, emoji, td-lora, calibration, gates, tempo"
    assert "$" not in text
    assert all(f"| {VARIANTS[variant].title} | 0.50 |" in text for variant in claims.HALF)
    for link in ("evidence/half.svg", "evidence/dit.png"):
        assert f"]({link})" in text
        assert (tmp_path / "docs" / link).stat().st_size > 1000


def test_every_section_is_made_of_its_results(tmp_path: Path) -> None:
    place, found = Place(tmp_path, "quick"), {}
    for name, claim in claims.CLAIMS.items():
        rows = made_up({variant: [0.8, 0.7 + 0.01 * i] for i, variant in enumerate(claim.variants)})
        units_ = [
            row | {"seconds": 1.0, "trial": claim.trials[0], "pictures": 3, "ratio_training": 0.5, "learns": 10}
            for row in rows
        ]
        found[name] = fake_results(place) | {"units": units_, "real": dict.fromkeys(claim.trials, 1.5), "rows": []}
    found["calibration"]["rows"] = [
        {"variant": variant, "rule": rule, "tokens": 0.9, "ratio": 0.5, "score": 0.4, "frechet": 2.0}
        for variant in claims.TEMPERATURES for rule in page.RULES
    ]  # fmt: skip
    found["gates"]["rows"] = [
        {"trial": trial, "heads": 0.5, "groups": 0.6, "tokens": tokens}
        for trial, tokens in zip(claims.BUILT_IN, (1.0, 0.7, 0.8, 0.99), strict=True)
    ]
    found["tempo"]["rows"] = [
        {**sampler._asdict(), "seconds": 0.1, "score": 0.5, "frechet": 3.0} for sampler in page.tempo.samplers()
    ]
    page.write_page({"size": "quick", "claims": found}, place, tmp_path / "docs", [])
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert page.ABSENT not in text and "$" not in text
    assert "| DiT (DDPM) | 0.50 | 0.60 | 1.00 |" in text
    assert "**DiT (DDPM) and Latte (video) skip next to no token here" in text
    for section in ("What a longer", "The same on real", "TD-LoRA", "Calibration", "Where the", "Quality against"):
        said = text.split(f"## {section}")[1].split("**What it does not show.**")[0]
        assert "**" in said, f"{section}: nothing was found"


def test_pictures_of_claims_that_were_not_run_here_stay(tmp_path: Path) -> None:
    place = Place(tmp_path, "quick")
    found = {"size": "quick", "claims": {"half-dit": fake_results(place), "half-sit": fake_results(place)}}
    old = tmp_path / "docs" / "evidence" / "sit.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"kept")
    page.write_page(found, place, tmp_path / "docs", ["half-dit"])
    assert old.read_bytes() == b"kept"
    assert "](evidence/sit.png)" in (tmp_path / "docs" / "evidence.md").read_text()


def test_a_gpu_has_a_page_of_its_own(tmp_path: Path) -> None:
    place = Place(tmp_path, "quick")
    page.write_page(
        {"size": "gpu", "claims": {"half-dit": fake_results(place)}}, place, tmp_path / "docs", ["half-dit"]
    )
    assert "](evidence-gpu/half.svg)" in (tmp_path / "docs" / "evidence-gpu.md").read_text()
    assert not (tmp_path / "docs" / "evidence.md").exists()


def test_a_claim_that_was_not_run_is_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dit-base-0\.json is missing: run the claim first"):
        results.collect(Place(tmp_path, "quick"), ["half-dit"], tmp_path / "found.json")


def test_units_of_other_settings_are_not_published(tmp_path: Path) -> None:
    place, unit = Place(tmp_path, "quick"), Unit("flux", "base", 0)
    place.record(unit).parent.mkdir(parents=True)
    place.record(unit).write_text(json.dumps({"settings": "of before"}))
    with pytest.raises(ValueError, match="was made with other settings"):
        results._unit(place, unit)


def test_bases_of_other_settings_are_refused(tmp_path: Path) -> None:
    folder = Place(tmp_path, "quick").trial("dit")
    (folder / "base").mkdir(parents=True)
    (folder / "base.json").write_text(json.dumps({"seconds": 1, "settings": {"base_steps": 7}}))
    with pytest.raises(ValueError, match=r"was made with .*'base_steps': 7.* choose another OUT"):
        units.prepare(Place(tmp_path, "quick"), "dit", "base")


def test_what_was_measured_of_units_follows_them(tmp_path: Path) -> None:
    place, unit, taken = Place(tmp_path, "quick"), Unit("dit", "dynamic-0.5", 0), []
    place.record(unit).parent.mkdir(parents=True)

    def measure() -> list[Any]:
        taken.append(1)
        return [{"row": len(taken)}]

    for mse, expected in ((0.1, 1), (0.1, 1), (0.2, 2)):
        place.record(unit).write_text(json.dumps({"mse": mse, "seconds": len(taken)}))
        claims._keep(place.more("x"), [unit], place, measure)
        assert json.loads(place.more("x").read_text())["rows"] == [{"row": expected}]


def test_results_of_other_claims_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setattr(
        results, "of_claim", lambda place, name: {"units": [name], "settings": results._settings(place, name)}
    )
    results.collect(Place(tmp_path, "quick"), ["half-sit"], file)
    found = results.collect(Place(tmp_path, "quick"), ["half-dit"], file)
    assert list(found["claims"]) == ["half-dit", "half-sit"]
    assert json.loads(file.read_text()) == found
    found["claims"]["half-sit"]["settings"]["held_out"] = 1
    file.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="leaving out half-sit, of other settings"):
        assert list(results.collect(Place(tmp_path, "quick"), ["half-dit"], file)["claims"]) == ["half-dit"]


def test_every_variant_of_a_claim_is_known() -> None:
    for claim in claims.CLAIMS.values():
        assert set(claim.variants) <= set(VARIANTS)
        assert set(claim.trials) <= set(SIZES["small"].trials)
    assert set(plots.STYLES) <= set(VARIANTS)
