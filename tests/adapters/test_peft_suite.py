"""What peft's own suite asks of a tuner, asked of TD-LoRA in a PeftModel: on an MLP and all classes of models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dydit_scale.adapters.export import timestep_embeddings
from dydit_scale.adapters.td_lora import TDLoraConfig, merge_at, td_layers
from tests.adapters import tiny
from tests.models import test_class_latte as class_latte
from tests.models import test_latte as latte
from tests.models import test_pixart as pixart
from tests.models import tiny as tiny_models
from tests.models import tiny_dit
from tests.models.tiny_families import FAMILIES


@dataclass(frozen=True)
class Case:
    """A class of models at toy size; ``make`` gives the same weights at every call."""

    name: str
    make: Callable[[], nn.Module]
    targets: str
    run: Callable[[nn.Module, Tensor], Tensor]
    """Its output at timesteps in 0..1, one sample each."""
    unit: int = 1
    """The forward's timesteps go from 0 to this."""
    gate_scope: str = "layer"

    def config(self, **changes: Any) -> TDLoraConfig:
        time_dim = tiny.TIME_DIM if self.make is tiny.tiny_mlp else None
        settings = {"target_modules": self.targets, "rank": 2, "experts": 3, "time_dim": time_dim}
        settings["gate_scope"] = self.gate_scope
        return TDLoraConfig(**{**settings, **changes})

    def adapted(self, shaken: int = 7, **changes: Any) -> PeftModel:
        return tiny.shake(get_peft_model(self.make(), self.config(**changes)), shaken)  # type: ignore[return-value]

    def tensors(self, model: nn.Module) -> int:
        """How many the adapter has."""
        layers = len(td_layers(model))
        return 4 * layers if self.gate_scope == "layer" else 2 * layers + 2

    def schedule(self) -> Tensor:
        """All timesteps, as the forward takes them."""
        return TIMES if self.unit == 1 else (TIMES * self.unit).round()

    def __call__(self, model: nn.Module, timesteps: Tensor | None = None) -> Tensor:
        model.eval()
        with torch.no_grad():
            return self.run(model, TIMES if timesteps is None else timesteps)


TIMES = torch.tensor([0.9, 0.5, 0.2])
WAVES = 3 * torch.randn(1, tiny.TIME_DIM, generator=torch.Generator().manual_seed(0))


def _mlp(model: nn.Module, timesteps: Tensor) -> Tensor:
    return model(tiny.tokens(len(timesteps)), torch.sin(timesteps[:, None] * WAVES))


def _transformer(inputs: Callable[[list[Any]], dict[str, Any]], unit: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, timesteps: Tensor) -> Tensor:
        levels = [t if unit == 1 else round(t * unit) for t in timesteps.tolist()]
        dtype = next(model.parameters()).dtype
        x = {k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v for k, v in inputs(levels).items()}
        return model(**x, return_dict=False)[0]

    return run


def _classes() -> list[Case]:
    found = [Case("mlp", tiny.tiny_mlp, r".*\.(fc1|fc2)", _mlp)]
    # diffusers' own DiT embeds the timestep in each block; ours with nothing dynamic takes its place.
    dit = functools.partial(tiny_dit.tiny_dynamic, heads=False, mlp=False, tokens=False)
    static = {
        "flux": tiny_models.tiny_flux, "dit": dit, "latte": latte.tiny_latte, "latte-classes": class_latte.tiny_static,
        "pixart": pixart.tiny_pixart,
    }  # fmt: skip
    for family in FAMILIES:
        targets = rf".*transformer_blocks\.\d+\.({family.attention}\.(to_q|to_v|to_out\.0)|ff\.net\.0\.proj)"
        run = _transformer(family.inputs, family.unit)
        found.append(Case(f"dy-{family.name}", family.make, targets, run, family.unit))
        if family.name in static:
            found.append(Case(family.name, static.pop(family.name), targets, run, family.unit))
    assert not static, f"no family is called {' or '.join(static)}"
    shared = [case for case in found if case.name in ("mlp", "flux", "dy-flux")]
    assert len(shared) == 3
    return found + [replace(case, name=f"{case.name}-network-gate", gate_scope="network") for case in shared]


CASES = _classes()
DYNAMIC = [case for case in CASES if case.name.startswith("dy-")]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dynamic = pytest.mark.parametrize("case", DYNAMIC, ids=lambda case: case.name)


def effect(case: Case, model: nn.Module) -> float:
    """How far the model is from its base."""
    return float((case(model) - case(case.make())).abs().max())


