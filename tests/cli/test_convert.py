from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dydit_scale.cli.main import main
from tests.models.originals import original_dit


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
