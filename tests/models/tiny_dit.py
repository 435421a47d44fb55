"""A DiT small enough to test with, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.dit import DyDiTTransformer2DModel, with_embedder_per_block, with_one_embedder

HEADS, SIDE, TOKENS, CLASSES, LAYERS = 4, 8, 16, 5, 3


def tiny_dit(**config: Any) -> DiTTransformer2DModel:
    """Three blocks of width 32 with one embedder, as the published models have it, and no weight left at zero."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 6,
        "num_layers": LAYERS,
        "sample_size": SIDE,
        "num_embeds_ada_norm": CLASSES,
        **config,
    }
    model = DiTTransformer2DModel(**settings).eval()
    state = {
        k: v for k, v in model.state_dict().items() if ".norm1.emb." not in k or k.startswith("transformer_blocks.0.")
    }
    model.load_state_dict(with_embedder_per_block(with_one_embedder(state), settings["num_layers"]))
    return model


def tiny_dynamic(static: dict[str, Any] | None = None, **config: Any) -> DyDiTTransformer2DModel:
    """The dynamic one, gates open."""
    return DyDiTTransformer2DModel.from_static(tiny_dit(**(static or {})), DynamicConfig(**config))


def inputs(timesteps: list[Any], side: int = SIDE, seed: int = 1) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward, one sample per timestep."""
    g, n = torch.Generator().manual_seed(seed), len(timesteps)
    return {
        "hidden_states": torch.randn(n, 3, side, side, generator=g),
        "timestep": torch.tensor(timesteps),
        "class_labels": torch.randint(CLASSES + 1, (n,), generator=g),
    }


def noise(batch: int, groups: int = HEADS, seed: int = 2) -> GateNoise:
    """Noise for the gates."""
    g = torch.Generator().manual_seed(seed)
    return GateNoise(*(torch.randn(LAYERS, batch, n, generator=g) for n in (HEADS, groups, TOKENS)))
