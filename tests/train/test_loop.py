from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer

from dydit_scale.checkpoint.store import CheckpointError, load_checkpoint
from dydit_scale.data.shapes.language import vocabulary
from dydit_scale.models.small import small_flux_pipeline
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.monitoring.registry import CLOCK_KEYS
from dydit_scale.parallel import faults
from dydit_scale.parallel.world import World
from dydit_scale.sampling.generate import generate, sampler_timesteps
from dydit_scale.train.__main__ import main
from dydit_scale.train.exits import Exit
from dydit_scale.train.loop import lr_scale, train
from dydit_scale.train.recipe import Recipe, load_recipe
from dydit_scale.workflows.export import export_run
from dydit_scale.workflows.runs import load_run, sample_config
from tests.train.small_run import small_world


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_world(folder)
    return folder


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides)


def curve(run: Path) -> list[dict]:
    records = (r for r in read_metrics(run / "metrics.jsonl") if "checkpoint_seconds" not in r)
    return [{k: v for k, v in r.items() if k not in CLOCK_KEYS} for r in records]


@pytest.mark.parametrize("adapter", ["td_lora", "td_lora adapter.gate_scope=network", "none"])
def test_an_interrupted_run_continues_exactly(world_folder: Path, tmp_path: Path, adapter: str) -> None:
    options = f"adapter.kind={adapter}".split()
    whole = train(recipe_of(world_folder, *options, f"run={tmp_path / 'whole'}"), World())
    cut = train(recipe_of(world_folder, *options, f"run={tmp_path / 'cut'}"), World())
    assert curve(cut) == curve(whole)
    shutil.rmtree(cut / "checkpoints" / "step-0000000004")  # as if killed after step 3
    train(recipe_of(world_folder, *options, f"run={tmp_path / 'cut'}"), World(), resume=True)
    assert len(curve(whole)) == 6 and curve(cut) == curve(whole)
    a, b = (load_checkpoint(run / "checkpoints") for run in (whole, cut))
    assert a is not None and b is not None and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_gate_of_the_network_is_logged_and_exported(world_folder: Path, tmp_path: Path) -> None:
    options = ["adapter.kind=td_lora", "adapter.gate_scope=network"]
    folder = train(recipe_of(world_folder, *options, f"run={tmp_path / 'run'}"), World())
    run = load_run(folder, device="cpu")
    assert len([name for name in run.checkpoint.tensors if name.startswith("ema.") and ".td_router." in name]) == 2
    with np.load(sorted((folder / "gates").glob("*.npz"))[-1]) as log:
        gates = log["gates"]
    assert len(gates) > 1 and (gates == gates[:1]).all() and np.ptp(gates) > 0
    rows = {row["format"]: row["output_error"] for row in export_run(folder, ["lora-experts", "diffusers"], force=True)}
    assert rows["lora-experts"] < 1e-3 < rows["diffusers"] < 1


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_of_lora_train_are_loaded_back_and_packed(world_folder: Path, tmp_path: Path, variant: str) -> None:
    options = ["adapter.kind=lora", f"adapter.variant={variant}", "adapter.alpha=3", "supervision.kind=distill"]
    folder = train(recipe_of(world_folder, *options, f"run={tmp_path / 'run'}"), World())
    run = load_run(folder, device="cpu")
    trained = [name for name in run.checkpoint.tensors if name.startswith("ema.") and "lora_" in name]
    assert any("lora_magnitude_vector" in name for name in trained) == (variant == "dora")
    layer = next(module for module in run.network.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == pytest.approx(3 / (2**0.5 if variant == "rslora" else 2))
    with torch.no_grad():
        for name, parameter in run.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1.3)
    config = sample_config(run, steps=2, cfg=2.0)
    masked = generate(run.pipeline, ["a red circle"], config)
    run.network.pack(sampler_timesteps(run.pipeline, config))
    packed = generate(run.pipeline, ["a red circle"], config)
    assert np.abs(packed.astype(int) - masked.astype(int)).max() <= 1
    for formats in (["pipeline", "static"], ["diffusers"]):
        if variant == "dora" and formats == ["diffusers"]:
            with pytest.raises(ValueError, match="DoRA"):
                export_run(folder, formats)
        else:
            assert all(row["error_mean"] == 0 for row in export_run(folder, formats))


