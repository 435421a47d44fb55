"""Runs that read several sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.parallel.world import World
from dydit_scale.train.__main__ import main
from dydit_scale.train.exits import Exit
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import Recipe, load_recipe, save_recipe
from tests.train.small_run import small_world


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world whose recipe mixes its shards with those of another."""
    folder = tmp_path_factory.mktemp("small")
    recipe = yaml.safe_load(small_world(folder).read_text())
    small_world(folder / "other", samples=5)
    recipe["data"] |= {"bucket_batch": 4, "path": "", "sources": _sources(folder)}
    recipe["train"] |= {"accumulation": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def _sources(folder: Path) -> list[dict]:
    return [{"path": str(folder / "shards"), "weight": 2}, {"path": str(folder / "other" / "shards")}]


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides)


def test_a_run_of_two_sources_continues_exactly_and_refuses_others(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(recipe_of(world_folder, f"run={tmp_path / 'whole'}"), World())
    part = train(recipe_of(world_folder, f"run={tmp_path / 'part'}"), World())
    shutil.rmtree(part / "checkpoints" / "step-0000000004")  # as if killed after step 3
    capsys.readouterr()
    turned = str(_sources(world_folder)[::-1]).replace("'", "")
    words = [str(world_folder / "recipe.yaml"), f"run={part}", "--resume"]
    assert main([*words, f"data.sources={turned}"]) == Exit.BAD_CONFIG
    assert "its data changed since step 2" in capsys.readouterr().err
    assert main(words) == 0
    a, b = (load_checkpoint(run / "checkpoints") for run in (whole, part))
    assert a is not None and b is not None and (a.step, a.meta["consumed"]) == (b.step, b.meta["consumed"]) == (4, 32)
    assert a.meta["data"] == b.meta["data"]
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    assert "53 samples" in capsys.readouterr().out


def test_an_empty_word_takes_a_path_back(world_folder: Path) -> None:
    turned = str(_sources(world_folder)).replace("'", "")
    recipe = load_recipe(world_folder / "recipe.yaml", ["data.path=somewhere", "data.sources=[]"])
    assert recipe.data.path == "somewhere"
    save_recipe(recipe, world_folder / "single.yaml")
    again = load_recipe(world_folder / "single.yaml", ["data.path=", f"data.sources={turned}"])
    assert (again.data.path, len(again.data.sources)) == ("", 2)


def test_a_recipe_of_sources_is_read_back_equal(world_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world_folder)
    assert [source.weight for source in recipe.data.sources] == [2, 1]
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[{path: a}, {path: b, wieght: 2}]", "data.sources[1].wieght; did you mean data.sources[1].wei"),
        ("data.sources=[{weight: 2}]", "data.sources[0].path is missing"),
        ("data.sources=[a]", "data.sources[0]: expected keys below it; got 'a'"),
        ("data.path=a", "data.path, data.sources: expected one folder of shards or a list of them, got both"),
        ("data.sources=[]", "expected one folder of shards or a list of them, got neither"),
        ("data.bucket_batch=6", "data.bucket_batch 6: cannot be cut in micro-batches of 4"),
        ("data.sources=[{path: WORLD/shards, frames: 8}]", "data.frames 8: FluxPipeline makes pictures"),
        ("data.sources=[{path: WORLD/shards}, {path: WORLD/base}]", "base: holds no shards"),
    ],
)
def test_mistakes_are_named_before_any_work(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    words = [override.replace("WORLD", str(world_folder)), f"run={tmp_path / 'run'}"]
    assert main([str(world_folder / "recipe.yaml"), *words]) == Exit.BAD_CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
