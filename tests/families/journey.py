"""A tiny model of every family: its base, its data and a recipe, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.shapes import write_shapes
from dydit_scale.data.shapes.language import CLASSES, vocabulary
from dydit_scale.data.shapes.motion import MOTIONS, motion_vocabulary
from dydit_scale.models.families.pixart import small_pixart_pipeline
from dydit_scale.models.small import (
    small_class_latte_pipeline,
    small_class_pipeline,
    small_flux_pipeline,
    small_latte_pipeline,
)
from dydit_scale.train.recipe import Recipe, build

NAMES = [subject.phrase() for subject in CLASSES]
WIDTH = {"heads": 4, "head_dim": 8}
FRAMES = 8
FAMILIES = {
    "flux": lambda: small_flux_pipeline(vocabulary(), double_blocks=1, single_blocks=1, **WIDTH),
    "dit": lambda: small_class_pipeline(NAMES, kind="dit", layers=2, side=16, **WIDTH),
    "sit": lambda: small_class_pipeline(NAMES, kind="sit", layers=2, side=16, **WIDTH),
    "latte": lambda: small_latte_pipeline(motion_vocabulary(), frames=FRAMES, layers=1, side=16, **WIDTH),
    "latte-classes": lambda: small_class_latte_pipeline(MOTIONS, frames=FRAMES, layers=2, side=16, **WIDTH),
    "pixart": lambda: small_pixart_pipeline(vocabulary(), layers=2, side=16, **WIDTH),
}
PROMPTS = {
    "flux": "a red circle",
    "pixart": "a red circle",
    "dit": "a red circle",
    "sit": "5",
    "latte": "a red circle bounces",
}
VIDEOS = ("latte", "latte-classes")
ADAPTERS = ("none", "td_lora")


def prompt(family: str) -> str:
    return PROMPTS.get(family, MOTIONS[2])


def write_world(folder: Path, family: str) -> None:
    """``base/`` and ``shards/``."""
    FAMILIES[family]().save_pretrained(folder / "base")
    classes, video = family in ("dit", "sit", "latte-classes"), family in VIDEOS
    write_shapes(
        folder / "shards", samples=12, side=16, classes=classes, frames=FRAMES if video else 1, workers=1,
        progress=False,
    )  # fmt: skip


def family_recipe(folder: Path, family: str, adapter: str, **changes: Any) -> Recipe:
    """Routers are uncertain from the start, so that gates flip within a few steps."""
    data: dict[str, Any] = {"path": str(folder / "shards"), "image_size": 16}
    if family in VIDEOS:
        data |= {"frames": FRAMES, "images_per_clip": 2}
    values = {
        "name": family,
        "run": str(folder / f"run-{adapter}"),
        "model": {"base": str(folder / "base"), "text_tokens": 12},
        "data": data,
        "dynamic": {"width_bias": 0.5, "token_bias": 0.5, "token_bottleneck": 4},
        "adapter": {"kind": adapter, "rank": 2, "experts": 2},
        "supervision": {"kind": "distill"},
        "cost": {"target": 0.75, "ramp_steps": 2},
        "train": {
            "steps": 2,
            "batch_size": 4,
            "lr": 1e-3,
            "router_lr": 1e-2,
            "warmup_steps": 1,
            "ema": 0.9,
            "evaluate_every": 2,
            "evaluate_samples": 4,
            "sample_every": 2,
            "sample_steps": 2,
            "sample_cfg": 2.0,
            "sample_prompts": (prompt(family),),
        },
        **changes,
    }
    return build(Recipe, values, where="")
