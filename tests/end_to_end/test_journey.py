"""A run from training to its report, on a base of a few thousand weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open

from dydit_scale.cli.main import main
from dydit_scale.parallel.world import World
from dydit_scale.train.loop import train
from dydit_scale.train.recipe import load_recipe
from dydit_scale.workflows import evaluate
from dydit_scale.workflows.runs import load_run, sample_config, static_pipeline
from tests.train.small_run import small_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with three trained runs: ``dynamic`` (TD-LoRA), ``control`` (LoRA), ``full`` (all weights, static)."""
    folder = tmp_path_factory.mktemp("journey")
    recipe = small_world(folder)
    quick = ["train.steps=3", "train.evaluate_every=0", "train.router_lr=0.1"]
    static = ["dynamic=null", "cost.target=1", "supervision.kind=none"]
    kinds = {"dynamic": [], "control": [*static, "adapter.kind=lora"], "full": [*static, "adapter.kind=none"]}
    for name, options in kinds.items():
        train(load_recipe(recipe, [*quick, *options, f"run={folder / name}"]), World())
    return folder


def test_sampling_prints_static_beside_dynamic(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo rings\n")
    words = [
        "sample",
        str(folder / "dynamic"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--steps", "2", "--cfg", "2"]) == 0
    printed = capsys.readouterr().out
    assert "ideal" in printed and "realised" in printed and "share of the ideal" in printed
    speed = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert speed["macs_dynamic"] < 0.98 * speed["macs_static"]
    assert speed["ideal"] == pytest.approx(speed["macs_static"] / speed["macs_dynamic"])
    assert speed["share"] == pytest.approx(speed["realised"] / speed["ideal"])
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > Image.open(tmp_path / "out" / "00001.png").size[0] == 32


def test_sampling_with_little_memory_and_fixed_numbers_of_tokens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(folder / "dynamic"), "--prompt", "a red circle", "--steps", "2", "--out", str(tmp_path)]
    assert main([*words, "--fixed-tokens"]) == 0
    printed = capsys.readouterr().out
    assert "sub-blocks for 2 steps" in printed and "share of the ideal" in printed
    assert main([*words, "--pack-memory", "0.01"]) == 0
    capsys.readouterr()
    assert main([*words, "--pack-memory", "0"]) != 0  # its adapters have to be folded in
    assert "beside the model at the least, more than max_bytes" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*words, "--execution", "cudagraphs"]) != 0
        assert "expected a model on a CUDA device" in capsys.readouterr().err


def test_sampling_at_another_size(folder: Path, tmp_path: Path) -> None:
    words = ["sample", str(folder / "dynamic"), "--prompt", "a red circle", "--steps", "2", "--out", str(tmp_path)]
    macs = []
    for height, width in ((32, 32), (16, 40), (40, 16)):
        assert main([*words, "--height", str(height), "--width", str(width)]) == 0
        assert Image.open(tmp_path / "00000.png").size == (width, height)
        macs.append(json.loads((tmp_path / "speed.json").read_text())["macs_static"])
    assert macs[0] > macs[1] == macs[2]
    assert main([*words, "--height", "16"]) == 0
    assert Image.open(tmp_path / "00000.png").size == (32, 16), "the other stays the recipe's"
    for wrong, message in ((["--width", "18"], "picture width 18: expected a multiple of 4"), (["--height", "0"], "0")):
        (tmp_path / "00000.png").unlink(missing_ok=True)
        assert main([*words, *wrong]) != 0, message
        assert not (tmp_path / "00000.png").exists()


@torch.no_grad()
def test_packed_sampling_draws_what_masked_sampling_draws(folder: Path) -> None:
    from dydit_scale.sampling.generate import generate, sampler_timesteps

    run = load_run(folder / "dynamic")
    config = sample_config(run, steps=3, cfg=2.0)
    prompts = ["a red circle", "two rings", "a blue square"]
    masked = generate(run.pipeline, prompts, config)
    plan = run.network.pack(sampler_timesteps(run.pipeline, config))
    assert len(plan.blocks) == 3
    packed = generate(run.pipeline, prompts, config)
    assert np.abs(packed.astype(int) - masked.astype(int)).max() <= 1
    one = generate(run.pipeline, prompts[1:2], config, first=1)  # a picture's noise depends on its number alone
    assert np.abs(one[0].astype(int) - packed[1].astype(int)).max() <= 1
    assert not np.array_equal(packed, generate(static_pipeline(run), prompts, config))


