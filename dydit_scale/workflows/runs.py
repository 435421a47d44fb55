"""A finished run, loaded back for sampling, export and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline

from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint
from dydit_scale.models.loading import load_transformer
from dydit_scale.sampling.generate import SampleConfig
from dydit_scale.train.build import build_parts
from dydit_scale.train.recipe import Recipe, load_recipe


class LoadedRun(NamedTuple):
    """A run with its trained (averaged) weights in place, in evaluation mode."""

    folder: Path
    recipe: Recipe
    pipeline: FluxPipeline
    network: Any
    checkpoint: Checkpoint


def load_run(folder: str | Path) -> LoadedRun:
    """The newest good checkpoint of a run, its averaged weights where the recipe keeps them.

    Raises ValueError if the folder is no run, or has no checkpoint.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"run {folder}: no recipe.yaml in it; expected the folder that training wrote")
    recipe = load_recipe(folder / "recipe.yaml")
    checkpoint = load_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"run {folder}: it has no checkpoint yet; let it train to its first save")
    parts = build_parts(recipe)
    kind = "ema" if recipe.train.ema is not None else "param"
    weights = {k.removeprefix(f"{kind}."): v for k, v in checkpoint.tensors.items() if k.startswith(f"{kind}.")}
    parameters = {n: p for n, p in parts.network.named_parameters() if p.requires_grad}
    if differ := sorted(set(weights) ^ set(parameters)):
        raise ValueError(
            f"run {folder}: its checkpoint and its recipe differ in {differ[0]} and {len(differ) - 1} more tensors"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    parts.network.eval().requires_grad_(False)
    return LoadedRun(folder, recipe, parts.pipeline, parts.network, checkpoint)


def static_pipeline(run: LoadedRun) -> FluxPipeline:
    """The untouched base of a run, sharing everything but the transformer."""
    transformer = load_transformer(run.recipe.model.base).to(dtype=run.pipeline.text_encoder_2.dtype).eval()
    return with_transformer(run.pipeline, transformer)


def with_transformer(pipeline: FluxPipeline, transformer: Any) -> FluxPipeline:
    """The same pipeline around another transformer."""
    other = FluxPipeline(**{**pipeline.components, "transformer": transformer})
    other.set_progress_bar_config(disable=True)
    return other


def sample_config(run: LoadedRun, **changes: Any) -> SampleConfig:
    """Sampling as the recipe's data and text ask for it."""
    defaults = {
        "side": run.recipe.data.image_size,
        "text_tokens": run.recipe.model.text_tokens,
        "seed": run.recipe.seed,
    }
    return SampleConfig(**{**defaults, **{k: v for k, v in changes.items() if v is not None}})
