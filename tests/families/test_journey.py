"""Every family: a static base becomes dynamic in training, is saved, loaded, packed and sampled, and exported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.data.loader import make_loader
from dydit_scale.data.shards import load_index
from dydit_scale.models.family import SampleConfig
from dydit_scale.models.loading import family_of_base, load_transformer
from dydit_scale.models.registry import family_of
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import World
from dydit_scale.sampling.generate import generate, recorded, sampler_timesteps
from dydit_scale.train.build import build_parts
from dydit_scale.train.loop import train
from dydit_scale.train.objective import Objective, sample_size
from dydit_scale.workflows.export import export_run
from dydit_scale.workflows.runs import load_run, sample_config, static_pipeline
from tests.families.journey import ADAPTERS, FAMILIES, FRAMES, VIDEOS, family_recipe, prompt, write_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, with its base and its data."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_world(folder / family, family)
    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, worlds: Path) -> tuple[str, Path]:
    return request.param, worlds / request.param


def trained(folder: Path, family: str, adapter: str) -> Path:
    """The run on one process, made by the first test that asks for it."""
    run = folder / f"run-{adapter}"
    if not run.is_dir():
        train(family_recipe(folder, family, adapter), World())
    return run


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_is_adapted_saved_loaded_packed_and_sampled(family: tuple[str, Path], adapter: str) -> None:
    name, folder = family
    made = trained(folder, name, adapter)
    records = read_metrics(made / "metrics.jsonl")
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    run = load_run(made, device="cpu")
    config = sample_config(run, steps=3, cfg=2.0, batch=2)
    prompts = [prompt(name), "", prompt(name)]
    with recorded(run.network) as seen:
        masked = generate(run.pipeline, prompts, config)
    timesteps = sampler_timesteps(run.pipeline, config)
    assert sorted(set(seen.timesteps)) == pytest.approx(sorted(set(timesteps.tolist())))
    run.network.pack(timesteps)
    packed = generate(run.pipeline, prompts, config)
    shape = (3, FRAMES, 16, 16, 3) if name in VIDEOS else (3, 16, 16, 3)
    assert masked.shape == shape and masked.dtype == np.uint8
    assert np.abs(packed.astype(int) - masked.astype(int)).max() <= 1  # rounding to bytes
    alone = generate(run.pipeline, prompts[2:], config, first=2)
    assert np.abs(alone[0].astype(int) - packed[2].astype(int)).max() <= 1  # noise belongs to the picture's number
    static = generate(static_pipeline(run), prompts[:1], config)
    assert static.shape[1:] == shape[1:]


def test_its_objective_trains_every_router_and_weight(family: tuple[str, Path]) -> None:
    name, folder = family
    recipe = family_recipe(folder, name, "none")
    parts = build_parts(recipe)
    objective = Objective(recipe, parts.network, parts.pipeline, parts.teacher, torch.device("cpu"))
    loader = make_loader(
        recipe.data, load_index(folder / "shards"), seed=0, rank=0, world_size=1, global_batch=4, micro_batch=4,
        consumed=0,
    )  # fmt: skip
    batch = next(iter(loader))
    parts.network.train()
    for step in range(3):
        inputs = objective.prepare(batch, objective.training_levels(step, batch.positions), seed=step)
        terms = objective.terms(parts.network, inputs, batch.positions + 4 * step, step)
        (terms.flow.mean() + terms.supervision.mean() + (terms.ratio.mean() - 0.5) ** 2).backward()
    without = {n for n, p in parts.network.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    size = sample_size(recipe)
    cost = family_of(parts.pipeline).cost(parts.network, parts.pipeline, size, recipe.model.text_tokens)
    assert 0 < terms.ratio.min() <= terms.ratio.max() <= 1.1 and cost.static > 0


def test_its_exports_are_loaded_back(family: tuple[str, Path]) -> None:
    name, folder = family
    (row,) = export_run(trained(folder, name, "td_lora"), ["td-lora"])
    assert row["verified"]
    (row,) = export_run(trained(folder, name, "none"), ["pipeline"])
    assert row["verified"]
    folded, merged, static = export_run(folder / "run-td_lora", ["peft", "pipeline", "static"], steps=4, force=True)
    assert (folded["routers"], merged["routers"], static["routers"]) == (False, True, False)
    base, transformer = (load_transformer(at, family_of_base(at)) for at in (str(folder / "base"), static["path"]))
    assert type(transformer) is type(base)
    assert [n for n, _ in transformer.named_parameters() if is_dynamic_name(n)] == []
    (row,) = export_run(folder / "run-none", ["static"])
    assert row["verified"] and type(load_transformer(row["path"], family_of_base(row["path"]))) is type(base)
    assert (type(base).__module__.startswith("diffusers.")) == (name in ("flux", "pixart")), "as the README says"
    lora = load_file(Path(folded["path"]) / "adapter_model.safetensors")
    for key in (k for k in lora if k.endswith(".lora_A.weight")):
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        expected = base.get_parameter(f"{layer}.weight") + lora[key.replace("_A.", "_B.")] @ lora[key]
        assert torch.equal(transformer.get_parameter(f"{layer}.weight"), expected.half().float()), layer
    plain = ["diffusers", "lora-ranges", "lora-experts"]
    if name == "flux":
        fused = export_run(folder / "run-td_lora", ["kohya", "comfyui"], steps=4, force=True)
        assert [row["output_error"] for row in fused] == pytest.approx([folded["output_error"]] * 2, rel=1e-3)
        mean, ranges, experts = export_run(folder / "run-td_lora", plain, steps=4, ranges=2)
        assert experts["output_error"] < ranges["output_error"] < mean["output_error"]
        assert len(list(Path(ranges["path"]).glob("lora_*.safetensors"))) == 2
        assert ranges["error_mean"] < ranges["error_max"]
        with pytest.raises(ValueError, match="lora-experts export needs td_lora"):
            export_run(folder / "run-none", ["lora-experts"])
    else:
        for kind in plain:
            with pytest.raises(ValueError, match="diffusers loads no LoRA into a"):
                export_run(folder / "run-td_lora", [kind])


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_exports_replace_their_own_alone_and_only_once_verified(
    family: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = family
    run, log = trained(folder, name, "td_lora"), folder / "run-td_lora" / "export" / "export.json"
    (tmp_path / "peft").mkdir()
    for name in ("README.md", "MODEL_CARD.md"):
        (tmp_path / name).write_text("my own words")
    with pytest.raises(ValueError, match="that no export wrote; choose another --out"):
        export_run(run, ["td-lora"], out=tmp_path)
    (tmp_path / "MODEL_CARD.md").unlink()
    with pytest.raises(ValueError, match="peft exists and is no export of this run"):
        export_run(run, ["td-lora", "peft"], out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "peft"], "nothing was written"
    (tmp_path / "peft").rmdir()
    export_run(run, ["peft"], out=tmp_path, force=True, license="mit")
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert "license: mit" in (tmp_path / "MODEL_CARD.md").read_text()
    weights = (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("dydit_scale.workflows.exports.common.LARGEST_ERROR", 1e-9)
    with pytest.raises(ValueError, match="the mean over timesteps misses the adapter by"):
        export_run(run, ["peft"], out=tmp_path)
    monkeypatch.setattr("dydit_scale.workflows.export.LARGEST_ERROR", 1e-9)
    monkeypatch.setattr("dydit_scale.workflows.exports.common.LARGEST_ERROR", 1.0)
    with pytest.raises(ValueError, match=r"the outputs miss .* of the adapter's effect"):
        export_run(run, ["peft"], out=tmp_path)
    monkeypatch.setattr("dydit_scale.adapters.verify.relative_error", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="nan off the model in memory"):
        export_run(run, ["peft"], out=tmp_path, force=True)
    assert (tmp_path / "peft" / "adapter_model.safetensors").read_bytes() == weights
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MODEL_CARD.md", "README.md", "dydit_samples.png", "peft"]
    monkeypatch.undo()
    export_run(run, ["peft", "kohya"], out=tmp_path, force=True)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "license: mit" in card and card.count("| peft |") == card.count("| kohya |") == 1
    rows = [row for row in json.loads(log.read_text()) if row["path"].startswith(str(tmp_path))]
    assert [row["format"] for row in rows] == ["peft", "kohya"] and rows[0]["path"] == str(tmp_path / "peft")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora_flux" and "routers" in header["modelspec.description"]
    assert json.loads((tmp_path / "kohya.json").read_text())["total"] == pytest.approx(
        float(header["dydit.mean_error"]), rel=1e-4
    )


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_a_weight_that_fp16_cannot_hold_is_refused(family: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder = family
    run = load_run(trained(folder, name, "none"), device="cpu", fp32=True)
    with torch.no_grad():
        next(run.network.parameters()).flatten()[0] = 1e6
    monkeypatch.setattr("dydit_scale.workflows.export.load_run", lambda *_, **__: run)
    with pytest.raises(ValueError, match=r"fp16: .* has values that are NaN or infinite"):
        export_run(folder / "run-none", ["pipeline"], out=folder / "too-large")
    assert list((folder / "too-large").iterdir()) == []


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_a_plain_lora_loses_nothing_in_any_format(family: tuple[str, Path]) -> None:
    name, folder = family
    recipe = family_recipe(folder, name, "lora")
    train(recipe, World())
    rows = export_run(folder / "run-lora", ["diffusers", "peft", "kohya", "comfyui", "pipeline", "static"], force=True)
    assert all(row["error_mean"] == row["error_max"] == 0 and row["output_error"] < 0.01 for row in rows)


@pytest.mark.parametrize("family", ["flux", "dit"], indirect=True)
def test_the_card_says_how_to_load_what_lies_beside_it(
    family: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = family
    run = trained(folder, name, "td_lora")
    plain = ["diffusers", "kohya", "comfyui", "lora-ranges", "lora-experts"] if name == "flux" else []
    rows = export_run(
        run, ["td-lora", "peft", *plain, "pipeline", "static"], out=tmp_path, steps=4, ranges=2, force=True,
        license="apache-2.0",
    )  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["license"] == "apache-2.0" and {"dydit-scale", "dynamic", "td-lora"} <= set(said["tags"])
    assert said.get("pipeline_tag") == ("text-to-image" if name == "flux" else None) and "base_model" not in said
    target = family_recipe(folder, name, "td_lora").cost.target
    assert f"(target {target:.2f})" in text and all(f"| {row['format']} | `" in text for row in rows)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == len(rows) - (name == "flux")  # ComfyUI's is no Python
    for snippet in snippets:
        if name == "flux" and "kohya.safetensors" in snippet:
            continue  # diffusers reads it at the published size only
        exec(compile(snippet, "card", "exec"), {})


@pytest.mark.launch
@pytest.mark.slow  # twelve runs on two ranks; tests/multiprocess trains one family under real launchers
def test_two_ranks_train_as_one(worlds: Path) -> None:
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--master_port", "29641"]
    command += ["-m", "tests.families.two_ranks", worlds]
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, adapter in product(FAMILIES, ADAPTERS):
        one = trained(worlds / name, name, adapter) / "metrics.jsonl"
        two = worlds / name / f"two-{adapter}" / "metrics.jsonl"
        for ours, theirs in zip(read_metrics(two), read_metrics(one), strict=True):
            for key in ("loss", "ratio", "mse_eval", "ratio_eval"):
                assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-5), (name, adapter, key)


def test_samplers_belong_to_families(worlds: Path) -> None:
    for family, sampler, known in (("dit", "dpm++", True), ("sit", "heun", True), ("sit", "ddim", False)):
        recipe = family_recipe(worlds / family, family, "td_lora")
        pipeline = build_parts(recipe).pipeline
        pipeline.transformer.eval()
        config = SampleConfig(steps=3, height=16, width=16, sampler=sampler)
        if known:
            with recorded(pipeline.transformer) as seen:
                generate(pipeline, [prompt(family)], config)
            assert seen.timesteps == pytest.approx(sampler_timesteps(pipeline, config).tolist())
        else:
            with pytest.raises(ValueError, match=r"sampler 'ddim': SiTPipeline takes one of euler, heun, sde"):
                generate(pipeline, [prompt(family)], config)
