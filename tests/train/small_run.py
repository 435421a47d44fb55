"""A base, data and a recipe small enough to train in a test."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dydit_scale.data.shapes.language import vocabulary
from dydit_scale.data.shapes.scene import draw, make_scene
from dydit_scale.data.shards import write_shards
from dydit_scale.models.small import small_flux_pipeline


def small_world(folder: Path, samples: int = 48) -> Path:
    """Write ``base/`` (one double and one single block of width 32), ``shards/`` and ``recipe.yaml``; returns the
    latter."""
    small_flux_pipeline(vocabulary(), heads=4, head_dim=8, double_blocks=1, single_blocks=1).save_pretrained(
        folder / "base"
    )
    write_shards(_samples(samples), folder / "shards", samples_per_shard=20, progress=False)
    recipe = small_recipe(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def small_recipe(folder: Path) -> dict[str, Any]:
    """Routers are uncertain from the start, so that gates flip within a few steps."""
    return {
        "name": "small",
        "run": str(folder / "run"),
        "model": {"base": str(folder / "base"), "text_tokens": 12},
        "data": {"path": str(folder / "shards"), "image_size": 32},
        "dynamic": {"width_bias": 0.5, "token_bias": 0.5, "token_bottleneck": 4},
        "adapter": {"kind": "td_lora", "rank": 2, "experts": 2},
        "supervision": {"kind": "distill"},
        "cost": {"target": 0.5, "ramp_steps": 2},
        "train": {
            "steps": 4,
            "batch_size": 8,
            "lr": 1e-3,
            "router_lr": 1e-2,
            "warmup_steps": 1,
            "ema": 0.9,
            "evaluate_every": 2,
            "evaluate_samples": 8,
            "save_every": 2,
        },
    }


def _samples(count: int) -> Iterator[dict[str, bytes | str]]:
    for i in range(count):
        scene, file = make_scene(0, i), io.BytesIO()
        Image.fromarray(draw(scene, 32)).save(file, "PNG")
        yield {
            "__key__": f"{i:06d}",
            "png": file.getvalue(),
            "txt": scene.prompt.caption,
            "json": json.dumps(scene.as_dict()).encode(),
        }