@each
def test_the_adapter_acts_learns_and_starts_as_nothing(case: Case) -> None:
    model = get_peft_model(case.make(), case.config())
    assert torch.equal(case(model), case(case.make()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name for name, _ in model.named_parameters() if ".td_" in name}
    assert trained == adapter != set()
    tiny.shake(model).train()
    case.run(model, TIMES).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    assert effect(case, model) > 1e-4


@each
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_by_peft(case: Case, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = case.adapted()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(case.make(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(case(loaded), case(model))


@each
def test_the_state_goes_through_a_file_and_back(case: Case) -> None:
    model, fresh = case.adapted(), get_peft_model(case.make(), case.config())
    state = get_peft_model_state_dict(model)
    assert len(state) == case.tensors(model) and not any("default" in name for name in state)
    left = set_peft_model_state_dict(fresh, state)
    assert not left.unexpected_keys and not [name for name in left.missing_keys if "td_" in name]
    assert torch.equal(case(fresh), case(model))


@each
def test_several_adapters_are_switched_added_and_deleted(case: Case, tmp_path: Path) -> None:
    alone, model = case.adapted(8, seed=1), case.adapted()
    first = case(model)
    model.add_adapter("second", case.config(seed=1))
    assert torch.equal(case(model), first), "an adapter that was added is not active"
    model.set_adapter("second")
    with torch.no_grad():
        for name, value in get_peft_model_state_dict(alone).items():
            part, _, leaf = name.rpartition(".")
            model.get_parameter(f"{part}.second.{leaf}").copy_(value)
    assert torch.equal(case(model), case(alone))
    model.base_model.set_adapter(["default", "second"])
    both = case(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert len(load_file(tmp_path / "second" / "adapter_model.safetensors")) == case.tensors(alone)
    for one in ("default", "second"):
        model.set_adapter(one)
        assert not torch.allclose(case(model), both, atol=1e-5)
    model.delete_adapter("second")
    assert not [name for name, p in model.named_parameters() if ".second." in name]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".td_" in name
    }
    model.set_adapter("default")
    assert torch.equal(case(model), first) and list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="absent"):
        model.delete_adapter("absent")


@each
def test_disabled_is_the_base_and_enabled_what_it_was(case: Case) -> None:
    model = case.adapted()
    before = case(model)
    with model.disable_adapter():
        assert torch.equal(case(model), case(case.make()))
    assert torch.equal(case(model), before) and effect(case, model) > 1e-4


@each
def test_unloading_gives_the_base_back(case: Case) -> None:
    base = case.adapted().unload()
    assert [name for name, _ in base.named_modules()] == [name for name, _ in case.make().named_modules()]
    assert torch.equal(case(base), case(case.make()))


@each
def test_merged_at_a_timestep_it_is_a_plain_model_there_and_back(case: Case) -> None:
    model, time = case.adapted(), TIMES[1:2]
    before, there = case(model), case(model, time)
    network = model.get_base_model()
    emb = (
        torch.sin(time[:, None] * WAVES)
        if case.make is tiny.tiny_mlp
        else timestep_embeddings(network, time * case.unit)
    )
    merge_at(network, emb)
    torch.testing.assert_close(case(model, time), there, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(case(model), case(case.make())), "peft takes merged adapters out to disable them"
    assert torch.equal(case(model), before)
    merge_at(network, emb)
    model.unmerge_adapter()
    assert torch.equal(case(model), before)
    with pytest.raises(ValueError, match="depends on the timestep"):
        model.merge_and_unload()
    merge_at(network, emb)
    plain = model.unload()
    assert not any(".td_" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(case(plain, time), there, rtol=1e-4, atol=1e-5)


@each
def test_a_copy_is_whole_and_independent(case: Case) -> None:
    model = case.adapted()
    before, copied = case(model), copy.deepcopy(model)
    assert torch.equal(case(copied), before)
    tiny.shake(model, seed=9)
    assert torch.equal(case(copied), before) and not torch.allclose(case(model), before, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_keeps_its_adapter_in_fp32(case: Case, dtype: torch.dtype) -> None:
    if case.make is tiny.tiny_mlp:
        pytest.skip("its inputs are not cast")
    model = tiny.shake(get_peft_model(case.make().to(dtype), case.config()))
    kinds = {p.dtype for name, p in model.named_parameters() if ".td_" in name}
    assert kinds == {torch.float32}
    out, exact = case(model), case(case.adapted())
    assert out.dtype == dtype
    assert float((out.float() - exact).norm() / exact.norm()) < 0.1


@each_dynamic
def test_packed_is_the_masked_model_with_the_adapter_in_its_slices(case: Case) -> None:
    model = case.adapted()
    network: Any = tiny_models.scramble(model.get_base_model())
    before = case(model, TIMES[:1])
    network.pack(case.schedule())
    torch.testing.assert_close(case(model, TIMES[:1]), before, rtol=1e-4, atol=2e-5)
    packed = network._plan
    assert packed is not None and packed.run.fallback is None
    without = case(tiny_models.scramble(case.make()), TIMES[:1])
    with model.disable_adapter():
        torch.testing.assert_close(case(model, TIMES[:1]), without, rtol=1e-4, atol=2e-5)
    assert network._plan is None, "its slices held the adapter"


@each_dynamic
@pytest.mark.parametrize("change", ["scaled", "switched", "deleted", "unloaded", "added", "merged"])
def test_slices_are_dropped_when_an_adapter_changes_under_them(
    case: Case, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = case.adapted()
    model.add_adapter("second", case.config(seed=1))
    network: Any = model.get_base_model()
    network.pack(case.schedule())
    case(model, TIMES[:1])
    assert network._plan is not None and not caplog.records
    if change == "scaled":
        next(iter(td_layers(network).values())).set_scale("default", 0.5)
    elif change == "switched":
        model.set_adapter("second")
    elif change == "deleted":
        model.delete_adapter("second")
    elif change == "unloaded":
        model = model.unload()
    elif change == "merged":
        merge_at(network, timestep_embeddings(network, case.schedule()[1:2]))
    else:
        model.add_adapter("third", case.config(seed=2))
    found = case(model, TIMES[:1])
    network.unpack()
    assert torch.equal(found, case(model, TIMES[:1]))
    assert "adapters have changed since pack" in caplog.text
