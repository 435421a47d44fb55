"""The second target: a teacher under classifier-free guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit_scale.data.loader import make_loader
from dydit_scale.data.reader import Batch
from dydit_scale.data.shards import load_index
from dydit_scale.train.build import build_parts
from dydit_scale.train.objective import Objective
from dydit_scale.train.recipe import load_recipe
from tests.train.small_run import small_world

SCALE = 3.0


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("objective"))


@pytest.fixture
def objective(recipe_file: Path) -> Objective:
    recipe = load_recipe(recipe_file, [f"supervision.guidance={SCALE}", "data.caption_dropout=0", "adapter.kind=none"])
    parts = build_parts(recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Objective(recipe, parts.network, parts.pipeline, parts.teacher, torch.device("cpu"))


def first_batch(objective: Objective) -> Batch:
    data = objective.recipe.data
    loader = make_loader(
        data, load_index(Path(data.path)), seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4, consumed=0
    )
    return next(iter(loader))


def test_the_batch_follows_without_its_prompts(objective: Objective) -> None:
    batch, level = first_batch(objective), torch.tensor([0.2, 0.4, 0.6, 0.8])
    both = objective.prepare(batch, level, 0, unprompted=True)
    alone = objective.prepare(batch, level, 0)
    none = objective.prepare(batch._replace(captions=("",) * 4), level, 0)
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"):
        expected = torch.cat([alone.arguments[name], none.arguments[name]])
        torch.testing.assert_close(both.arguments[name], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(both.arguments["img_ids"], alone.arguments["img_ids"])


def test_the_dynamic_model_imitates_the_guided_teacher(objective: Objective) -> None:
    batch, level = first_batch(objective), torch.tensor([0.2, 0.4, 0.6, 0.8])
    both = objective.prepare(batch, level, 0, unprompted=True)
    network, teacher = objective.network.train(), objective.teacher
    assert teacher is not None
    terms = objective.terms(network, both, batch.positions, 0)
    noise = objective.gate_noise(batch.positions, both.size)
    guided, flow, ratio = [], [], []
    for captions in (batch.captions, ("",) * 4):
        inputs = objective.prepare(batch._replace(captions=captions), level, 0)
        ours, masks = objective.forward_dynamic(network, inputs, noise)
        guided.append((ours, teacher(return_dict=False, **inputs.arguments)[0]))
        flow.append((ours - (inputs.noise - inputs.x0)).square().flatten(1).mean(1))
        ratio.append(objective.ratio(inputs, masks))
    ours, theirs = (none + SCALE * (with_prompt - none) for with_prompt, none in zip(*guided, strict=True))
    expected = (ours - theirs).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.supervision, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms.flow, sum(flow) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms.ratio, sum(ratio) / 2, atol=1e-6, rtol=1e-6)
    assert terms.supervision.min() > 1e-3


@pytest.mark.parametrize(
    "options", [["supervision.guidance=0.5"], ["supervision.kind=complete", "supervision.guidance=2"]]
)
def test_guidance_without_a_teacher_is_refused(recipe_file: Path, options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"supervision\.guidance: expected 1 \(off\), or more with"):
        load_recipe(recipe_file, options)