@pytest.mark.parametrize("adapter", ["td_lora", "none"])
def test_a_bf16_run_samples_packed_and_exports(folder: Path, tmp_path: Path, adapter: str) -> None:
    options = ["engine.precision=bf16", f"adapter.kind={adapter}", "train.steps=2", "train.evaluate_every=1"]
    run = train(load_recipe(folder / "recipe.yaml", [*options, f"run={tmp_path / 'run'}"]), World())
    words = [str(run), "--prompt", "a red circle", "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main(["sample", *words]) == 0
    assert main(["export", str(run), "--format", "td-lora" if adapter == "td_lora" else "pipeline"]) == 0


@pytest.mark.slow  # three models draw and are judged
def test_evaluation_export_and_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "dynamic"
    assert main(["evaluate", str(run), "--control", str(folder / "control"), "--prompts", "12", "--steps", "3"]) == 0
    scores = json.loads((run / "evaluation" / "scores.json").read_text())
    assert set(scores["models"]) == {"base", "control", "dynamic"} and scores["prompts"] == 12
    assert all(model["frechet"] > 0 for model in scores["models"].values()) and scores["frechet_real"] > 0
    widths = np.load(run / "evaluation" / "widths.npz")
    assert widths["heads"].shape == (3, 2, 4) and widths["tokens"].shape == (3, 2)
    assert widths["tokens"].min() < 1
    tokens = np.load(run / "evaluation" / "tokens.npz")
    assert tokens["keep"].shape == (6, 3, 8, 8)
    words = ["export", str(run), "--format", "td-lora", "--format", "diffusers", "--force"]
    assert main(words) == 0
    rows = json.loads((run / "export" / "export.json").read_text())
    assert [r["format"] for r in rows] == ["td-lora", "diffusers"] and all(r["verified"] for r in rows)
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    assert "dydit evaluate RUN" not in page and "dydit export RUN" not in page  # nothing is missing
    assert re.search(r'(src|href)="https?://', page) is None


@pytest.mark.slow  # two models draw and are judged
def test_evaluation_tells_of_forwards_that_ran_masked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(folder / "dynamic", tmp_path / "dynamic"))
    real = evaluate.sampler_timesteps
    monkeypatch.setattr(evaluate, "sampler_timesteps", lambda *args: real(*args)[:-1])
    monkeypatch.setattr(evaluate, "_save_gates", lambda *args: None)  # its tables want the whole schedule
    assert main(["evaluate", str(run), "--prompts", "2", "--steps", "2"]) == 0
    assert "some forwards ran masked, at the static model's cost: timestep" in capsys.readouterr().out
    speed = json.loads((run / "evaluation" / "speed.json").read_text())
    assert "is not among the 1 packed ones" in speed["fallback"]


@torch.no_grad()
def test_an_exported_lora_works_in_an_ordinary_pipeline(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "control"), "--format", "diffusers", "--out", str(tmp_path)]) == 0
    base = FluxTransformer2DModel.from_pretrained(folder / "base", subfolder="transformer")
    pipe = FluxPipeline.from_pretrained(folder / "base", transformer=base)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    run = load_run(folder / "control")
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 12, "output_type": "np"}
    ours, theirs = (
        p(prompt="a red circle", generator=torch.Generator().manual_seed(0), **options).images
        for p in (run.pipeline, pipe)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_trained_pipeline_is_exported_whole(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(folder / "full"), "--format", "pipeline", "--out", str(tmp_path)]) == 0
    pipe = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipe.transformer) is FluxTransformer2DModel
    (file,) = (tmp_path / "pipeline" / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        assert weights.get_slice("proj_out.weight").get_dtype() == "F16"


def test_mistakes_are_told_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["sample", str(tmp_path), "--prompt", "a red circle"], "no recipe.yaml in it"),
        (["sample", str(folder / "dynamic")], "nothing to draw"),
        (["sample", str(folder / "dynamic"), "--prompts", str(tmp_path / "none.txt")], "no such file"),
        (["export", str(folder / "control"), "--format", "td-lora"], "has adapter.kind 'lora'"),
        (["export", str(folder / "full"), "--format", "diffusers"], "adapter.kind none; there is no LoRA in it"),
        (["base", str(folder / "base")], "holds a pipeline already"),
        (["data", "index", str(tmp_path / "nothing")], "nothing"),
    ]
    for words, message in cases:
        assert main(words) == 64, words
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
