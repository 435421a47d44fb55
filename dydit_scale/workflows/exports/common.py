"""What all exports of a run share: its base, inputs to compare outputs on, and the row that says what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from dydit_scale.adapters.export import MeanError, error_notes, mean_error, mean_lora, plain_lora, timestep_embeddings
from dydit_scale.diffusion.flow import sample_noise
from dydit_scale.models.family import Prompts
from dydit_scale.models.loading import load_transformer
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import sampler_timesteps
from dydit_scale.train.objective import make_process, sample_size
from dydit_scale.workflows.runs import LoadedRun, sample_config

LARGEST_ERROR = 0.5
"""Share of the adapter's size, or of its effect on the output, that an export may miss unless it is forced."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the formats that depend on the timestep need to know."""

    steps: int
    """Of the sampler."""
    ranges: int
    """Files of lora-ranges."""
    force: bool
    """Write although the approximation is poor."""
    license: str | None
    """Of the weights, if the user names it."""


class Errors(NamedTuple):
    """What a written file misses, 0 for nothing."""

    weights: float
    """Share of the adapter's size, in the weights."""
    worst: float
    """The same for the worst layer."""
    output: float
    """Share of the adapter's effect on the output; where all weights were trained, share of the output."""


class ExportRow(TypedDict):
    """What ``export.json`` says of a file or folder."""

    format: str
    path: str
    bytes: int
    error_mean: float
    error_max: float
    output_error: float
    routers: bool | None
    """Whether those of a dynamic run are in it; None for a run without."""
    verified: bool


EXACT = 0.0, 0.0
"""``weights`` and ``worst`` of what loses nothing."""


class PlainLora(NamedTuple):
    """The plain LoRA of a run, and what it loses in the weights."""

    tensors: dict[str, Tensor]
    error: MeanError | None
    """Of a mean over the sampler's timesteps; None where nothing is lost."""

    @property
    def lost(self) -> tuple[float, float]:
        """``Errors.weights`` and ``Errors.worst``."""
        return EXACT if self.error is None else (self.error.total, max(self.error.layers.values()))

    @property
    def notes(self) -> dict[str, str]:
        """For a file's header."""
        return {} if self.error is None else error_notes(self.error)


def plain_lora_of(run: LoadedRun, options: ExportOptions) -> PlainLora:
    """ValueError if the run has no LoRA, or a mean misses too much of it."""
    kind = run.recipe.adapter.kind
    if kind == "lora":
        return PlainLora(plain_lora(run.network), None)
    if kind != "td_lora":
        raise ValueError(f"run {run.folder} has adapter.kind {kind}; there is no LoRA in it (use --format pipeline)")
    t_embs = timestep_embeddings(run.network, timesteps_of(run, options))
    error = mean_error(run.network, t_embs)
    if error.total > LARGEST_ERROR and not options.force:
        raise ValueError(
            f"run {run.folder}: the mean over timesteps misses the adapter by {error.total:.3f} of its size, more than "
            f"{LARGEST_ERROR}; use another format (td-lora is exact), or --force"
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


def mean(values: Sequence[float]) -> float:
    """The arithmetic one."""
    return sum(values) / len(values)
