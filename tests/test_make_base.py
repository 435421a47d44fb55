from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from data_tools.shapes import write_shapes
from dydit_scale.models.families.dit import DiTFamily
from dydit_scale.models.families.flux import FluxFamily
from dydit_scale.models.loading import load_transformer
from dydit_scale.train.recipe import load_recipe
from dydit_scale.workflows.base import write_base

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_base", ROOT / "recipes" / "shapes" / "make_base.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_muon_steps_as_torchs_does(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 32), (48, 16)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    muon, reference = script.Muon(ours), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step(0.1)
        reference.step()
    for start, a, b in zip(starts, ours, theirs, strict=True):
        assert (a - b).detach().norm() < 0.05 * (b - start).detach().norm()  # torch iterates in bf16


def test_it_writes_a_pipeline_of_averaged_weights(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    write_shapes(tmp_path / "shards", samples=32, progress=False)
    settings = {"data.path": tmp_path / "shards", "train.steps": 3, "train.batch_size": 4, "engine.compile": "false"}
    recipe = load_recipe(ROOT / "recipes/shapes/base.yaml", [f"{key}={value}" for key, value in settings.items()])
    script.make_base(recipe, tmp_path / "base")
    made = load_transformer(str(tmp_path / "base"), FluxFamily())
    shipped = load_transformer("recipes/shapes/base", FluxFamily())
    assert made.config["num_layers"] == shipped.config["num_layers"]
    assert made.proj_out.weight.abs().max() > 0  # zero before the first step
    assert not torch.equal(made.x_embedder.weight, shipped.x_embedder.weight)


def test_it_trains_other_families_and_goes_on_from_their_weights(script: ModuleType, tmp_path: Path) -> None:
    write_base(tmp_path / "untrained", "dit")
    write_shapes(tmp_path / "shards", samples=16, classes=True, progress=False)
    changes = [
        "dynamic=null",
        "cost.target=1",
        "supervision.kind=none",
        "engine.name=single",
        "train.batch_size=4",
        "train.steps=2",
    ]
    changes += ["train.ema=0.5", f"data.path={tmp_path / 'shards'}"]
    weights = []
    for seed, (source, out, fresh) in enumerate((("untrained", "first", True), ("first", "second", False))):
        options = [*changes, f"model.base={tmp_path / source}", f"model.from_scratch={str(fresh).lower()}"]
        options.append(f"seed={seed}")
        script.make_base(load_recipe(ROOT / "recipes/dit/debug.yaml", options), tmp_path / out)
        weights.append(load_transformer(str(tmp_path / out), DiTFamily()).state_dict())
        assert str(tmp_path) not in (tmp_path / out / "transformer/config.json").read_text()
    first, second = weights
    name = "pos_embed.proj.weight"
    assert 0 < (second[name] - first[name]).norm() < 0.2 * first[name].norm()  # drawn anew it would be 1.4 times as far
