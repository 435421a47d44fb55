"""Training on encoded data is training on the pixels; what was encoded otherwise is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dydit_scale.data.loader import Batch, make_loader
from dydit_scale.data.shards import load_index, write_shards
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import World
from dydit_scale.train.build import Parts, build_parts
from dydit_scale.train.encoded import EncodedInputs
from dydit_scale.train.loop import train
from dydit_scale.train.objective import Objective
from dydit_scale.train.recipe import Recipe
from dydit_scale.workflows.encode import encode_data
from tests.data.web_store import serve
from tests.families.journey import FAMILIES, VIDEOS, prompt
from tests.train.encoded_worlds import encode, encoded_recipe, spoil, write_vae, write_world

FIGURES = ("loss", "loss_flow", "ratio", "grad_norm", "mse_eval", "ratio_eval")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family one, made when it is first asked for."""
    return tmp_path_factory.mktemp("encoded")


def world_of(worlds: Path, family: str) -> Path:
    folder = worlds / family
    if not folder.exists():
        write_world(folder, family)
        spoil(folder)
        encode(folder, family, folder / "encoded")
    return folder


def curve(recipe: Recipe) -> list[dict[str, float]]:
    shutil.rmtree(recipe.run, ignore_errors=True)
    records = read_metrics(train(recipe, World()) / "metrics.jsonl")
    return [{name: record[name] for name in FIGURES if name in record} for record in records]


def batches(recipe: Recipe, count: int) -> list[Batch]:
    index = load_index(recipe.data.path)
    loader = make_loader(recipe.data, index, seed=3, rank=0, world_size=1, global_batch=4, micro_batch=4, consumed=0)
    found = iter(loader)
    return [next(found) for _ in range(count)]


