"""TD-LoRA as several plain LoRAs: what diffusers draws with them, beside the adapter itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors import safe_open
from torch import Tensor

from dydit_scale.adapters.export import ModelSpec
from dydit_scale.adapters.schedule import export_expert_loras, export_range_loras, load_lora_schedule
from dydit_scale.adapters.tensor_file import read_tensors
from tests.adapters.tiny import adapted_flux, flux_inputs, tiny_flux

SPEC = ModelSpec(title="tiny")
STEPS = 5


def pipeline(transformer: Any) -> FluxPipeline:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: FluxPipeline) -> Tensor:
    inputs = flux_inputs(torch.tensor([0.5, 0.5]))
    return pipe(
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        height=32,
        width=48,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Tensor, Tensor]:
    """The adapted transformer, its sampler's timesteps (falling), and what it draws."""
    model = adapted_flux().eval()
    seen: list[float] = []
    pipe = pipeline(model)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    images = drawn(pipe)
    handle.remove()
    assert len(seen) == STEPS
    return model, torch.tensor(seen), images


def loaded(folder: Path) -> FluxPipeline:
    pipe = pipeline(tiny_flux().eval())
    load_lora_schedule(pipe, folder)
    return pipe


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_experts_with_their_gates_draw_the_same(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, images = adapted
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    assert len(list(tmp_path.glob("lora_*"))) == 3
    pipe = loaded(tmp_path)
    assert far(drawn(pipe), images) < 1e-5
    assert far(drawn(pipe), images) < 1e-5  # and again: nothing is left over from the last step
    pipe.unload_lora_weights()
    assert far(drawn(pipeline(tiny_flux().eval())), images) > 1e-3


def test_more_ranges_come_closer_and_one_for_each_step_is_exact(
    adapted: tuple[Any, Tensor, Tensor], tmp_path: Path
) -> None:
    model, timesteps, images = adapted
    errors, weights = [], []
    for ranges in (1, 3, STEPS):
        files = export_range_loras(model, timesteps, tmp_path, SPEC, ranges=ranges, max_error=1.0)
        assert len(list(tmp_path.glob("lora_*"))) == ranges == len(files)
        weights.append(max(file.error.total for file in files))
        errors.append(far(drawn(loaded(tmp_path)), images))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert min(weights[:2]) > weights[2] == 0


def test_ranges_cover_all_timesteps_once_and_stand_in_the_header(
    adapted: tuple[Any, Tensor, Tensor], tmp_path: Path
) -> None:
    model, timesteps, _ = adapted
    files = export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=1.0)
    (low, middle), (also_middle, high) = (file.timestep_range for file in files)
    assert (low, high) == (0, 1000) and middle == also_middle
    inside = [
        sum(low < 1000 * t <= high for t in timesteps.tolist()) for low, high in (f.timestep_range for f in files)
    ]
    assert inside == [3, 2]
    with safe_open(files[1].path, "pt") as file:
        assert file.metadata()["modelspec.timestep_range"] == f"{middle},1000"


def test_gates_between_timesteps_are_interpolated(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, _ = adapted
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    gates = read_tensors(tmp_path / "gates.safetensors").tensors
    rows = gates.pop("timesteps")
    assert rows.tolist() == sorted(rows.tolist())
    pipe = loaded(tmp_path)
    between = (rows[1] + rows[2]) / 2
    pipe.transformer(**flux_inputs(between[None].expand(2) / 1000))
    for name, table in gates.items():
        layer = pipe.transformer.get_submodule(name)
        found = [layer.scaling[f"td_{number:03}"] for number in range(3)]
        assert found == pytest.approx(((table[1] + table[2]) / 2).tolist(), rel=1e-4)


def test_a_batch_of_mixed_timesteps_is_refused(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, _ = adapted
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    pipe = loaded(tmp_path)
    with pytest.raises(ValueError, match="one timestep for a whole batch"):
        pipe.transformer(**flux_inputs(torch.tensor([0.25, 0.5])))


def test_an_export_that_cannot_be_right_is_refused(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, _ = adapted
    with pytest.raises(ValueError, match=f"expected 1 to {STEPS}"):
        export_range_loras(model, timesteps, tmp_path, SPEC, ranges=STEPS + 1)
    with pytest.raises(ValueError, match=r"more than max_error 0\.001"):
        export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=0.001)
    with pytest.raises(ValueError, match="found none"):
        load_lora_schedule(pipeline(tiny_flux()), tmp_path)
    export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=0.001, force=True)
    assert len(list(tmp_path.glob("lora_*"))) == 2


def test_an_earlier_export_leaves_nothing_behind(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, images = adapted
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    export_range_loras(model, timesteps, tmp_path, SPEC, ranges=STEPS)
    assert not (tmp_path / "gates.safetensors").exists()
    assert far(drawn(loaded(tmp_path)), images) < 1e-5
