"""Proof that an exported file does what it should: it is loaded back by its own loader and its outputs compared."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dydit_scale.adapters.export import PREFIX
from dydit_scale.adapters.schedule import load_lora_schedule
from dydit_scale.adapters.state import load_td_lora

Inputs = Sequence[Mapping[str, Any]]
Loader = Callable[[nn.Module], int]


@dataclass(frozen=True, kw_only=True)
class LoraCheck:
    """One plain LoRA or several, loaded by those who will use them and compared on several inputs."""

    loader_error: float
    """Largest ||v_loaded - v_expected|| / ||v_expected||, against the same update merged by hand."""
    approximation: tuple[float, ...]
    """||v_adapter - v_loaded|| / ||v_adapter - v_base|| for each input: 0 is exact, 1 as far off as no LoRA."""


@dataclass(frozen=True, kw_only=True)
class NativeCheck:
    """A TD-LoRA folder loaded into a fresh model and compared."""

    inputs: int
    """Number of inputs whose outputs were equal."""


@torch.no_grad()
def transformer_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Of a transformer in evaluation mode, for each set of keyword arguments."""
    was_training = model.training
    model.eval()
    results = [_tensor(model(**kwargs)).detach().clone() for kwargs in inputs]
    model.train(was_training)
    return results


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else (0.0 if top == 0 else math.inf)


def _pipeline_around(transformer: nn.Module, pipeline_class: Any) -> Any:
    required = [p for p in inspect.signature(pipeline_class).parameters.values() if p.default is p.empty]
    return pipeline_class(**{**{p.name: None for p in required}, "transformer": transformer})