def objective_of(recipe: Recipe, *, text_encoders: bool) -> Objective:
    parts, index = build_parts(recipe, text_encoders=text_encoders), load_index(recipe.data.path)
    encoded = {} if index.encoding is None else {0: EncodedInputs(index.home, index.encoding)}
    return Objective(recipe, parts.network, parts.pipeline, parts.teacher, torch.device("cpu"), encoded)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_pixels(worlds: Path, tmp_path: Path, family: str) -> None:
    folder = world_of(worlds, family)
    changes: dict[str, Any] = {"supervision": {"kind": "distill", "guidance": 2.0}} if family == "flux" else {}
    curves = []
    for path in ("shards", "encoded"):
        curves.append(curve(encoded_recipe(folder, family, folder / path, run=str(tmp_path / path), **changes)))
    pixels, encoded = curves
    assert len(pixels) == len(encoded) and sum("loss" in record for record in pixels) == 3
    for ours, theirs in zip(encoded, pixels, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_losses_are_those_of_the_folder_when_it_is_in_a_store(worlds: Path, tmp_path: Path) -> None:
    folder = world_of(worlds, "flux")
    local = curve(encoded_recipe(folder, "flux", folder / "encoded", run=str(tmp_path / "local")))
    with serve(folder) as store:
        recipe = encoded_recipe(folder, "flux", folder / "encoded", run=str(tmp_path / "remote"))
        remote = replace(recipe, data=replace(recipe.data, path=f"{store.url}/encoded", cache=str(tmp_path / "cache")))
        assert curve(remote) == local


def rectangles() -> Iterator[dict[str, bytes | str]]:
    """Wide, tall and square pictures, some with two captions."""
    for n in range(12):
        png = io.BytesIO()
        size = ((40, 20), (20, 40), (24, 24))[n % 3]
        pixels = np.random.RandomState(n).randint(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(png, "PNG")
        captions = {"captions": ["red", "blue"]} if n % 2 else {"caption": "green"}
        yield {"__key__": f"{n:02}", "png": png.getvalue(), "json": json.dumps(captions)}


def test_buckets_are_encoded_as_they_are_read(worlds: Path, tmp_path: Path) -> None:
    folder = world_of(worlds, "flux")
    write_shards(rectangles(), tmp_path / "shards", samples_per_shard=5, progress=False)
    wide = {"image_size": 16, "buckets": True, "bucket_step": 4, "bucket_batch": 4, "caption_dropout": 0.25}

    def recipe(name: str, **changes: Any) -> Recipe:
        data = wide | {"path": str(tmp_path / name)} | changes
        return encoded_recipe(folder, "flux", tmp_path / name, data=data, run=str(tmp_path / f"run-{name}"))

    encode_data(recipe("shards"), tmp_path / "encoded", World(), batch=4)
    pixels, encoded = (curve(recipe(name)) for name in ("shards", "encoded"))
    assert sum("loss" in record for record in pixels) == 3
    for ours, theirs in zip(encoded, pixels, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    moments = [batch.encoded.moments for batch in batches(recipe("encoded"), 8) if batch.encoded is not None]
    assert len({tuple(m.shape[-2:]) for m in moments}) == 3
    with pytest.raises(ValueError, match=r"pixel sizes \(data\.buckets\)"):
        train(recipe("encoded", buckets=False), World())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_of_the_transformer_is_the_same(worlds: Path, family: str) -> None:
    folder = world_of(worlds, family)
    recipes = [encoded_recipe(folder, family, folder / path) for path in ("shards", "encoded")]
    from_pixels, from_encoded = (objective_of(recipe, text_encoders=n == 0) for n, recipe in enumerate(recipes))
    captions, keys = set(), set()
    for n, (theirs, ours) in enumerate(zip(*(batches(recipe, 6) for recipe in recipes), strict=True)):
        assert ours.pixels is None and ours.encoded is not None
        assert (ours.captions, ours.keys, ours.picture_captions) == (
            theirs.captions, theirs.keys, theirs.picture_captions,
        )  # fmt: skip
        level = from_pixels.training_levels(n, theirs.positions)
        for unprompted in (False, True):
            expected = from_pixels.prepare(theirs, level, 0, unprompted=unprompted)
            found = from_encoded.prepare(ours, level, 0, unprompted=unprompted)
            assert found.arguments.keys() == expected.arguments.keys()
            torch.testing.assert_close(found.x0, expected.x0, atol=1e-5, rtol=1e-5)
            for name, tensor in expected.arguments.items():
                if name == "encoder_hidden_states" and family == "pixart":  # what is masked has no influence
                    mask = expected.arguments["encoder_attention_mask"][..., None]
                    torch.testing.assert_close(found.arguments[name] * mask, tensor * mask, atol=1e-5, rtol=1e-5)
                else:
                    torch.testing.assert_close(found.arguments[name], tensor, atol=1e-5, rtol=1e-5)
        captions |= set(theirs.captions)
        keys |= set(theirs.keys)
    assert "" in captions and len(captions) > 2
    assert len(keys) == 11 and "000001" not in keys, "a bad sample's place is taken in the same way"


def test_the_posterior_is_drawn_anew_at_every_position(worlds: Path) -> None:
    folder = world_of(worlds, "dit")
    recipe = encoded_recipe(folder, "dit", folder / "encoded")
    objective, (batch,) = objective_of(recipe, text_encoders=False), batches(recipe, 1)
    level = objective.training_levels(0, batch.positions)
    again = batch._replace(positions=batch.positions + 12)
    first, second = (objective.prepare(b, level, 0).x0 for b in (batch, again))
    assert (first - second).abs().mean() > 0.01
    assert torch.equal(first, objective.prepare(batch, level, 0).x0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_the_bytes_are_close(worlds: Path, tmp_path: Path, dtype: str) -> None:
    folder = world_of(worlds, "flux")
    half = encode(folder, "flux", tmp_path / "half", dtype=dtype).index
    whole = load_index(folder / "encoded")
    sizes = [index.columns.places["image_bytes"].sum(dtype=int) for index in (half, whole)]
    assert 0.5 < sizes[0] / sizes[1] < 0.55 and half.digest != whole.digest
    recipes = [encoded_recipe(folder, "flux", path) for path in (folder / "shards", tmp_path / "half")]
    objectives = [objective_of(recipe, text_encoders=True) for recipe in recipes]
    (theirs,), (ours,) = (batches(recipe, 1) for recipe in recipes)
    level = torch.full((4,), 0.5)
    expected, found = (o.prepare(b, level, 0) for o, b in zip(objectives, (theirs, ours), strict=True))
    assert found.x0.dtype == torch.float32 and found.arguments["encoder_hidden_states"].dtype == torch.float32
    assert 0 < (found.x0 - expected.x0).abs().max() < 0.05


@pytest.mark.parametrize("family", ["flux", "latte-classes"])
def test_workers_read_the_same(worlds: Path, family: str) -> None:
    folder = world_of(worlds, family)
    recipe = encoded_recipe(folder, family, folder / "encoded")
    data = {"path": recipe.data.path, "image_size": 16, "caption_dropout": 0.5, "workers": 2}
    if family in VIDEOS:
        data |= {"frames": 8, "frame_stride": 2, "images_per_clip": 2}
    other = encoded_recipe(folder, family, folder / "encoded", data=data)
    for ours, theirs in zip(batches(other, 4), batches(recipe, 4), strict=True):
        assert ours.keys == theirs.keys and ours.encoded is not None and theirs.encoded is not None
        assert torch.equal(ours.encoded.moments, theirs.encoded.moments)
        assert torch.equal(ours.encoded.lengths, theirs.encoded.lengths)
        assert all(torch.equal(ours.encoded.text[name], text) for name, text in theirs.encoded.text.items())


def test_text_encoders_are_loaded_for_sample_prompts_alone(worlds: Path, tmp_path: Path) -> None:
    folder, built = world_of(worlds, "flux"), []

    def build(recipe: Recipe, **options: Any) -> Parts:
        built.append(build_parts(recipe, **options))
        return built[-1]

    quick = {"steps": 1, "batch_size": 4, "warmup_steps": 0, "evaluate_every": 0, "evaluate_samples": 4}
    drawing = quick | {"sample_every": 1, "sample_steps": 1, "sample_prompts": (prompt("flux"),)}
    for name, settings in (("quiet", quick), ("drawing", drawing)):
        recipe = encoded_recipe(folder, "flux", folder / "encoded", train=settings, run=str(tmp_path / name))
        run = train(recipe, World(), build=build)
        assert (built[-1].pipeline.text_encoder_2 is None) == (name == "quiet")
        assert len(list((run / "samples").glob("*.png"))) == (name == "drawing")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("flux", {"model": {"text_tokens": 10}}, r"model\.text_tokens 12, now 10"),
        ("flux", {"data": {"image_size": 32}}, r"data\.image_size 16, now 32"),
        ("flux", {"model": {"base": "other"}}, r"vae [0-9a-f]{12}, now [0-9a-f]{12}\. Put"),
        ("dit", {"model": {"base": "other"}}, r"vae [0-9a-f]{12}, now [0-9a-f]{12}\. Put"),
        ("flux", {"model": {"base": "words"}}, r": text_encoder_2 [0-9a-f]{12}, now [0-9a-f]{12}\. Put"),
    ],
)
def test_data_of_other_encoders_are_refused(
    worlds: Path, tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    folder = world_of(worlds, family)
    recipe = encoded_recipe(folder, family, folder / "encoded", run=str(tmp_path / "run"))
    model = {"base": recipe.model.base, "text_tokens": 12} | changes.get("model", {})
    if model["base"] in ("other", "words"):
        shutil.copytree(folder / "base", tmp_path / "base")
        if model["base"] == "other":
            shutil.rmtree(tmp_path / "base" / "vae")
            write_vae(tmp_path / "base", seed=1)
        else:
            weights = tmp_path / "base" / "text_encoder_2" / "model.safetensors"
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        model["base"] = str(tmp_path / "base")
    data = {"path": recipe.data.path, "image_size": 16} | changes.get("data", {})
    recipe = encoded_recipe(folder, family, folder / "encoded", run=recipe.run, model=model, data=data)
    with pytest.raises(ValueError, match=said):
        train(recipe, World())
    assert not (tmp_path / "run").exists(), "before anything is written"


def test_a_base_of_the_same_encoders_takes_the_data(worlds: Path, tmp_path: Path) -> None:
    folder = world_of(worlds, "dit")
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    config = base / "vae" / "config.json"
    config.write_text(config.read_text().replace('"_diffusers_version": "', '"_diffusers_version": "9.'))
    (base / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    model = {"base": str(base), "text_tokens": 77}  # classes have no text
    records = curve(encoded_recipe(folder, "dit", folder / "encoded", model=model, run=str(tmp_path / "run")))
    assert len([record for record in records if "loss" in record]) == 3
