"""Bases with a learned autoencoder, and data with a bad sample, small enough to encode and train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from data_tools.shapes import write_shapes
from dydit_scale.data.shards import build_index
from dydit_scale.parallel.world import World
from dydit_scale.train.recipe import Recipe
from dydit_scale.workflows.encode import Encoded, encode_data
from tests.families.journey import FAMILIES, FRAMES, VIDEOS, family_recipe

STRIDE = 2
"""Of the frames of a clip: there are more than the model takes."""


def write_vae(folder: Path, seed: int = 0) -> None:
    """Random weights in place of the base's pixel autoencoder: of the same shape, but with a width."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=12,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.1,
            layers_per_block=1,
        )
    vae.save_pretrained(folder / "vae")


def write_world(folder: Path, family: str, samples: int = 12, samples_per_shard: int = 5) -> None:
    """``base/`` and ``shards/``."""
    pipeline = FAMILIES[family]()
    write_vae(folder)
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(folder / "vae"))
    pipeline.save_pretrained(folder / "base")
    classes, video = family in ("dit", "sit", "latte-classes"), family in VIDEOS
    write_shapes(
        folder / "shards", samples=samples, side=16, classes=classes, frames=1 + STRIDE * FRAMES if video else 1,
        samples_per_shard=samples_per_shard, workers=1, progress=False,
    )  # fmt: skip


def spoil(folder: Path) -> None:
    """Break the picture or clip of the second sample, and index again."""
    shard = folder / "shards" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    sign = b"ftyp" if b"ftyp" in data else b"\x89PNG"
    at = data.index(sign, data.index(sign) + 1)
    data[at : at + 4] = b"\0\0\0\0"
    shard.write_bytes(data)
    build_index(folder / "shards", progress=False)


def encoded_recipe(folder: Path, family: str, path: Path, **changes: Any) -> Recipe:
    """Half of the captions are dropped, and nothing is drawn."""
    data: dict[str, Any] = {"path": str(path), "image_size": 16, "caption_dropout": 0.5}
    if family in VIDEOS:
        data |= {"frames": FRAMES, "frame_stride": STRIDE, "images_per_clip": 2}
    train = {
        "steps": 3, "batch_size": 4, "lr": 1e-3, "router_lr": 1e-2, "warmup_steps": 1, "evaluate_every": 3,
        "evaluate_samples": 4, "sample_every": 0,
    }  # fmt: skip
    return family_recipe(folder, family, "none", **{"data": data, "train": train, **changes})


def encode(folder: Path, family: str, out: Path, **options: Any) -> Encoded:
    """Encode ``shards/`` in this process."""
    update, dtype = options.pop("update", False), options.pop("dtype", None)
    recipe = encoded_recipe(folder, family, folder / "shards", **options)
    return encode_data(recipe, out, World(), update=update, dtype=dtype, batch=4)
