from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit_scale.cli.main import main
from dydit_scale.models.family import SampleConfig
from dydit_scale.models.loading import family_of_base, load_pipeline, load_transformer
from dydit_scale.models.registry import make_dynamic
from dydit_scale.sampling.generate import generate
from dydit_scale.workflows.base import write_base
from tests.models.originals import original_dit, original_dyflux, original_flux


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {"model": original_dit(1), "ema": original_dit(2)}
    torch.save(states, tmp_path / "train.pt")
    assert main(["convert", str(tmp_path / "train.pt"), str(tmp_path / "model"), "--weights", "model"]) == 0
    printed = capsys.readouterr().out
    assert "DiT or SiT (facebookresearch), its model weights" in printed
    assert "tensors for DiTTransformer2DModel" in printed and "frequency shift" in printed
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "back.safetensors"), "--to", "original"]) == 0
    assert "note" not in capsys.readouterr().out
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == states["model"].keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in states["model"].items())
    assert main(["convert", str(tmp_path / "train.pt"), str(tmp_path / "model")]) == 64
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("pipeline", ["DyDiTPipeline", "SiTPipeline"])
def test_a_converted_file_becomes_a_base_that_draws(tmp_path: Path, pipeline: str) -> None:
    torch.save(original_dit(), tmp_path / "dit.pt")
    AutoencoderKL(block_out_channels=(32,), latent_channels=4).save_pretrained(tmp_path / "vae")
    out = tmp_path / "base"
    command = ["convert", str(tmp_path / "dit.pt"), str(out), "--parts", str(tmp_path / "vae")]
    assert main([*command, "--pipeline", pipeline]) == 0
    family = family_of_base(str(out))
    assert family.pipeline_class.__name__ == pipeline and not (out / "config.json").exists()
    pipe = load_pipeline(str(out), family)
    transformer = load_transformer(str(out), family)
    pipe.register_modules(transformer=transformer)
    assert transformer.config["time_freq_shift"] == 0.0  # the original's
    side = transformer.config["sample_size"]
    pictures = generate(pipe, ["1", "0"], SampleConfig(steps=2, height=side, width=side))
    assert pictures.shape == (2, side, side, 3) and pictures.std() > 0
    assert main(["convert", str(out), str(tmp_path / "back.safetensors"), "--to", "original"]) == 0
    back, original = load_file(tmp_path / "back.safetensors"), original_dit()
    assert back.keys() == original.keys() and all(torch.equal(back[n], original[n]) for n in original)
    dynamic = make_dynamic(transformer)
    assert type(dynamic) is type(transformer) and dynamic.is_dynamic


@pytest.mark.parametrize("original", [original_flux, original_dyflux])
def test_a_flux_file_gets_its_parts_too(tmp_path: Path, original: Callable[[], dict[str, Tensor]]) -> None:
    base, file, model, out = (str(tmp_path / name) for name in ("base", "flux.safetensors", "model", "out"))
    write_base(Path(base), "flux")
    save_file(original(), file)
    assert main(["convert", file, model]) == 0
    assert main(["convert", file, out, "--parts", base]) == 0
    assert same_weights(Path(model), Path(out, "transformer"))
    config = Path(out, "transformer/config.json").read_text()
    assert json.loads(config).keys() >= json.loads(Path(model, "config.json").read_text()).keys()
    assert str(tmp_path) not in config


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "{}/nothing"], "not what DyDiTPipeline needs around its transformer"),
        (["--parts", "{}/vae", "--pipeline", "FluxPipeline"], "belongs into DyDiTPipeline or SiTPipeline"),
        (["--pipeline", "SiTPipeline"], "say with --parts what to put around the transformer"),
    ],
)
def test_parts_that_do_not_fit_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    torch.save(original_dit(), tmp_path / "dit.pt")
    command = ["convert", str(tmp_path / "dit.pt"), str(tmp_path / "base")]
    assert main([*command, *(o.format(tmp_path) for o in options)]) == 64
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["dit.pt"]