@pytest.mark.parametrize("adapter", ["td_lora", "none", "lora"])
@pytest.mark.parametrize("supervision", ["none", "complete", "distill"])
def test_every_trainable_parameter_learns(world_folder: Path, tmp_path: Path, adapter: str, supervision: str) -> None:
    options = [f"adapter.kind={adapter}", f"supervision.kind={supervision}", "train.steps=2", "train.evaluate_every=0"]
    run = train(recipe_of(world_folder, *options, f"run={tmp_path / 'run'}"), World())
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    moments = {k.removeprefix("exp_avg."): v for k, v in checkpoint.tensors.items() if k.startswith("exp_avg.")}
    assert [name for name, moment in moments.items() if not moment.any()] == []
    assert any("dy_width" in name for name in moments) and any("dy_token" in name for name in moments)
    assert any("lora" in n or ".td_" in n for n in moments) == (adapter != "none")


def test_accumulation_gives_the_same_flow_losses_without_the_cost_term(world_folder: Path, tmp_path: Path) -> None:
    options = ["supervision.kind=none", "cost.weight=0", "train.evaluate_every=0"]
    curves = []
    for n in (1, 2):
        run = train(recipe_of(world_folder, *options, f"train.accumulation={n}", f"run={tmp_path / str(n)}"), World())
        curves.append([r["loss_flow"] for r in curve(run) if "loss" in r])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_the_run_folder_holds_what_it_should(world_folder: Path, tmp_path: Path) -> None:
    options = [
        "train.sample_every=4",
        "train.sample_steps=2",
        "train.sample_cfg=2",
        "train.sample_prompts=[a red circle,two rings]",
    ]
    recipe = recipe_of(world_folder, *options, f"run={tmp_path / 'run'}")
    run = train(recipe, World())
    assert load_recipe(run / "recipe.yaml") == recipe
    assert (run / "samples" / "step-0000004.png").stat().st_size > 100
    assert list((run / "tensorboard").iterdir())
    steps = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in steps] == [0, 1, 2, 3]
    assert [r["target"] for r in steps] == [1.0, 0.75, 0.5, 0.5]
    assert {"loss_flow", "loss_supervision", "loss_cost", "ratio", "lr", "grad_norm", "samples_per_second"} <= set(
        steps[0]
    )


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    scales = [lr_scale(s, steps=11, warmup=2, final=0.1) for s in range(11)]
    assert scales[:3] == [0.5, 1.0, 1.0]
    assert scales[6] == pytest.approx(0.55) and scales[-1] == pytest.approx(0.1)


