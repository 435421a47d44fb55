"""Exports of a run's model as a whole pipeline, dynamic or static."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from dydit_scale.adapters.export import write_error
from dydit_scale.adapters.state import router_state
from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.adapters.tensor_file import check_tensors
from dydit_scale.adapters.verify import effect_missed, merge_lora, relative_error, transformer_outputs
from dydit_scale.dynamic.packing import effective_weight, is_adapted
from dydit_scale.models.family import with_parts
from dydit_scale.models.registry import family_of
from dydit_scale.workflows.exports.common import (
    EXACT,
    Errors,
    ExportOptions,
    PlainLora,
    complete,
    fresh_base,
    mean,
    plain_lora_of,
    probe_inputs,
)
from dydit_scale.workflows.runs import LoadedRun

LARGEST_ROUNDING = 0.02
"""Share of the output that fp16 may cost."""


def write_pipeline(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """The whole pipeline with the trained transformer, its adapter merged in and its routers at work."""
    if not run.recipe.adapter.is_lora:
        return Errors(*EXACT, _save(run, path, run.network))
    merged, lora = _merged(run, options)
    if run.recipe.dynamic is not None:
        dynamic_class: Any = family_of(run.pipeline).dynamic_class
        merged = dynamic_class.from_static(merged, run.recipe.dynamic, rank=False)
        missing, unexpected = merged.load_state_dict(router_state(run.network), strict=False)
        assert not unexpected and not any(map(is_dynamic_name, missing)), (missing, unexpected)
    return _with_adapter(run, path, merged, run.network, lora)


def write_static(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """The whole pipeline with the complete transformer: the adapter is merged in, the routers are dropped."""
    if run.recipe.adapter.is_lora:
        merged, lora = _merged(run, options)
        return _with_adapter(run, path, merged, complete(run), lora)
    static = fresh_base(run)  # of the class that the family trains and samples without routers
    weights = {name: tensor for name, tensor in run.network.state_dict().items() if not is_dynamic_name(name)}
    missing, unexpected = static.load_state_dict(weights, strict=False)
    assert not unexpected and all(map(is_dynamic_name, missing)), (missing, unexpected)
    return Errors(*EXACT, _save(run, path, static))


@torch.no_grad()
def _merged(run: LoadedRun, options: ExportOptions) -> tuple[Any, PlainLora | None]:
    """The base with the adapter in its weights; a TD-LoRA as its mean, which is given too."""
    base = fresh_base(run)
    if run.recipe.adapter.kind == "td_lora":
        lora = plain_lora_of(run, options)
        merge_lora(base, lora.tensors)
        return base, lora
    for name, layer in run.network.named_modules():
        if is_adapted(layer):
            base.get_parameter(f"{name}.weight").copy_(effective_weight(layer, None))
    return base, None


def _with_adapter(run: LoadedRun, path: Path, merged: Any, model: Any, lora: PlainLora | None) -> Errors:
    """Save ``merged``, made with ``lora``, and compare it with ``model``, whose adapter it should have."""
    _save(run, path, merged)
    if lora is not None and lora.error is not None:
        write_error(path / "mean_error.json", lora.error)
    lost = EXACT if lora is None else lora.lost
    true, found, base = (transformer_outputs(m, probe_inputs(run)) for m in (model, merged, fresh_base(run)))
    return Errors(*lost, mean(effect_missed(true, found, base)))


def _save(run: LoadedRun, path: Path, transformer: Any) -> float:
    """Save a pipeline around ``transformer`` in fp16, routers in fp32; returns what that costs, read back: the largest
    share of an output. Raises ValueError if it is too much, or a weight is not finite in fp16."""
    half = copy.deepcopy(transformer)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data if is_dynamic_name(name) else parameter.data.half()
    check_tensors(dict(half.named_parameters()), f"{path.name} in fp16")
    with_parts(run.pipeline, transformer=half).save_pretrained(path)
    back = type(half).from_pretrained(path, subfolder="transformer", dtype=torch.float32)
    inputs = probe_inputs(run)
    error = relative_error(transformer_outputs(back, inputs), transformer_outputs(transformer, inputs))
    if not error <= LARGEST_ROUNDING:
        raise ValueError(f"{path.name}: read back from fp16, the output is {error:.3f} off; the model needs fp32")
    return error
