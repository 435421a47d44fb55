"""The log of a TD-LoRA's gates: what it writes, and the two figures that sum it up."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_scale.adapters.export import timestep_embeddings
from dydit_scale.adapters.td_lora import add_td_lora, td_layers
from dydit_scale.diffusion.process import DDPMProcess, FlowProcess
from dydit_scale.train.gates import dead_share, entropy, make_gate_log
from tests.adapters.tiny import flux_config as config
from tests.adapters.tiny import shake
from tests.adapters.tiny import tiny_flux as static_flux
from tests.models import tiny, tiny_dit
from tests.models.test_pixart import tiny_pixart


def test_entropy_and_dead_experts() -> None:
    equal = torch.full((3, 5, 4), 0.25)
    assert entropy(equal) == pytest.approx(1.0) and dead_share(equal) == 0
    one = torch.zeros(3, 5, 4)
    one[..., 2] = 1
    assert entropy(one) == 0 and dead_share(one) == 0.75
    in_turn = torch.eye(4)[None]  # each expert at its own timestep
    assert entropy(in_turn) == 0 and dead_share(in_turn) == 0
    assert entropy(torch.ones(2, 5, 1)) == 0 and dead_share(torch.ones(2, 5, 1)) == 0
    two = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 3, 4)
    assert entropy(two) == pytest.approx(math.log(2) / math.log(4)) and dead_share(two) == 0.5


@pytest.mark.parametrize("family", ["flux", "sit", "dit"])
def test_the_file_holds_the_gates_of_every_layer_over_the_noise_levels(family: str, tmp_path: Path) -> None:
    flux = family == "flux"
    model = tiny.tiny_dynamic() if flux else tiny_dit.tiny_dynamic()
    add_td_lora(model, config(target_modules=["to_q", "to_v"]))
    shake(model)
    process = DDPMProcess() if family == "dit" else FlowProcess(data_last=family == "sit")
    log = make_gate_log(model, process, tmp_path)
    assert log is not None
    parameters = {n: p.detach() for n, p in model.named_parameters() if n in log.parameters}
    assert len(parameters) == 2 * len(td_layers(model))
    summary = log.evaluate(parameters, 40)
    with np.load(tmp_path / "gates" / "step-0000040.npz") as file:
        noise, gates, names = file["timesteps"], file["gates"].astype(np.float32), file["names"].tolist()
    assert names == list(td_layers(model)) and gates.shape == (len(names), len(noise), 3)
    assert 0 <= noise.min() < 100 and 900 < noise.max() <= 1000
    at = {"flux": noise / 1000, "sit": 1 - noise / 1000, "dit": noise}[family]  # as the forward takes it
    embeddings = timestep_embeddings(model, torch.tensor(at))
    for name, found in zip(names, gates, strict=True):
        expected = td_layers(model)[name].gate("default")(embeddings)
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-3)
    assert 0 < summary["gate_entropy"] < 1 and 0 <= summary["dead_experts"] < 1


def test_static_models_have_one_too_and_others_none(tmp_path: Path) -> None:
    assert make_gate_log(tiny.tiny_dynamic(), FlowProcess(), tmp_path) is None
    for model, process in ((static_flux(), FlowProcess()), (tiny_pixart(), DDPMProcess())):
        add_td_lora(model, config(target_modules=["to_q"]))
        log = make_gate_log(model, process, tmp_path)
        assert log is not None and len(log.embeddings) == len(log.noise)
