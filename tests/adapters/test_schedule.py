"""TD-LoRA as several plain LoRAs: what diffusers draws with them, beside the adapter itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dydit_scale.adapters.export import ModelSpec
from dydit_scale.adapters.schedule import export_expert_loras, export_range_loras, load_lora_schedule, remove_schedule
from dydit_scale.adapters.tensor_file import read_tensors, write_tensors
from dydit_scale.adapters.verify import verify_lora_schedule
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
    pipe = pipeline(tiny_flux().eval())
    untouched = drawn(pipe)
    assert far(untouched, images) > 1e-3
    handle = load_lora_schedule(pipe, tmp_path)
    assert far(drawn(pipe), images) < 1e-5
    assert far(drawn(pipe), images) < 1e-5  # and again: nothing is left over from the last step
    handle.remove()
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), untouched)


def test_more_ranges_come_closer_and_one_for_each_step_is_exact(
    adapted: tuple[Any, Tensor, Tensor], tmp_path: Path
) -> None:
    model, timesteps, images = adapted
    errors, weights = [], []
    for ranges in (1, 3, STEPS):
        files = export_range_loras(model, timesteps, tmp_path, SPEC, ranges=ranges, max_error=1.0)
        assert len(list(tmp_path.glob("lora_*.safetensors"))) == ranges == len(files)
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
    assert set((1000 * timesteps).tolist()) <= set(rows.tolist())
    pipe = loaded(tmp_path)
    between = (rows[1] + rows[2]) / 2
    pipe.transformer(**flux_inputs(between[None].expand(2) / 1000))
    for name, table in gates.items():
        layer = pipe.transformer.get_submodule(name)
        found = [layer.scaling[f"td_{number:03}"] for number in range(3)]
        assert found == pytest.approx(((table[1] + table[2]) / 2).tolist(), rel=1e-4)


def test_another_sampler_loses_little(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, _ = adapted
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    pipe, inputs = loaded(tmp_path), flux_inputs(torch.tensor([0.1234, 0.1234]))
    with torch.no_grad():
        assert far(pipe.transformer(**inputs).sample, model(**inputs).sample) < 1e-3


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
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"more than max_error 0\.001"):
        export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=0.001)
    assert sorted(tmp_path.iterdir()) == before
    export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=0.001, force=True)
    assert len(list(tmp_path.glob("lora_*.safetensors"))) == 2


def test_an_earlier_export_goes_and_other_files_stay(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, images = adapted
    for other in ("lora_style.safetensors", "lora_007.safetensors"):
        save_file({"x": torch.ones(1).to(torch.float8_e4m3fn)}, tmp_path / other)
    export_expert_loras(model, timesteps, tmp_path, SPEC)
    export_range_loras(model, timesteps, tmp_path, SPEC, ranges=STEPS)
    assert far(drawn(loaded(tmp_path)), images) < 1e-5
    remove_schedule(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lora_style.safetensors", "lora_007.safetensors"}


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("ranges", "lora_001.safetensors", "do not cover 0-1000 once"),
        ("experts", "lora_001.safetensors", "is a file missing"),
        ("experts", "gates.safetensors", "found none"),
        ("ranges", "all", "found none"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_before_they_are_loaded(
    adapted: tuple[Any, Tensor, Tensor], tmp_path: Path, kind: str, damage: str, message: str
) -> None:
    model, timesteps, _ = adapted
    if kind == "ranges":
        export_range_loras(model, timesteps, tmp_path, SPEC, ranges=3, max_error=1.0)
    else:
        export_expert_loras(model, timesteps, tmp_path, SPEC)
    if damage == "all":
        remove_schedule(tmp_path)
    else:
        (tmp_path / damage).unlink()
    pipe = pipeline(tiny_flux())
    with pytest.raises(ValueError, match=message):
        load_lora_schedule(pipe, tmp_path)
    assert not hasattr(pipe.transformer, "peft_config")


def test_another_adapter_stays_active_beside_them(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, _ = adapted
    export_range_loras(model, timesteps, tmp_path / "ranges", SPEC, ranges=2, max_error=1.0)
    export_range_loras(model, timesteps, tmp_path / "style", SPEC, ranges=1, max_error=1.0)
    pipe = pipeline(tiny_flux().eval())
    pipe.load_lora_weights(tmp_path / "style", weight_name="lora_000.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.5)
    load_lora_schedule(pipe, tmp_path / "ranges")
    layer = pipe.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    for timestep, ours in ((0.9, "td_001"), (0.1, "td_000")):
        pipe.transformer(**flux_inputs(torch.tensor([timestep, timestep])))
        assert layer.active_adapters == ["style", ours]
        assert (layer.scaling["style"], layer.scaling[ours]) == (0.5, 1.0)
    pipe.set_adapters("style", 0.5)  # the next forward adds ours again
    pipe.transformer(**flux_inputs(torch.tensor([0.1, 0.1])))
    assert layer.active_adapters == ["style", "td_000"]


def test_loras_that_were_dropped_or_fused_are_missed(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    model, timesteps, _ = adapted
    export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=1.0)
    pipe, inputs = loaded(tmp_path), flux_inputs(torch.tensor([0.1, 0.1]))
    with pytest.raises(ValueError, match="'td_000' exists already"):
        load_lora_schedule(pipe, tmp_path)
    pipe.transformer(**inputs)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="are fused"):
        pipe.transformer(**inputs)
    pipe.unfuse_lora()
    pipe.delete_adapters(["td_000", "td_001"])
    with pytest.raises(ValueError, match="are gone"):
        pipe.transformer(**inputs)


@pytest.mark.parametrize("damage", ["scaled", "swapped", "gates"])
def test_verification_fails_for_wrong_files(adapted: tuple[Any, Tensor, Tensor], tmp_path: Path, damage: str) -> None:
    model, timesteps, _ = adapted
    inputs = [flux_inputs(t.expand(2)) for t in timesteps[[-1, 0]]]
    tensors = None
    if damage == "gates":
        export_expert_loras(model, timesteps, tmp_path, SPEC)
        verify_lora_schedule(tmp_path, tiny_flux, FluxPipeline, inputs, model=model)
        rewrite(tmp_path / "gates.safetensors", lambda name, tensor: tensor if name == "timesteps" else tensor.flip(1))
    else:
        files = export_range_loras(model, timesteps, tmp_path, SPEC, ranges=2, max_error=1.0)
        tensors = [file.tensors for file in files]
        check = verify_lora_schedule(tmp_path, tiny_flux, FluxPipeline, inputs, model=model, tensors=tensors)
        assert 0 < max(check.approximation) < 1
        if damage == "scaled":
            rewrite(files[1].path, lambda name, tensor: tensor * 1.01)
        else:
            tensors = tensors[::-1]
    with pytest.raises(ValueError, match="off the model in memory"):
        verify_lora_schedule(tmp_path, tiny_flux, FluxPipeline, inputs, model=model, tensors=tensors)


def rewrite(path: Path, change: Any) -> None:
    file = read_tensors(path)
    write_tensors(path, {name: change(name, tensor) for name, tensor in file.tensors.items()}, file.metadata)
