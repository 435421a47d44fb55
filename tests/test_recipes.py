from __future__ import annotations

from pathlib import Path

import pytest

from dydit_scale.models.families.flux import FluxFamily
from dydit_scale.models.loading import load_transformer
from dydit_scale.train.build import build_parts
from dydit_scale.train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
CONTROLS = {"demo": "demo_control", "long": "long_control"}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_is_valid_and_says_what_it_takes(path: Path) -> None:
    load_recipe(path)
    head = path.read_text().split("\nname:")[0]
    assert "Hardware:" in head and "Cost ratio" in head and ("dydit_scale.train" in head)


def trainable(recipe: Recipe) -> dict[str, int]:
    parts = build_parts(recipe)
    return {n: p.numel() for n, p in parts.network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_differs_in_the_method_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ours, control = (load_recipe(ROOT / "recipes" / "shapes" / f"{n}.yaml") for n in (name, CONTROLS[name]))
    for key in ("steps", "batch_size", "lr", "warmup_steps", "final_lr", "ema", "betas"):
        assert getattr(ours.train, key) == getattr(control.train, key), key
    assert ours.flow == control.flow and ours.model == control.model and ours.data == control.data
    adapter = sum(n for name, n in trainable(ours).items() if "dy_" not in name)
    plain = sum(trainable(control).values())
    assert plain == pytest.approx(adapter, rel=0.02)  # equal size; the routers come on top


def test_the_shipped_base_is_small_and_whole() -> None:
    base = ROOT / "recipes" / "shapes" / "base"
    assert sum(p.stat().st_size for p in base.rglob("*.safetensors")) <= 6e6
    assert load_transformer(str(base), FluxFamily()).config["num_attention_heads"] == 10