BAD = {
    "trian.lr=1": "unknown key trian; did you mean train?",
    "train.lrr=1": "unknown key train.lrr; did you mean train.lr?",
    "train.steps=many": "train.steps: expected int; got 'many'",
    "adapter.kind=dora": "adapter.kind: expected one of none, routers, lora, td_lora; got 'dora'",
    "cost.target=1.5": "expected a ratio in (0, 1]; got 1.5",
    "cost.target=0.05": "still costs",
    "data.path=/nowhere": "/nowhere",
    "model.base=./nowhere": "expected the folder of a pipeline",
    "data.image_size=30": "expected a multiple of 4 pixels",
    "flow.shift=0": "expected positive numbers",
    "train.evaluate_samples=0": "train.evaluate_samples: expected 1 or more",
    "train.betas=[0.9]": "expected two numbers in [0, 1)",
    "train.ema=1.5": "expected a decay in [0, 1)",
    "cost.ramp_steps=-1": "not negative",
    "train.accumulation=3": "not divisible by 1 ranks x 3 micro-batches; the nearest that fit are 6 and 9",
    "dynamic=null": "dynamic is null: a static model always costs 1",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_told_before_any_work(
    world_folder: Path, tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([str(world_folder / "recipe.yaml"), override, f"run={run}"]) == Exit.BAD_CONFIG
    assert BAD[override] in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


def test_a_base_that_does_not_fit_names_the_key(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world_folder / "base", base)
    config = json.loads((base / "transformer" / "config.json").read_text())
    for changes, key in (
        ({"in_channels": 52}, "proj_out.bias"),
        ({"num_single_layers": 2}, "single_transformer_blocks.1"),
    ):
        (base / "transformer" / "config.json").write_text(json.dumps({**config, **changes}))
        code = main([str(world_folder / "recipe.yaml"), f"model.base={base}", f"run={tmp_path / 'run'}"])
        assert code == Exit.BAD_CONFIG and key in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(world_folder / "recipe.yaml"), f"run={tmp_path / 'run'}", "train.steps=1", "train.save_every=1"]
    assert main(words) == 0
    assert main(words) == Exit.BAD_CONFIG
    assert "continue it with --resume, or choose another" in capsys.readouterr().err
    assert main([*words, "--resume", "train.steps=2"]) == 0
    assert "train.steps: 1 -> 2" in capsys.readouterr().out


def test_a_resume_goes_on_in_the_data_where_it_was_and_refuses_other_data_or_another_base(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_world(tmp_path)
    words = [str(tmp_path / "recipe.yaml"), f"run={tmp_path / 'run'}", "train.save_every=2"]
    assert main([*words, "train.steps=2"]) == 0  # 16 samples
    assert main([*words, "train.steps=3", "train.batch_size=4", "--resume"]) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.meta["consumed"] == 20
    capsys.readouterr()
    small_flux_pipeline(vocabulary(), heads=4, head_dim=8, double_blocks=1, single_blocks=1, seed=1).save_pretrained(
        tmp_path / "base"
    )
    assert main([*words, "--resume"]) == Exit.BAD_CONFIG
    assert "its base changed since step 3" in capsys.readouterr().err
    assert main([*words, f"model.base={world_folder / 'base'}", f"data.path={tmp_path / 'other'}", "--resume"]) != 0


SAVES = ["train.save_every=1", "train.evaluate_every=0", "train.keep=9"]


@pytest.mark.parametrize("mode", ["true", "false"])
def test_training_survives_a_save_that_fails(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    monkeypatch.setenv("DYDIT_FAULT", "checkpoint.writing=2:enospc,checkpoint.before_commit=3:raise")
    faults._struck.clear()
    run = train(recipe_of(world_folder, *SAVES, f"train.async_save={mode}", f"run={tmp_path / 'run'}"), World())
    said = "".join(capsys.readouterr())
    assert said.count("training goes on, the checkpoint before it is intact") == 2
    assert "step 2 was not written" in said and "disk full" in said and "raised at checkpoint.before_commit" in said
    assert sorted(p.name[-1] for p in (run / "checkpoints").glob("step-*")) == ["1", "4"]
    assert not list((run / "checkpoints").glob(".tmp*"))
    saves = [r for r in read_metrics(run / "metrics.jsonl") if "checkpoint_seconds" in r]
    assert [(r["step"], r["checkpoint_failures"]) for r in saves] == [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert all(r["checkpoint_blocked_seconds"] > 0 and r["checkpoint_bytes"] > 1000 for r in saves)


@pytest.mark.parametrize("last", [3, 4])
def test_too_many_failed_saves_in_a_row_end_the_run_and_so_does_the_last_one(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    failing = range(1, 4) if last == 3 else range(4, 5)
    monkeypatch.setenv("DYDIT_FAULT", ",".join(f"checkpoint.written={step}:enospc" for step in failing))
    faults._struck.clear()
    with pytest.raises(CheckpointError, match=f"step {last} was not written.*disk full"):
        train(recipe_of(world_folder, *SAVES, f"run={tmp_path / 'run'}"), World())
    written = len(list((tmp_path / "run" / "checkpoints").glob("step-*")))
    assert written == (0 if last == 3 else 3)


@pytest.mark.parametrize("static", [True, False])
def test_recomputed_blocks_change_nothing(world_folder: Path, tmp_path: Path, static: bool) -> None:
    options = ["train.evaluate_every=0", "train.steps=2"]
    options += ["dynamic=null", "cost.target=1", "supervision.kind=none"] if static else []
    losses: dict[str, list[float]] = {}
    for kind in ("off", "on", "selective", "full train.checkpointed_blocks=2"):
        recipe = recipe_of(
            world_folder, *options, *f"train.gradient_checkpointing={kind} run={tmp_path / kind}".split()
        )
        losses[kind] = [r["loss"] for r in curve(train(recipe, World())) if "loss" in r]
    assert len(losses["off"]) == 2
    for kind, found in losses.items():
        assert found == pytest.approx(losses["off"], abs=1e-6), kind


def test_recipes_read_words_for_numbers_and_round_trip(world_folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((world_folder / "recipe.yaml").read_text())
    values["train"]["lr"] = "1e-4"  # what YAML 1.1 makes of 1e-4
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_recipe(path).train.lr == 1e-4
    assert load_recipe(path, ["train.betas=[0.8,0.99]"]).train.betas == (0.8, 0.99)
