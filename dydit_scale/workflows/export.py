"""``dydit export``: adapters and models out of a run, each loaded back by its own consumer and compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dydit_scale.adapters.export import (
    ModelSpec,
    export_mean_lora,
    export_plain_lora,
    mean_lora,
    plain_lora,
    timestep_embeddings,
)
from dydit_scale.adapters.schedule import export_expert_loras, export_range_loras, remove_schedule
from dydit_scale.adapters.state import save_td_lora
from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.adapters.verify import DiffusersCheck, verify_diffusers_lora, verify_lora_schedule, verify_td_lora
from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.models.family import Prompts
from dydit_scale.models.loading import load_transformer
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import sampler_timesteps
from dydit_scale.train.objective import make_process, sample_size
from dydit_scale.workflows.runs import LoadedRun, load_run, sample_config

LARGEST_ERROR = 0.5
"""Of a mean over timesteps, as a share of the adapter's size, above which an export must be forced."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the formats that depend on the timestep need to know."""

    steps: int
    """Of the sampler."""
    ranges: int
    """Files of lora-ranges."""
    force: bool
    """Write although the approximation is poor."""


def export_run(
    folder: Path,
    formats: list[str],
    *,
    out: Path | None = None,
    steps: int = 28,
    ranges: int = 4,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Write and verify each format; returns (and adds to ``export/export.json``) a row for each.

    ``td-lora``: the adapter and routers as they are. ``diffusers``: the mean over the sampler's timesteps as a plain
    LoRA for the static model (routers are dropped). ``lora-ranges``: such a mean for each of several ranges of
    timesteps. ``lora-experts``: a plain LoRA for each expert and a table of gates, exact at the sampler's timesteps;
    ``load_lora_schedule`` loads both. ``pipeline``: a whole pipeline folder with the trained transformer.

    Raises ValueError for a format that the run does not have, or whose file fails its verification.
    """
    run = load_run(folder, device="cpu", fp32=True)
    out = out or run.folder / "export"
    out.mkdir(parents=True, exist_ok=True)
    options, rows = ExportOptions(steps=steps, ranges=ranges, force=force), []
    for name in formats:
        if name not in _WRITERS:
            raise ValueError(f"export format {name!r}: expected one of {', '.join(FORMATS)}")
        rows.append({"format": name, **_WRITERS[name](run, out, options)})
    _record(run.folder / "export" / "export.json", rows)
    return rows


def _write_td_lora(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    if run.recipe.adapter.kind != "td_lora":
        raise ValueError(f"run {run.folder} has adapter.kind {run.recipe.adapter.kind!r}; td-lora export needs td_lora")
    path = save_td_lora(
        run.network, out / "td_lora", metadata={"base": run.recipe.model.base, "recipe": run.recipe.name}
    )
    inputs = _probe_inputs(run)
    with torch.no_grad():
        reference = [run.network(**x, return_dict=False)[0] for x in inputs]
    fresh = _fresh_base(run)
    if run.recipe.dynamic is not None:
        fresh = family_of(run.pipeline).dynamic_class.from_static(fresh, run.recipe.dynamic)
    verify_td_lora(path, fresh.eval(), inputs, reference)
    return _row(path, error_mean=0.0, error_max=0.0, output_error=0.0)


def _write_diffusers(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    spec = _lora_spec(run)
    path = out / "pytorch_lora_weights.safetensors"
    network = run.network
    if run.recipe.adapter.kind == "lora":
        export_plain_lora(network, path, spec)
        errors, tensors = {"error_mean": 0.0, "error_max": 0.0}, plain_lora(network)
    elif run.recipe.adapter.kind == "td_lora":
        t_embs = timestep_embeddings(network, _timesteps(run, options))
        error = export_mean_lora(network, t_embs, path, spec, max_error=LARGEST_ERROR, force=options.force)
        errors = {"error_mean": error.total, "error_max": max(error.layers.values())}
        tensors = mean_lora(network, t_embs)
    else:
        raise ValueError(f"run {run.folder} trained all weights; there is no LoRA in it (use --format pipeline)")
    check = verify_diffusers_lora(
        path, lambda: _fresh_base(run), type(run.pipeline), _probe_inputs(run), model=_complete(run), tensors=tensors
    )
    mean = sum(check.approximation) / len(check.approximation)
    return _row(path, **errors, output_error=mean)


def _write_ranges(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    _needs_experts(run, "lora-ranges")
    spec, folder = _lora_spec(run), out / "lora_ranges"
    files = export_range_loras(
        run.network,
        _timesteps(run, options),
        folder,
        spec,
        ranges=options.ranges,
        max_error=LARGEST_ERROR,
        force=options.force,
    )
    middles = torch.stack([file.timesteps[len(file.timesteps) // 2] for file in files])
    check = _verified_schedule(run, folder, middles, [file.tensors for file in files])
    errors = [file.error for file in files]
    return _row(
        folder,
        error_mean=sum(error.total for error in errors) / len(errors),
        error_max=max(max(error.layers.values()) for error in errors),
        output_error=sum(check.approximation) / len(check.approximation),
    )


def _write_experts(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    _needs_experts(run, "lora-experts")
    spec, folder, timesteps = _lora_spec(run), out / "lora_experts", _timesteps(run, options)
    export_expert_loras(run.network, timesteps, folder, spec)
    check = _verified_schedule(run, folder, timesteps[:: max(1, len(timesteps) // 5)])
    # The weights are exact at these timesteps; what the outputs show is rounding.
    return _row(folder, error_mean=0.0, error_max=0.0, output_error=max(check.approximation))


def _verified_schedule(
    run: LoadedRun, folder: Path, timesteps: Tensor, tensors: list[dict[str, Tensor]] | None = None
) -> DiffusersCheck:
    probe = _probe_inputs(run)[0]
    inputs = [{**probe, "timestep": t.expand(len(probe["timestep"]))} for t in timesteps]
    try:
        return verify_lora_schedule(
            folder, lambda: _fresh_base(run), type(run.pipeline), inputs, model=_complete(run), tensors=tensors
        )
    except ValueError:
        remove_schedule(folder)
        raise


def _needs_experts(run: LoadedRun, name: str) -> None:
    if run.recipe.adapter.kind != "td_lora":
        raise ValueError(f"run {run.folder} has adapter.kind {run.recipe.adapter.kind!r}; {name} export needs td_lora")


def _lora_spec(run: LoadedRun) -> ModelSpec:
    """What the header of a plain LoRA says; ValueError if diffusers loads none for this run's pipeline."""
    if not hasattr(run.pipeline, "load_lora_weights"):
        raise ValueError(
            f"run {run.folder}: diffusers loads no LoRA into a {type(run.pipeline).__name__}; export it as td-lora"
        )
    return ModelSpec(
        title=run.recipe.name, date=date.today().isoformat(), description=f"Adapts {run.recipe.model.base}"
    )


def _timesteps(run: LoadedRun, options: ExportOptions) -> Tensor:
    return sampler_timesteps(run.pipeline, sample_config(run, steps=options.steps))


def _write_pipeline(run: LoadedRun, out: Path, options: ExportOptions) -> dict[str, Any]:
    if run.recipe.adapter.kind != "none":
        raise ValueError(f"run {run.folder} trained an adapter; export it as td-lora or diffusers")
    folder = out if (out / "model_index.json").is_file() else out / "pipeline"
    half = copy.deepcopy(run.network)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data if is_dynamic_name(name) else parameter.data.half()
    run.pipeline.register_modules(transformer=half)
    run.pipeline.save_pretrained(folder)
    back = type(run.network).from_pretrained(folder, subfolder="transformer", dtype=torch.float32).eval()
    inputs = _probe_inputs(run)
    with torch.no_grad():
        pairs = [(back(**x, return_dict=False)[0], run.network(**x, return_dict=False)[0]) for x in inputs]
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if error > 0.02:
        raise ValueError(f"{folder}: read back from fp16, the transformer's output is {error:.3f} off; it needs fp32")
    return _row(folder, error_mean=0.0, error_max=0.0, output_error=error)


_WRITERS: dict[str, Callable[[LoadedRun, Path, ExportOptions], dict[str, Any]]] = {
    "td-lora": _write_td_lora,
    "diffusers": _write_diffusers,
    "lora-ranges": _write_ranges,
    "lora-experts": _write_experts,
    "pipeline": _write_pipeline,
}
FORMATS = tuple(_WRITERS)


class _OpenGates(nn.Module):
    """The complete model: what a static base with the adapter is compared to."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> Any:
        return self.network(**inputs, gates="open")


def _complete(run: LoadedRun) -> nn.Module:
    return _OpenGates(run.network) if run.recipe.dynamic is not None else run.network


def _fresh_base(run: LoadedRun) -> Any:
    return load_transformer(run.recipe.model.base, family_of(run.pipeline)).eval()


def _probe_inputs(run: LoadedRun) -> list[dict[str, Tensor]]:
    """Noise and the recipe's first prompts, as inputs of the transformer at several timesteps."""
    family, pipeline, recipe, size = family_of(run.pipeline), run.pipeline, run.recipe, sample_size(run.recipe)
    size = replace(size, images=0)
    process = make_process(recipe, family)
    captions = [*recipe.train.sample_prompts[:1], ""][:2]
    prompts = Prompts(captions=captions, text_tokens=recipe.model.text_tokens, guidance=recipe.model.guidance)
    conditions = family.conditions(pipeline, prompts, size)
    noise = family.pack(sample_noise(0, torch.arange(len(captions)), family.latent_shape(pipeline, size), "probe"))
    levels = process.even_levels(torch.tensor([0.98, 0.75, 0.5, 0.25, 0.05]))
    return [
        {"hidden_states": noise, "timestep": process.timestep(level.expand(len(captions))), **conditions}
        for level in levels
    ]


def _row(path: Path, **errors: float) -> dict[str, Any]:
    size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return {"path": str(path), "bytes": size, **errors, "verified": True}


def _record(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.is_file() else []
    kept = [r for r in old if r["format"] not in {row["format"] for row in rows}]
    path.write_text(json.dumps(kept + rows, indent=1))