@torch.no_grad()
def merge_lora(base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Add a plain LoRA in diffusers' names to the weights of a transformer."""
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            weight = base.get_parameter(f"{stem.removeprefix(PREFIX)}.weight")
            weight.add_((tensors[f"{stem}.lora_B.weight"] @ tensors[name]).to(weight))


def verify_plain_lora(
    path: str | Path,
    load: Loader,
    make_base: Callable[[], nn.Module],
    inputs: Inputs,
    *,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    tolerance: float = 1e-5,
) -> LoraCheck:
    """Load a file or folder into a fresh transformer and compare outputs.

    Args:
        path: What is verified, for errors.
        load: Loads it into the transformer in place, as its users do (``diffusers_loader``, ``peft_loader``), and
            returns how many layers have the LoRA then.
        make_base: Makes a fresh base transformer (without adapters, the static class) at each call; called twice.
        inputs: Keyword arguments of the transformer's forward, best at several timesteps.
        model: The adapted model in memory. Its routers, if any, should be open, or their effect counts as error.
        tensors: What the file should hold (``mean_lora`` or ``plain_lora`` of ``model``), merged by hand to compare.
        tolerance: Largest relative difference between loading and merging by hand; 1e-5 suits fp32.

    Raises ValueError if layers are missing after loading or the outputs differ by more than ``tolerance``.
    """
    if not inputs:
        raise ValueError(f"{path}: expected inputs to compare outputs on, got none")
    loaded_model = make_base()
    base = transformer_outputs(loaded_model, inputs)
    layers, expected_layers = load(loaded_model), len(tensors) // 2
    if layers != expected_layers:
        raise ValueError(f"{path}: {layers} layers have a LoRA after loading it, expected {expected_layers}")
    loaded = transformer_outputs(loaded_model, inputs)
    del loaded_model
    merged_model = make_base()
    merge_lora(merged_model, tensors)
    expected = transformer_outputs(merged_model, inputs)
    error = relative_error(loaded, expected)
    if not error <= tolerance:
        raise ValueError(f"{path}: after loading it is {error:.2e} off the model in memory, above {tolerance}")
    return LoraCheck(loader_error=error, approximation=effect_missed(transformer_outputs(model, inputs), loaded, base))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||found - expected|| / ||expected||; NaN if any output is not a number."""
    errors = [_ratio(_distance(a, b), float(b.double().norm())) for a, b in zip(found, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def effect_missed(true: Sequence[Tensor], found: Sequence[Tensor], base: Sequence[Tensor]) -> tuple[float, ...]:
    """||true - found|| / ||true - base|| for each output: 0 is exact, 1 as far off as the base."""
    return tuple(_ratio(_distance(v, a), _distance(v, b)) for v, a, b in zip(true, found, base, strict=True))


def diffusers_loader(path: Path, pipeline_class: Any) -> Loader:
    """Loads a file through ``load_lora_weights`` of its pipeline (such as FluxPipeline): it is what users call, and it
    decides what kind of file it is."""

    def load(base: nn.Module) -> int:
        pipeline = _pipeline_around(base, pipeline_class)
        pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
        return _lora_layers(base)

    return load


def peft_loader(folder: Path) -> Loader:
    """Loads a folder through PeftModel.from_pretrained, which adapts the transformer in place."""

    def load(base: nn.Module) -> int:
        PeftModel.from_pretrained(base, str(folder))
        return _lora_layers(base)

    return load


def _lora_layers(model: nn.Module) -> int:
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def verify_lora_schedule(
    folder: str | Path,
    make_base: Callable[[], nn.Module],
    pipeline_class: Any,
    inputs: Inputs,
    *,
    model: nn.Module,
    tensors: Sequence[Mapping[str, Tensor]] | None = None,
    tolerance: float = 1e-5,
) -> LoraCheck:
    """Load LoRAs that follow the timestep into a fresh pipeline and compare its transformer's outputs.

    Args:
        folder: Written by ``export_range_loras`` or ``export_expert_loras``.
        make_base, pipeline_class, inputs, model: as in ``verify_plain_lora``; ``make_base`` is called twice.
        tensors: The plain LoRA that should act at each input, merged by hand to compare; by default ``model`` itself
            is what the files should equal.
        tolerance: Largest relative difference to either.

    Raises ValueError if layers are missing after loading or the outputs differ by more than ``tolerance``.
    """
    if not inputs or (tensors is not None and len(tensors) != len(inputs)):
        raise ValueError("verify_lora_schedule: expected inputs, and tensors for each of them")
    fresh = make_base()
    base = transformer_outputs(fresh, inputs)
    load_lora_schedule(_pipeline_around(fresh, pipeline_class), folder)
    loaded, true = transformer_outputs(fresh, inputs), transformer_outputs(model, inputs)
    del fresh
    expected = true if tensors is None else _merged_outputs(make_base(), inputs, tensors)
    error = relative_error(loaded, expected)
    if not error <= tolerance:
        raise ValueError(f"{folder}: loaded by diffusers it is {error:.2e} off the model in memory, above {tolerance}")
    return LoraCheck(loader_error=error, approximation=effect_missed(true, loaded, base))


def _merged_outputs(base: nn.Module, inputs: Inputs, tensors: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The output for each input with its own LoRA merged into ``base``."""
    outputs = []
    for kwargs, lora in zip(inputs, tensors, strict=True):
        names = {f"{n.removeprefix(PREFIX).rpartition('.lora_')[0]}.weight" for n in lora}
        before = {name: base.get_parameter(name).detach().clone() for name in names}
        merge_lora(base, lora)
        outputs += transformer_outputs(base, [kwargs])
        base.load_state_dict(before, strict=False)
    return outputs


def verify_td_lora(
    folder: str | Path,
    fresh_model: nn.Module,
    inputs: Inputs,
    reference_outputs: Sequence[Tensor],
    *,
    tolerance: float = 1e-6,
) -> NativeCheck:
    """Load a TD-LoRA folder into ``fresh_model`` (which keeps it) and demand the reference outputs.

    Args:
        tolerance: Largest relative difference; equal weights at other addresses may be summed in another order.

    Raises ValueError naming the first input whose output differs, or if the numbers of inputs and outputs do.
    """
    if not inputs or len(inputs) != len(reference_outputs):
        raise ValueError(
            f"verify_td_lora: expected one output for each input, got {len(reference_outputs)}/{len(inputs)}"
        )
    load_td_lora(fresh_model, folder)
    for index, (found, expected) in enumerate(
        zip(transformer_outputs(fresh_model, inputs), reference_outputs, strict=True)
    ):
        off = _ratio(_distance(found, expected), float(expected.double().norm()))
        if not off <= tolerance:
            raise ValueError(f"{folder}: after loading, the output for input {index} is {off:.2e} off the reference")
    return NativeCheck(inputs=len(inputs))
