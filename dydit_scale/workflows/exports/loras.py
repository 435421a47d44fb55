"""Exports of a run's adapter, natively and as plain LoRAs, each loaded back by those who will use it."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dydit_scale.adapters.export import (
    PREFIX,
    ModelSpec,
    fused_name,
    write_fused_lora,
    write_lora,
    write_mean,
    write_peft_lora,
)
from dydit_scale.adapters.schedule import export_expert_loras, export_range_loras, remove_schedule
from dydit_scale.adapters.state import save_td_lora
from dydit_scale.adapters.tensor_file import read_tensors
from dydit_scale.adapters.verify import (
    Loader,
    LoraCheck,
    diffusers_loader,
    peft_loader,
    verify_lora_schedule,
    verify_plain_lora,
    verify_td_lora,
)
from dydit_scale.models.convert import layout_of
from dydit_scale.models.keys.lora import LowRank, fused_loras, with_fused_loras
from dydit_scale.models.registry import family_of
from dydit_scale.workflows.exports.common import (
    LARGEST_ERROR,
    ExportOptions,
    PlainLora,
    complete,
    fresh_base,
    plain_lora_of,
    probe_inputs,
    row,
    timesteps_of,
)
from dydit_scale.workflows.runs import LoadedRun


def write_native(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    if run.recipe.adapter.kind != "td_lora":
        raise ValueError(f"run {run.folder} has adapter.kind {run.recipe.adapter.kind!r}; td-lora export needs td_lora")
    path = save_td_lora(
        run.network, out / "td_lora", metadata={"base": run.recipe.model.base, "recipe": run.recipe.name}
    )
    inputs = probe_inputs(run)
    with torch.no_grad():
        reference = [run.network(**x, return_dict=False)[0] for x in inputs]
    fresh = fresh_base(run)
    if run.recipe.dynamic is not None:
        fresh = family_of(run.pipeline).dynamic_class.from_static(fresh, run.recipe.dynamic)
    verify_td_lora(path, fresh.eval(), inputs, reference)
    return row(path, error_mean=0.0, error_max=0.0, output_error=0.0)


def _verified(run: LoadedRun, path: Path, load: Loader, lora: PlainLora) -> dict[str, Any]:
    check = verify_plain_lora(
        path, load, lambda: fresh_base(run), probe_inputs(run), model=complete(run), tensors=lora.tensors
    )
    return row(path, **lora.errors(), output_error=sum(check.approximation) / len(check.approximation))


def write_diffusers(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    spec, lora = lora_spec(run), plain_lora_of(run, options)
    path = out / "pytorch_lora_weights.safetensors"
    if lora.error is None:
        write_lora(path, lora.tensors, spec, {})
    else:
        write_mean(path, lora.tensors, spec, lora.error)
    return _verified(run, path, diffusers_loader(path, type(run.pipeline)), lora)


def write_peft(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    lora = plain_lora_of(run, options)
    folder = write_peft_lora(out / "peft", lora.tensors, run.recipe.model.base)
    return _verified(run, folder, peft_loader(folder), lora)


def write_fused(run: LoadedRun, out: Path, options: ExportOptions, *, style: str) -> dict[str, Any]:
    """A LoRA in the original FLUX layout, verified by merging it into the base in that layout."""
    base, spec = fresh_base(run), lora_spec(run)
    layout = layout_of({**base.config, "_class_name": type(base).__name__}, f"run {run.folder}")
    lora, rules, weights = plain_lora_of(run, options), layout.rules(base.config), base.state_dict()
    pairs = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): LowRank(
            down, lora.tensors[name.replace(".lora_A.", ".lora_B.")]
        )
        for name, down in lora.tensors.items()
        if name.endswith(".lora_A.weight")
    }
    fused = fused_loras(pairs, rules, {name: weight.shape for name, weight in weights.items()})
    path = write_fused_lora(out / f"{style}.safetensors", fused, style, spec)

    def load(model: nn.Module) -> int:
        file = read_tensors(path).tensors
        loras = {
            layer: LowRank(file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"])
            for layer, name in ((layer, fused_name(layer, style)) for layer in fused)
        }
        model.load_state_dict(with_fused_loras(model.state_dict(), loras, rules), strict=False)
        return len(pairs)

    return _verified(run, path, load, lora)


def write_ranges(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    _needs_experts(run, "lora-ranges")
    spec, folder = lora_spec(run), out / "lora_ranges"
    files = export_range_loras(
        run.network,
        timesteps_of(run, options),
        folder,
        spec,
        ranges=options.ranges,
        max_error=LARGEST_ERROR,
        force=options.force,
    )
    middles = torch.stack([file.timesteps[len(file.timesteps) // 2] for file in files])
    check = _verified_schedule(run, folder, middles, [file.tensors for file in files])
    errors = [file.error for file in files]
    return row(
        folder,
        error_mean=sum(error.total for error in errors) / len(errors),
        error_max=max(max(error.layers.values()) for error in errors),
        output_error=sum(check.approximation) / len(check.approximation),
    )


def write_experts(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    _needs_experts(run, "lora-experts")
    spec, folder, timesteps = lora_spec(run), out / "lora_experts", timesteps_of(run, options)
    export_expert_loras(run.network, timesteps, folder, spec)
    check = _verified_schedule(run, folder, timesteps[:: max(1, len(timesteps) // 5)])
    # The weights are exact at these timesteps; what the outputs show is rounding.
    return row(folder, error_mean=0.0, error_max=0.0, output_error=max(check.approximation))


def _verified_schedule(
    run: LoadedRun, folder: Path, timesteps: Tensor, tensors: list[dict[str, Tensor]] | None = None
) -> LoraCheck:
    probe = probe_inputs(run)[0]
    inputs = [{**probe, "timestep": t.expand(len(probe["timestep"]))} for t in timesteps]
    try:
        return verify_lora_schedule(
            folder, lambda: fresh_base(run), type(run.pipeline), inputs, model=complete(run), tensors=tensors
        )
    except ValueError:
        remove_schedule(folder)
        raise


def _needs_experts(run: LoadedRun, name: str) -> None:
    if run.recipe.adapter.kind != "td_lora":
        raise ValueError(f"run {run.folder} has adapter.kind {run.recipe.adapter.kind!r}; {name} export needs td_lora")


def lora_spec(run: LoadedRun) -> ModelSpec:
    """What the header of a plain LoRA says; ValueError if diffusers loads none for this run's pipeline."""
    if not hasattr(run.pipeline, "load_lora_weights"):
        raise ValueError(
            f"run {run.folder}: diffusers loads no LoRA into a {type(run.pipeline).__name__}; export it as td-lora"
        )
    return ModelSpec(
        title=run.recipe.name, date=date.today().isoformat(), description=f"Adapts {run.recipe.model.base}"
    )
