"""The phase of frozen routers: its table of sub-networks, and runs that enter it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.dynamic.masks import GateNoise, WidthMasks
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import World
from dydit_scale.train.frozen import LEVELS, WidthTable, decides_width, even_numbers
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import Recipe, load_recipe
from dydit_scale.workflows.runs import load_run
from tests.models import tiny, tiny_dit
from tests.multiprocess.frozen import divide_routers
from tests.train.small_run import small_world

PHASE = (
    "train.steps=5",
    "cost.ramp_steps=2",
    "frozen_routers.from_step=2",
    "train.accumulation=2",
    "dynamic.token_bias=0.0",
)


def table_of(*edges: float) -> WidthTable:
    """Two layers of three heads and two groups; a head of layer 1 goes off at each of the edges, the last one on
    again."""
    heads, groups = torch.ones(2, LEVELS, 3, dtype=torch.bool), torch.ones(2, LEVELS, 2, dtype=torch.bool)
    for n, edge in enumerate(edges):
        heads[1, int(edge * LEVELS) :, n % 3] = n < 2
    return WidthTable.build(WidthMasks(heads, groups))


def test_levels_share_a_network_only_if_all_masks_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(4, LEVELS, 3, generator=generator) > 0.7
    groups = torch.rand(4, LEVELS, 2, generator=generator) > 0.7
    table = WidthTable.build(WidthMasks(heads.float(), groups.float()))
    assert 100 < len(table.networks) < LEVELS
    for level in range(0, LEVELS, 7):
        masks = table.networks[int(table.of_level[level])].masks(torch.device("cpu"))
        assert torch.equal(masks.heads[:, 0].bool(), heads[:, level])  # type: ignore[index]
        assert torch.equal(masks.groups[:, 0].bool(), groups[:, level])  # type: ignore[index]
    first = [network.layers[0] for network in table.networks]
    assert len({id(units) for units in first}) <= 2**5 < len(first), "equal masks of a layer are one object"


def test_one_kind_of_width_is_enough() -> None:
    heads = torch.arange(LEVELS)[None, :, None] < torch.tensor([LEVELS, 300])
    table = WidthTable.build(WidthMasks(heads, None))
    assert [units.groups for network in table.networks for units in network.layers] == [None, None]
    assert sorted(table.of_level.bincount().tolist()) == [300, 700]


def test_levels_are_distributed_as_ever() -> None:
    """Each of the levels comes equally often, though a micro-batch has those of one sub-network."""
    table, micro, per_step, steps = table_of(0.05, 0.3, 0.72), 8, 4, 2500
    counts = torch.zeros(LEVELS)
    covered = []
    for step in range(steps):
        seen = set()
        for n in range(per_step):
            network, numbers = table.draw(7, step, torch.arange(n * micro, (n + 1) * micro))
            levels = (numbers * LEVELS).long()
            assert {id(table.networks[i]) for i in table.of_level[levels]} == {id(network)}
            assert ((numbers * LEVELS) % 1).allclose(torch.tensor(0.5), atol=1e-3)
            counts.index_add_(0, levels, torch.ones(micro))
            seen |= {int(i) for i in levels // (LEVELS // 4)}
        covered.append(len(seen))
    quarter = counts.view(20, -1).sum(1) / counts.sum()
    assert torch.allclose(quarter, torch.full((20,), 1 / 20), atol=0.003)
    assert min(covered) >= 3, "a step's micro-batches lie apart"


def test_a_draw_depends_on_its_place_alone() -> None:
    table, places = table_of(0.2, 0.5, 0.7), torch.arange(8, 16)
    a, b = (table.draw(0, 3, places) for _ in range(2))
    assert a[0] is b[0] and torch.equal(a[1], b[1])
    others = [table.draw(*key)[1] for key in ((1, 3, places), (0, 4, places), (0, 3, places + 8))]
    assert all(not torch.equal(a[1], other) for other in others)


@pytest.mark.parametrize("make", [tiny.tiny_dynamic, tiny_dit.tiny_dynamic])
def test_no_other_parameter_decides_width(make: Any) -> None:
    """Change all that ``decides_width`` does not name: the masks of no timestep move; change any of those: some do."""
    model: DyFluxTransformer2DModel | DyDiTTransformer2DModel = tiny.scramble(make())
    unit = 1 if make is tiny.tiny_dynamic else 1000

    def masks() -> torch.Tensor:
        table = model.step_table(even_numbers()[::20] * unit)
        assert table.heads is not None and table.groups is not None
        return torch.cat([table.heads, table.groups], dim=-1)

    before = masks()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not decides_width(name):
                parameter.add_(1.0)
    assert torch.equal(masks(), before)
    deciding = [parameter for name, parameter in model.named_parameters() if decides_width(name)]
    assert len(deciding) == 8
    for parameter in deciding:
        with torch.no_grad():
            parameter.mul_(-1.0)
        assert not torch.equal(masks(), before)
        with torch.no_grad():
            parameter.mul_(-1.0)


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_world(folder)
    return folder


@pytest.fixture(autouse=True)
def divided_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    divide_routers(monkeypatch.setattr)


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", [*PHASE, *overrides])


def curve(run: Path) -> list[dict]:
    kept = ("step", "loss", "loss_flow", "ratio", "sub_networks", "mse_eval", "ratio_eval")
    records = (r for r in read_metrics(run / "metrics.jsonl") if "checkpoint_seconds" not in r)
    return [{k: v for k, v in r.items() if k in kept} for r in records]


@pytest.mark.parametrize("options", ["adapter.kind=none", "adapter.kind=td_lora", "frozen_routers.tokens=false"])
def test_routers_stand_still_and_a_resume_is_exact(world_folder: Path, tmp_path: Path, options: str) -> None:
    whole = train(
        recipe_of(world_folder, options, "train.save_every=1", "train.keep=9", f"run={tmp_path / 'a'}"), World()
    )
    records = [r for r in curve(whole) if "loss" in r]
    assert ["sub_networks" in r for r in records] == [False, False, True, True, True]
    assert records[-1]["sub_networks"] > 1
    states = {c.step: c.tensors for c in (checkpoint_at(whole, step) for step in (2, 3, 5))}
    frozen = [n for n in states[2] if n.startswith("param.") and freezes(n, tokens="tokens=false" not in options)]
    learning = [n for n in states[2] if n.startswith("param.") and n not in frozen]
    assert len(frozen) >= 4 and len(learning) >= 8
    for name in frozen:
        assert torch.equal(states[5][name], states[2][name]), name
        assert torch.equal(states[5][name.replace("param.", "ema.", 1)], states[2][name]), name
    moved = [name for name in learning if not torch.equal(states[5][name], states[3][name])]
    assert len(moved) > 0.9 * len(learning)

    shutil.copytree(whole, tmp_path / "b")
    for step in (4, 5):  # as if killed amid the phase
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step-{step:010d}")
    train(
        recipe_of(world_folder, options, "train.save_every=1", "train.keep=9", f"run={tmp_path / 'b'}"),
        World(),
        resume=True,
    )
    assert curve(tmp_path / "b") == curve(whole)
    again = checkpoint_at(tmp_path / "b", 5).tensors
    assert all(torch.equal(again[name], states[5][name]) for name in again)


def freezes(name: str, *, tokens: bool) -> bool:
    return decides_width(name.removeprefix("param.")) or (tokens and ".dy_token." in name)


def checkpoint_at(run: Path, step: int) -> Any:
    """The checkpoint of a step, from a copy that has no later one."""
    folder = run.parent / f"{run.name}-{step}"
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == step
    return checkpoint


def test_the_table_is_that_of_the_sampled_model(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[WidthTable] = []
    build = WidthTable.build
    monkeypatch.setattr(WidthTable, "build", lambda masks: seen.append(build(masks)) or seen[-1])
    folder = train(recipe_of(world_folder, f"run={tmp_path / 'run'}"), World())
    (table,) = seen
    run = load_run(folder, device="cpu")
    timesteps = torch.sigmoid(torch.special.ndtri(even_numbers().double())).float()
    masks = run.network.step_table(timesteps)
    for level in range(0, LEVELS, 9):
        found = table.networks[int(table.of_level[level])].masks(torch.device("cpu"))
        assert torch.equal(found.heads[:, 0].bool(), masks.heads[:, level]) if found.heads is not None else True
        assert torch.equal(found.groups[:, 0].bool(), masks.groups[:, level])  # type: ignore[index]


def test_no_noise_is_drawn_and_the_cost_is_not_steered(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dydit_scale.train.objective import Objective

    calls: list[int] = []
    draw = Objective.gate_noise

    def counted(self: Objective, *args: Any) -> GateNoise:
        calls.append(1)
        return draw(self, *args)

    monkeypatch.setattr(Objective, "gate_noise", counted)
    folder = train(recipe_of(world_folder, "supervision.kind=none", f"run={tmp_path / 'run'}"), World())
    assert len(calls) == 2 * 2  # micro-batches before the phase
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert all(r["loss"] == pytest.approx(r["loss_flow"]) for r in records[2:])
    assert all(r["loss"] > r["loss_flow"] for r in records[:2])
    assert all(0 < r["ratio"] < 1 and r["loss_cost"] > 0 for r in records)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("frozen_routers.from_step=1",), "after the ramp to cost.target, which ends at 2"),
        (("frozen_routers.from_step=5",), "before train.steps 5"),
        (("frozen_routers.from_step=-1",), "frozen_routers.from_step: expected a step"),
        (("adapter.kind=lora", "adapter.variant=dora"), "dora cannot be cut"),
        (("dynamic.heads=false", "dynamic.mlp=false"), "no width is dynamic"),
        (("dynamic.always_on=false",), "always_on"),
        (("engine.compile=true",), "engine.compile"),
        (("engine.name=zero", "engine.zero_stage=3"), "ZeRO-3"),
    ],
)
def test_what_cannot_be_frozen_is_refused(world_folder: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(world_folder, *overrides)
