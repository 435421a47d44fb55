"""Micro-batches of several rectangular sizes in one training."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from dydit_scale.data.dataset import load_data
from dydit_scale.data.loader import make_loader
from dydit_scale.data.shards import load_index, write_shards
from dydit_scale.models.family import SampleSize
from dydit_scale.models.loading import load_pipeline, load_transformer
from dydit_scale.models.registry import family_of
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import World
from dydit_scale.train import validation
from dydit_scale.train.build import build_parts, shard_units
from dydit_scale.train.loop import train
from dydit_scale.train.objective import Objective, size_of
from dydit_scale.train.recipe import Recipe
from dydit_scale.train.recompute import checkpoint_function
from dydit_scale.train.validation import Validator
from tests.families.journey import FAMILIES, family_recipe, write_world
from tests.models.tiny import scramble
from tests.train.sizes import SIZES, SizedLoader, batch_of

RECTANGULAR = ("flux", "pixart")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    for family in FAMILIES:
        if family in RECTANGULAR:
            write_world(folder / family, family)
        else:
            FAMILIES[family]().save_pretrained(folder / family / "base")
    return folder


def recipe_of(worlds: Path, family: str) -> Recipe:
    return family_recipe(worlds / family, family, "none")


def objective_of(recipe: Recipe, checkpointing: str = "none") -> Objective:
    """Routers decide at random, so that masks differ from sample to sample."""
    parts = build_parts(recipe)
    if recipe.dynamic is not None:
        scramble(parts.network)
    if checkpointing != "none":
        function = checkpoint_function(parts.network, shard_units(parts.network), checkpointing)  # type: ignore[arg-type]
        parts.network.enable_gradient_checkpointing(function)
    return Objective(recipe, parts.network.train(), parts.pipeline, parts.teacher, CPU)


def _pictures() -> Iterator[dict[str, bytes | str]]:
    for i in range(12):
        file, (height, width) = io.BytesIO(), ((20, 30), (30, 20), (24, 24))[i % 3]
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
        yield {"__key__": f"{i:03d}", "png": file.getvalue(), "txt": "a red circle"}


def terms_of(objective: Objective, positions: range, height: int, width: int) -> tuple[torch.Tensor, ...]:
    batch = batch_of(positions, height, width)
    inputs = objective.prepare(batch, objective.training_levels(0, batch.positions % 8), objective.recipe.seed)
    return tuple(objective.terms(objective.network, inputs, batch.positions, 0)[:3])


@pytest.mark.parametrize(("height", "width"), [(8, 24), (20, 12)])
def test_a_flux_step_is_made_as_diffusers_makes_it(worlds: Path, height: int, width: int) -> None:
    base = str(worlds / "flux" / "base")
    recipe = recipe_of(worlds, "flux")
    recipe = replace(
        recipe, dynamic=None, supervision=replace(recipe.supervision, kind="none"),
        cost=replace(recipe.cost, target=1.0),
    )  # fmt: skip
    objective, batch, level = objective_of(recipe), batch_of(range(3), height, width), torch.tensor([0.2, 0.5, 0.9])
    inputs = objective.prepare(batch, level, recipe.seed)
    pipe: FluxPipeline = load_pipeline(base, objective.family)
    rows, cols = height // 2, width // 2  # of latents; a token is 2x2 of them
    latents = pipe.vae.encode(batch.pixels).latent_dist.mean
    latents = (latents - pipe.vae.config["shift_factor"]) * pipe.vae.config["scaling_factor"]
    pipe.transformer = load_transformer(base, objective.family)
    made, ids = pipe.prepare_latents(3, 12, height, width, torch.float32, CPU, torch.Generator().manual_seed(0))
    assert inputs.x0.shape == made.shape and inputs.size == SampleSize(height=height, width=width)
    torch.testing.assert_close(inputs.x0, pipe._pack_latents(latents, 3, 12, rows, cols))
    torch.testing.assert_close(pipe._unpack_latents(inputs.x0, height, width, pipe.vae_scale_factor), latents)
    assert torch.equal(inputs.arguments["img_ids"], ids)
    text, pooled, text_ids = pipe.encode_prompt(list(batch.captions), None, max_sequence_length=12)
    noise, s = inputs.noise, level[:, None, None]
    answer = pipe.transformer(
        hidden_states=(1 - s) * inputs.x0 + s * noise, timestep=level, encoder_hidden_states=text,
        pooled_projections=pooled, txt_ids=text_ids, img_ids=ids,
    ).sample  # fmt: skip
    expected = (answer - (noise - inputs.x0)).square().mean((1, 2))
    flow = objective.terms(objective.network, inputs, batch.positions, 0).flow
    torch.testing.assert_close(flow, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", RECTANGULAR)
def test_a_batch_does_not_notice_those_of_other_sizes(worlds: Path, family: str) -> None:
    recipe = recipe_of(worlds, family)
    alone = [terms_of(objective_of(recipe), range(4), *size) for size in SIZES[:3]]
    objective = objective_of(recipe)
    for size in reversed(SIZES):
        terms_of(objective, range(8, 10), *size)
    for size, expected in zip(SIZES, alone, strict=False):
        together = terms_of(objective, range(4), *size)
        assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True)), size
        singles = [terms_of(objective, range(n, n + 1), *size) for n in range(4)]
        for a, b in zip(together, zip(*singles, strict=True), strict=True):
            torch.testing.assert_close(a, torch.cat(b), atol=1e-5, rtol=1e-4)
        assert together[0].std() > 0 and together[1].min() > 0


@pytest.mark.parametrize("family", RECTANGULAR)
def test_the_cost_is_that_of_the_batchs_own_size(worlds: Path, family: str) -> None:
    objective = objective_of(recipe_of(worlds, family))
    statics = []
    for height, width in (*SIZES, *SIZES):
        batch = batch_of(range(3), height, width)
        inputs = objective.prepare(batch, objective.training_levels(0, batch.positions), 0)
        noise = objective.gate_noise(batch.positions, inputs.size)
        _, masks = objective.forward_dynamic(objective.network, inputs, noise)
        tokens = height * width // 16
        assert masks.tokens.shape[-1] == tokens
        cost = objective.network.cost(tokens, 12)
        assert torch.equal(objective.ratio(inputs, masks), cost.ratio(masks))
        statics.append(cost.static)
    assert len(set(statics)) == 4 and statics[0] == statics[1], "two of the five sizes have equally many tokens"
    assert objective.cost.cache_info().misses == len(SIZES), "each size is worked out once"


def test_noise_of_gates_for_heads_and_groups_is_that_of_every_size(worlds: Path) -> None:
    objective, positions = objective_of(recipe_of(worlds, "flux")), torch.tensor([5, 9])
    small, large = (objective.gate_noise(positions, SampleSize(height=h, width=w)) for h, w in ((8, 16), (20, 12)))
    assert torch.equal(small.heads, large.heads) and torch.equal(small.groups, large.groups)
    assert small.tokens.shape == (2, 2, 8) and large.tokens.shape == (2, 2, 15)


@pytest.mark.parametrize("family", RECTANGULAR)
def test_recomputation_changes_no_gradient_when_sizes_change(worlds: Path, family: str) -> None:
    recipe, found = recipe_of(worlds, family), []
    for checkpointing in ("none", "full", "selective"):
        objective = objective_of(recipe, checkpointing)
        for n, size in enumerate(SIZES[:3]):
            flow, supervision, ratio = terms_of(objective, range(2 * n, 2 * n + 2), *size)
            (flow.mean() + supervision.mean() + (ratio.mean() - 0.5) ** 2).backward()
        trained = {n: p.grad for n, p in objective.network.named_parameters() if p.requires_grad}
        assert not [name for name, gradient in trained.items() if gradient is None]
        found.append(trained)
    assert len(found[0]) > 20
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_families_with_a_table_of_positions_take_squares_alone(worlds: Path) -> None:
    found = {}
    for name in FAMILIES:
        pipeline = build_parts(recipe_of(worlds, name)).pipeline
        family = family_of(pipeline)
        size = SampleSize(height=8, width=16, frames=8 if family.makes_videos else 1)
        found[name] = family.any_size
        for ask in (family.latent_shape, family.image_tokens):
            assert ask(pipeline, replace(size, height=16))
            if family.any_size:
                assert ask(pipeline, size)
                continue
            with pytest.raises(ValueError, match=r"height 8 and width 16: .*Pipeline makes squares alone"):
                ask(pipeline, size)
    assert len(found) == 6 and sorted(name for name, any_size in found.items() if any_size) == sorted(RECTANGULAR)


def test_the_size_of_clips_with_pictures_is_read_from_the_batch() -> None:
    batch = batch_of(range(2), 8, 16)._replace(pixels=torch.zeros(2, 10, 3, 8, 16), picture_captions=(("", ""),) * 2)
    assert size_of(batch) == SampleSize(height=8, width=16, frames=8, images=2)
    assert size_of(batch._replace(picture_captions=())) == SampleSize(height=8, width=16, frames=10)


def test_a_run_with_buckets_reads_evaluates_and_goes_on(worlds: Path, tmp_path: Path) -> None:
    write_shards(_pictures(), tmp_path / "shards", samples_per_shard=5, progress=False)
    recipe = recipe_of(worlds, "flux")
    data = replace(recipe.data, path=str(tmp_path / "shards"), buckets=True, bucket_step=4, bucket_batch=4)
    runs = []
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for n, last in enumerate(steps):
            train_config = replace(recipe.train, steps=last, evaluate_every=2, final_lr=1.0, sample_every=0)
            one = replace(recipe, run=str(tmp_path / name), data=data, train=train_config)
            train(one, World(), resume=n > 0)
        runs.append({r["step"]: r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r})
    assert sorted(runs[0]) == sorted(runs[1]) == [0, 1, 2, 3]
    for step, record in runs[0].items():
        assert record["loss"] == pytest.approx(runs[1][step]["loss"], rel=1e-6)
    batches = iter(
        make_loader(data, load_data(data), seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4, consumed=0)
    )
    assert len({tuple(next(batches).pixels.shape[-2:]) for _ in range(8)}) > 1, "the data must have several sizes"


def test_a_step_of_buckets_that_is_no_token_is_refused(worlds: Path) -> None:
    recipe = recipe_of(worlds, "flux")
    with pytest.raises(ValueError, match=r"data\.bucket_step 2: expected a multiple of 4 pixels, .* take 4"):
        build_parts(replace(recipe, data=replace(recipe.data, buckets=True, bucket_step=2)))


def test_latte_learns_from_single_pictures_between_clips(worlds: Path) -> None:
    recipe = recipe_of(worlds, "latte")
    objective, picture = objective_of(recipe), batch_of(range(2), 16, 16)
    level = objective.training_levels(0, picture.positions)
    alone, clip = (
        objective.prepare(batch, level, 0) for batch in (picture, picture._replace(pixels=picture.pixels[:, None]))
    )
    assert alone.size == clip.size == SampleSize(height=16, width=16) and alone.x0.shape[2] == 1
    assert torch.equal(alone.x0, clip.x0)
    noise = objective.gate_noise(picture.positions, alone.size)
    sample, masks = objective.forward_dynamic(objective.network, alone, noise)
    assert sample.shape[2] == 1 and masks.tokens.shape[-1] == 16
    assert torch.equal(objective.ratio(alone, masks), objective.network.cost(16, 120, frames=1).ratio(masks))
    terms = objective.terms(objective.network, alone, picture.positions, 0)
    (terms.flow.mean() + terms.supervision.mean() + terms.ratio.mean()).backward()
    idle = [n for n, p in objective.network.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "sharded engines need every block to run on every rank"


def test_data_frames_are_what_is_drawn(worlds: Path) -> None:
    for family in ("latte", "latte-classes"):
        recipe = recipe_of(worlds, family)
        single = replace(recipe, data=replace(recipe.data, frames=1, images_per_clip=0))
        with pytest.raises(ValueError, match=r"frames 1: the model makes clips of 8; set data\.frames to that"):
            build_parts(single)


def test_evaluation_is_the_mean_over_samples_of_all_sizes(worlds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "make_loader", SizedLoader)
    recipe = recipe_of(worlds, "flux")
    recipe = replace(recipe, train=replace(recipe.train, evaluate_samples=130))  # micro-batches of 26
    objective = objective_of(recipe)
    objective.network.eval()
    validator = Validator(recipe, load_index(worlds / "flux" / "shards"), objective, World())
    assert [tuple(batch.pixels.shape[-2:]) for batch in validator.batches] == list(SIZES)
    errors, ratios = [], []
    with torch.no_grad():
        for batch in validator.batches:
            inputs = objective.prepare(batch, validator._levels(batch.positions), validator.seed)
            sample, ratio = objective.predict(objective.network, inputs)
            errors.append((sample - (inputs.noise - inputs.x0)).square().mean((1, 2)))
            ratios.append(ratio)
    found = validator.evaluate(objective.network)
    assert len({float(ratio.mean()) for ratio in ratios}) == len(SIZES)
    assert found.mse_eval == pytest.approx(float(torch.cat(errors).double().mean()), rel=1e-6)
    assert found.ratio_eval == pytest.approx(float(torch.cat(ratios).double().mean()), rel=1e-6)
