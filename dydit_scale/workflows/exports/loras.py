"""Exports of a run's adapter, natively and as plain LoRAs, each loaded back by those who will use it."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from dydit_scale.adapters.export import (
    PREFIX,
    ModelSpec,
    fused_name,
    write_error,
    write_fused_lora,
    write_lora,
    write_peft_lora,
)
from dydit_scale.adapters.schedule import export_expert_loras, export_range_loras
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
from dydit_scale.models.keys.lora import WEIGHT, LowRank, fused_loras, with_fused_loras
from dydit_scale.models.keys.rules import Rule
from dydit_scale.models.registry import family_of
from dydit_scale.workflows.exports.common import (
    EXACT,
    LARGEST_ERROR,
    Errors,
    ExportOptions,
    PlainLora,
    complete,
    fresh_base,
    mean,
    plain_lora_of,
    probe_inputs,
    timesteps_of,
)
from dydit_scale.workflows.runs import LoadedRun


def write_native(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """The adapter and its routers, exactly."""
    _needs_experts(run, "td-lora")
    save_td_lora(run.network, path, metadata={"base": run.recipe.model.base, "recipe": run.recipe.name})
    inputs = probe_inputs(run)
    with torch.no_grad():
        reference = [run.network(**x, return_dict=False)[0] for x in inputs]
    fresh = fresh_base(run)
    if run.recipe.dynamic is not None:
        fresh = family_of(run.pipeline).dynamic_class.from_static(fresh, run.recipe.dynamic)
    verify_td_lora(path, fresh.eval(), inputs, reference)
    return Errors(*EXACT, 0.0)


def write_diffusers(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """One plain LoRA for the pipeline's ``load_lora_weights``."""
    spec, lora = _lora_spec(run, options), plain_lora_of(run, options)
    write_lora(path, lora.tensors, spec, lora.notes)
    _write_error(path.with_suffix(".json"), lora)
    return _verified(run, path, diffusers_loader(path, type(run.pipeline)), lora)


def write_peft(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """One plain LoRA as a folder for peft."""
    lora = plain_lora_of(run, options)
    write_peft_lora(path, lora.tensors, run.recipe.model.base)
    _write_error(path / "mean_error.json", lora)
    return _verified(run, path, peft_loader(path), lora)


def write_fused(run: LoadedRun, path: Path, options: ExportOptions, *, style: str) -> Errors:
    """One plain LoRA in the original FLUX layers, read back by the names that its readers document."""
    spec, lora, base = _lora_spec(run, options), plain_lora_of(run, options), fresh_base(run)
    rules = layout_of({**base.config, "_class_name": type(base).__name__}, f"run {run.folder}").rules(base.config)
    shapes = {name: weight.shape for name, weight in base.state_dict().items()}
    del base
    write_fused_lora(path, fused_loras(_pairs(lora.tensors), rules, shapes), style, spec, lora.notes)
    _write_error(path.with_suffix(".json"), lora)
    return _verified(run, path, _fused_loader(path, style, rules), lora)


def _pairs(tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    """A plain LoRA by diffusers' layer."""
    ending = ".lora_A.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(ending): LowRank(down, tensors[name.replace("lora_A", "lora_B")])
        for name, down in tensors.items()
        if name.endswith(ending)
    }


def _fused_loader(path: Path, style: str, rules: list[Rule]) -> Loader:
    """Reads a file as programs with the original layers do: alpha / rank times up times down, by layer name."""
    layers = [name.removesuffix(WEIGHT) for rule in rules for name in rule.originals if name.endswith(WEIGHT)]

    def load(model: nn.Module) -> int:
        file, loras = read_tensors(path).tensors, {}
        for layer in layers:
            try:
                name = fused_name(layer, style)
            except ValueError:
                continue
            if (down := file.pop(f"{name}.lora_down.weight", None)) is not None:
                up, alpha = file.pop(f"{name}.lora_up.weight"), file.pop(f"{name}.alpha")
                loras[layer] = LowRank(down, up * (alpha / len(down)))
        if file:
            raise ValueError(f"{path}: {next(iter(file))} belongs to no layer of the original")
        before = model.state_dict()
        changed = with_fused_loras(before, loras, rules)
        adapted = sum(not torch.equal(weight, before[name]) for name, weight in changed.items())
        model.load_state_dict(changed, strict=False)
        return adapted

    return load


def _verified(run: LoadedRun, path: Path, load: Loader, lora: PlainLora) -> Errors:
    check = verify_plain_lora(
        path, load, lambda: fresh_base(run), probe_inputs(run), model=complete(run), tensors=lora.tensors
    )
    return Errors(*lora.lost, mean(check.approximation))


def _write_error(path: Path, lora: PlainLora) -> None:
    if lora.error is not None:
        write_error(path, lora.error)


def write_ranges(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """Means over ranges of timesteps."""
    _needs_experts(run, "lora-ranges")
    spec, timesteps = _lora_spec(run, options), timesteps_of(run, options)
    files = export_range_loras(
        run.network, timesteps, path, spec, ranges=options.ranges, max_error=LARGEST_ERROR, force=options.force
    )
    middles = torch.stack([file.timesteps[len(file.timesteps) // 2] for file in files])
    check = _verified_schedule(run, path, middles, [file.tensors for file in files])
    worst = max(max(file.error.layers.values()) for file in files)
    return Errors(mean([file.error.total for file in files]), worst, mean(check.approximation))


def write_experts(run: LoadedRun, path: Path, options: ExportOptions) -> Errors:
    """A plain LoRA for each expert, and the table of gates."""
    _needs_experts(run, "lora-experts")
    timesteps = timesteps_of(run, options)
    export_expert_loras(run.network, timesteps, path, _lora_spec(run, options))
    check = _verified_schedule(run, path, timesteps[:: max(1, len(timesteps) // 5)])
    return Errors(*EXACT, max(check.approximation))  # the weights are exact at these timesteps; the rest is rounding


def _verified_schedule(
    run: LoadedRun, folder: Path, timesteps: Tensor, tensors: list[dict[str, Tensor]] | None = None
) -> LoraCheck:
    probe = probe_inputs(run)[0]
    inputs = [{**probe, "timestep": t.expand(len(probe["timestep"]))} for t in timesteps]
    return verify_lora_schedule(
        folder, lambda: fresh_base(run), type(run.pipeline), inputs, model=complete(run), tensors=tensors
    )


def _needs_experts(run: LoadedRun, name: str) -> None:
    if run.recipe.adapter.kind != "td_lora":
        raise ValueError(f"run {run.folder} has adapter.kind {run.recipe.adapter.kind!r}; {name} export needs td_lora")


def _lora_spec(run: LoadedRun, options: ExportOptions) -> ModelSpec:
    """What the header of a plain LoRA says; ValueError if diffusers loads none for this run's pipeline."""
    if not hasattr(run.pipeline, "load_lora_weights"):
        raise ValueError(
            f"run {run.folder}: diffusers loads no LoRA into a {type(run.pipeline).__name__}; use td-lora or peft"
        )
    text = f"Adapts {run.recipe.model.base}."
    if run.recipe.dynamic is not None:
        text += " Trained with routers, which are not in this file: the complete model runs, at full cost."
    return ModelSpec(title=run.recipe.name, date=date.today().isoformat(), description=text, license=options.license)
