"""Exports of a run's model as a whole pipeline, dynamic or static."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from dydit_scale.adapters.state import router_state
from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.adapters.verify import effect_missed, merge_lora
from dydit_scale.models.family import with_parts
from dydit_scale.models.registry import family_of
from dydit_scale.workflows.exports.common import (
    ExportOptions,
    PlainLora,
    complete,
    fresh_base,
    plain_lora_of,
    probe_inputs,
    row,
)
from dydit_scale.workflows.runs import LoadedRun


def write_pipeline(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    """The whole pipeline with the trained transformer, its adapter merged in and its routers at work."""
    if run.recipe.adapter.kind == "none":
        return _write_whole(run, out / "pipeline", run.network, None)
    lora = plain_lora_of(run, options)
    merged = _merged(run, lora)
    if run.recipe.dynamic is not None:
        dynamic_class: Any = family_of(run.pipeline).dynamic_class
        merged = dynamic_class.from_static(merged, run.recipe.dynamic, rank=False)
        merged.load_state_dict(router_state(run.network), strict=False)
    return _write_whole(run, out / "pipeline", merged, lora)


def write_static(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    """The whole pipeline with an ordinary transformer: the adapter is merged in, the routers are dropped."""
    if run.recipe.adapter.kind == "none":
        static = run.network.to_static() if run.recipe.dynamic is not None else run.network
        return _write_whole(run, out / "static", static, None)
    lora = plain_lora_of(run, options)
    return _write_whole(run, out / "static", _merged(run, lora), lora)


def _merged(run: LoadedRun, lora: PlainLora) -> Any:
    base = fresh_base(run)
    merge_lora(base, lora.tensors)
    return base


def _write_whole(run: LoadedRun, folder: Path, transformer: Any, lora: PlainLora | None) -> dict[str, Any]:
    """Save a pipeline in fp16, its routers in fp32; read the transformer back and compare it with the run's."""
    inputs, dynamic = probe_inputs(run), hasattr(transformer, "dynamic_blocks") and transformer.is_dynamic
    with torch.no_grad():
        exact = [transformer.eval()(**x, return_dict=False)[0] for x in inputs]
        model = run.network if dynamic else complete(run)
        true = [model(**x, return_dict=False)[0] for x in inputs]
    half = copy.deepcopy(transformer)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data if is_dynamic_name(name) else parameter.data.half()
    with_parts(run.pipeline, transformer=half).save_pretrained(folder)
    back = type(half).from_pretrained(folder, subfolder="transformer", dtype=torch.float32).eval()
    with torch.no_grad():
        found = [back(**x, return_dict=False)[0] for x in inputs]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    if error > 0.02:
        raise ValueError(f"{folder}: read back from fp16, the transformer's output is {error:.3f} off; it needs fp32")
    if lora is None:
        return row(folder, error_mean=0.0, error_max=0.0, output_error=error)
    base = fresh_base(run)
    with torch.no_grad():
        untouched = [base(**x, return_dict=False)[0] for x in inputs]
    missed = effect_missed(true, found, untouched)
    return row(folder, **lora.errors(), output_error=sum(missed) / len(missed))
