"""Predicted peaks against measured ones: real steps of real engines, on one and two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.planning.bases import find_base
from dydit_scale.planning.memory import find_peak, holdings, layout
from dydit_scale.planning.network import Planned
from dydit_scale.planning.trace import trace_step
from dydit_scale.train.recipe import Recipe, load_recipe
from tests.families.journey import FAMILIES, WIDTH, family_recipe, write_world
from tests.parallel.launch import Ranks

quiet_libraries()
BUCKETS = {
    "reduce_bucket_size": 500_000,
    "allgather_bucket_size": 500_000,
    "stage3_prefetch_bucket_size": 500_000,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000,
}
"""Small as the model; the usual ones alone would be larger than all else."""
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"engine": {"name": "single"}}),
    "single-full": (1, {"engine": {"name": "single"}, "train": {"gradient_checkpointing": "full"}}),
    "single-selective": (1, {"engine": {"name": "single"}, "train": {"gradient_checkpointing": "selective"}}),
    "single-half": (1, {"engine": {"name": "single"}, "train": {"gradient_checkpointing": "full",
                                                              "checkpointed_blocks": 2}}),
    "single-accumulation": (1, {"engine": {"name": "single"}, "train": {"accumulation": 2}}),
    "zero2-alone": (1, {"engine": {"name": "zero", "zero_stage": 2}}),
    "fsdp-alone": (1, {"engine": {"name": "fsdp"}}),
    "ddp": (2, {"engine": {"name": "ddp"}}),
    "zero1": (2, {"engine": {"name": "zero", "zero_stage": 1}}),
    "zero2": (2, {"engine": {"name": "zero", "zero_stage": 2}}),
    "zero3": (2, {"engine": {"name": "zero", "zero_stage": 3}}),
    "fsdp": (2, {"engine": {"name": "fsdp"}}),
    "fsdp-full": (2, {"engine": {"name": "fsdp"}, "train": {"gradient_checkpointing": "full"}}),
    "zero1-alone": (1, {"engine": {"name": "zero", "zero_stage": 1}}),
    "zero3-alone": (1, {"engine": {"name": "zero", "zero_stage": 3}}),
    "fsdp-kept": (2, {"engine": {"name": "fsdp", "reshard": False}}),
    "ddp-td-lora": (2, {"engine": {"name": "ddp"}, "adapter": {"kind": "td_lora", "rank": 8},
                        "supervision": {"kind": "distill"}}),
    "zero2-complete": (2, {"engine": {"name": "zero", "zero_stage": 2}, "supervision": {"kind": "complete"}}),
    "ddp-accumulation": (2, {"engine": {"name": "ddp"}, "train": {"accumulation": 2}}),
    "zero1-accumulation": (2, {"engine": {"name": "zero", "zero_stage": 1}, "train": {"accumulation": 2}}),
    "zero2-accumulation": (2, {"engine": {"name": "zero", "zero_stage": 2}, "train": {"accumulation": 2}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of 14 M parameters, whose tensors are most of what a process allocates."""
    from data_tools.shapes import write_shapes
    from dydit_scale.data.shapes.language import vocabulary
    from dydit_scale.models.small import small_flux_pipeline

    folder = tmp_path_factory.mktemp("measured")
    small_flux_pipeline(vocabulary(), heads=8, head_dim=32, double_blocks=3, single_blocks=6).save_pretrained(
        folder / "base"
    )
    write_shapes(folder / "shards", samples=24, side=64, workers=1, progress=False)
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": BUCKETS}))
    return folder


def recipe_file(world: Path, out: Path, changes: dict[str, Any]) -> Path:
    engine = changes["engine"]
    if engine["name"] == "zero":
        engine = engine | {"deepspeed": str(world / "deepspeed.json")}
    train = {"steps": 5, "batch_size": 4, "ema": 0.9, "evaluate_every": 0, "evaluate_samples": 4, "save_every": 100}
    values = {
        "name": "measured",
        "run": str(out / "run"),
        "model": {"base": str(world / "base"), "text_tokens": 16},
        "data": {"path": str(world / "shards"), "image_size": 64},
        "dynamic": {"token_bottleneck": 16},
        **changes,
        "engine": engine,
        "train": train | changes.get("train", {}),
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(values))
    return out / "recipe.yaml"


def predicted(recipe: Recipe, ranks: int) -> int:
    base = find_base(recipe.model.base)
    own = holdings(recipe, Planned.build(recipe, base), encoded=False)
    micro = recipe.train.batch_size // ranks // recipe.train.accumulation
    return find_peak(trace_step(recipe, base, micro, gpu=False), layout(recipe, own, ranks)).total


def measured(recipe: Path, out: Path, ranks: int) -> int:
    with Ranks("tests.planning.measured", str(out), str(recipe), world_size=ranks) as processes:
        processes.wait()
    peaks = [json.loads(path.read_text())["peak"] for path in sorted(out.glob("peak-*.json"))]
    assert len(peaks) == ranks
    return max(peaks)


@pytest.mark.slow  # each case starts one or two processes and trains
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_rank(world: Path, tmp_path: Path, case: str) -> None:
    ranks, changes = CASES[case]
    recipe = recipe_file(world, tmp_path, changes)
    found = measured(recipe, tmp_path, ranks)
    assert predicted(load_recipe(recipe), ranks) == pytest.approx(found, rel=0.05)


@pytest.mark.slow  # a process for each family
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_of_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """In a process alone, where activations are most of all; the other engines share what they do with them."""
    monkeypatch.setitem(WIDTH, "head_dim", 32)  # else the text encoder, which is not counted, would take most
    write_world(tmp_path, family)
    recipe = family_recipe(
        tmp_path, family, "none", run=str(tmp_path / "run"), supervision={"kind": "none"},
        train={"steps": 2, "batch_size": 12, "ema": 0.9, "evaluate_every": 0, "evaluate_samples": 4, "save_every": 9},
    )  # fmt: skip
    from dydit_scale.train.recipe import save_recipe

    save_recipe(recipe, tmp_path / "recipe.yaml")
    found = measured(tmp_path / "recipe.yaml", tmp_path, 1)
    assert predicted(recipe, 1) == pytest.approx(found, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_on_a_gpu(world: Path, tmp_path: Path, precision: str) -> None:
    """Of tensors as CUDA's allocator counts them; it rounds each up to 512 bytes."""
    from dydit_scale.parallel.world import World
    from dydit_scale.train import loop

    changes = {"engine": {"name": "single", "precision": precision}}
    recipe = load_recipe(recipe_file(world, tmp_path, changes))
    original, peaks = loop.train_step, []

    def watched(run: Any, batches: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        done = original(run, batches)
        peaks.append(torch.cuda.max_memory_allocated())
        return done

    loop.train_step = watched
    try:
        loop.train(recipe, World(device=torch.device("cuda", 0)))
    finally:
        loop.train_step = original
    base = find_base(recipe.model.base)
    own = holdings(recipe, Planned.build(recipe, base), encoded=False)
    segments = trace_step(recipe, base, recipe.train.batch_size, gpu=True)
    assert find_peak(segments, layout(recipe, own, 1)).total == pytest.approx(peaks[-1], rel=0.05)
