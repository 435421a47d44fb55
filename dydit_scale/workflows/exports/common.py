"""What all exports of a run share: its base, inputs to compare outputs on, and the row that says what was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dydit_scale.adapters.export import MeanError, mean_error, mean_lora, plain_lora, timestep_embeddings
from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.models.family import Prompts
from dydit_scale.models.loading import load_transformer
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import sampler_timesteps
from dydit_scale.train.objective import make_process, sample_size
from dydit_scale.workflows.runs import LoadedRun, sample_config

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


class PlainLora(NamedTuple):
    """The plain LoRA of a run, and what it loses in the weights."""

    tensors: dict[str, Tensor]
    error: MeanError | None
    """Of a mean over the sampler's timesteps; None where nothing is lost."""

    def errors(self) -> dict[str, float]:
        """For a row."""
        if self.error is None:
            return {"error_mean": 0.0, "error_max": 0.0}
        return {"error_mean": self.error.total, "error_max": max(self.error.layers.values())}


def plain_lora_of(run: LoadedRun, options: ExportOptions) -> PlainLora:
    """ValueError if the run has no LoRA, or a mean misses too much of it."""
    kind = run.recipe.adapter.kind
    if kind == "lora":
        return PlainLora(plain_lora(run.network), None)
    if kind != "td_lora":
        raise ValueError(f"run {run.folder} trained all weights; there is no LoRA in it (use --format pipeline)")
    t_embs = timestep_embeddings(run.network, timesteps_of(run, options))
    error = mean_error(run.network, t_embs)
    if error.total > LARGEST_ERROR and not options.force:
        raise ValueError(
            f"run {run.folder}: the mean over timesteps misses the adapter by {error.total:.3f} of its size, more than "
            f"{LARGEST_ERROR}; use --format td-lora, lora-ranges or lora-experts, or --force"
        )
    return PlainLora(mean_lora(run.network, t_embs), error)


def timesteps_of(run: LoadedRun, options: ExportOptions) -> Tensor:
    """The sampler's, as the model's forward takes them."""
    return sampler_timesteps(run.pipeline, sample_config(run, steps=options.steps))


class _OpenGates(nn.Module):
    """The complete model: what a static base with the adapter is compared to."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> Any:
        return self.network(**inputs, gates="open")


def complete(run: LoadedRun) -> nn.Module:
    """The run's model with all gates open."""
    return _OpenGates(run.network) if run.recipe.dynamic is not None else run.network


def fresh_base(run: LoadedRun) -> Any:
    """The transformer that the run started from, static, in fp32."""
    return load_transformer(run.recipe.model.base, family_of(run.pipeline)).eval()


def probe_inputs(run: LoadedRun) -> list[dict[str, Tensor]]:
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


def row(path: Path, **errors: float) -> dict[str, Any]:
    """What ``export.json`` says of a file or folder that was verified."""
    size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return {"path": str(path), "bytes": size, **errors, "verified": True}
