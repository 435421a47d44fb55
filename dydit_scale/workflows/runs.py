"""A finished run, loaded back for sampling, export and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.checkpoint.state import of_kind
from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint
from dydit_scale.models.family import with_parts
from dydit_scale.models.loading import base_digest, load_transformer
from dydit_scale.models.registry import family_of
from dydit_scale.sampling.generate import SampleConfig
from dydit_scale.train.build import Parts, build_parts
from dydit_scale.train.recipe import Recipe, load_recipe


class LoadedRun(NamedTuple):
    """A run with its trained (averaged) weights in place, in evaluation mode."""

    folder: Path
    recipe: Recipe
    pipeline: Any
    network: Any
    checkpoint: Checkpoint


def load_run(
    folder: str | Path, *, device: str = "auto", fp32: bool = False, build: Callable[..., Parts] = build_parts
) -> LoadedRun:
    """The newest good checkpoint of a run, its averaged weights where the recipe keeps them.

    Args:
        device: "auto" is CUDA where there is one.
        fp32: Everything in fp32; otherwise in the recipe's precision, but for routers and adapters.
        build: what made the network in training.

    Raises ValueError if the folder is no run, has no checkpoint, or its base is no longer the one it was trained on.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"run {folder}: no recipe.yaml in it; expected the folder that training wrote")
    recipe = load_recipe(folder / "recipe.yaml")
    checkpoint = load_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"run {folder}: it has no checkpoint yet; let it train to its first save")
    if checkpoint.meta.get("base") != base_digest(recipe.model.base):
        raise ValueError(
            f"run {folder}: {recipe.model.base} is no longer the base it was trained on; put that one back"
        )
    if fp32:
        recipe = replace(recipe, engine=replace(recipe.engine, precision="fp32"))
    parts = build(recipe)
    weights = of_kind(checkpoint, "ema" if recipe.train.ema is not None else "param")
    parameters = {n: p for n, p in parts.network.named_parameters() if p.requires_grad}
    if differ := sorted(set(weights) ^ set(parameters)):
        raise ValueError(
            f"run {folder}: its checkpoint and its recipe differ in {differ[0]} and {len(differ) - 1} more tensors"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    network = parts.network.eval().requires_grad_(False)
    dtype = parts.pipeline.vae.dtype
    for name, parameter in network.named_parameters():
        if not is_dynamic_name(name) and ".td_" not in name and ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    parts.pipeline.to(pick_device(device))
    return LoadedRun(folder, recipe, parts.pipeline, parts.network, checkpoint)


def pick_device(device: str) -> torch.device:
    """The device; "auto" is CUDA where there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def static_pipeline(run: LoadedRun) -> Any:
    """The untouched base of a run, sharing everything but the transformer."""
    transformer = load_transformer(run.recipe.model.base, family_of(run.pipeline))
    transformer = transformer.to(run.pipeline.device, run.pipeline.vae.dtype).eval()
    return with_parts(run.pipeline, transformer=transformer)


def sample_config(run: LoadedRun, **changes: Any) -> SampleConfig:
    """Sampling as the recipe's data and text ask for it."""
    defaults = {
        "steps": run.recipe.train.sample_steps,
        "height": run.recipe.data.image_size,
        "width": run.recipe.data.image_size,
        "frames": run.recipe.data.frames,
        "text_tokens": run.recipe.model.text_tokens,
        "seed": run.recipe.seed,
    }
    return SampleConfig(**{**defaults, **{k: v for k, v in changes.items() if v is not None}})
