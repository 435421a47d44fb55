"""A FLUX small enough to test with, and inputs for it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.masks import GateNoise
from dydit_scale.models.encoders import image_ids
from dydit_scale.models.flux import DyFluxTransformer2DModel

M = TypeVar("M", bound=nn.Module)
HEADS, IMAGE, TEXT, BATCH, LAYERS = 4, 16, 5, 3, 3


def tiny_flux(guidance: bool = False) -> FluxTransformer2DModel:
    """One double and two single blocks of width 32."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=HEADS, joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=guidance,
        axes_dims_rope=(4, 2, 2),
    ).eval()  # fmt: skip


def tiny_dynamic(**config: Any) -> DyFluxTransformer2DModel:
    """The dynamic one, gates open."""
    settings = {"token_bottleneck": 4, **config}
    return DyFluxTransformer2DModel.from_static(tiny_flux(), DynamicConfig(**settings))


def scramble(model: M, seed: int = 0) -> M:
    """Routers that decide at random: about half of everything is off, differently at each timestep and token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dy_width" in name:
                parameter.normal_(std=1.0 if name.endswith("weight") else 0.2, generator=generator)
            elif "dy_token" in name:
                parameter.normal_(std=0.5, generator=generator) if parameter.ndim == 2 else parameter.zero_()
    return model


def inputs(timesteps: list[float], seed: int = 1) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward, one sample per timestep."""
    g, n = torch.Generator().manual_seed(seed), len(timesteps)
    return {
        "hidden_states": torch.randn(n, IMAGE, 12, generator=g),
        "encoder_hidden_states": torch.randn(n, TEXT, 24, generator=g),
        "pooled_projections": torch.randn(n, 20, generator=g),
        "timestep": torch.tensor(timesteps),
        "img_ids": image_ids(4, 4),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def noise(batch: int = BATCH, groups: int = HEADS, seed: int = 2) -> GateNoise:
    """Noise for the gates."""
    g = torch.Generator().manual_seed(seed)
    return GateNoise(*(torch.randn(LAYERS, batch, n, generator=g) for n in (HEADS, groups, IMAGE)))


def without_gradient(model: nn.Module) -> list[str]:
    """Names of trainable parameters that got no gradient, or a zero one."""
    return [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
