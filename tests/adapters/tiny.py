"""Tiny models, inputs and adapters for the tests of the adapters."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from dydit_scale.adapters.td_lora import TDLoraConfig, add_td_lora
from dydit_scale.dynamic.timestep import TimestepState

FLUX_TARGETS = ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_mlp", "norm.linear")
FLUX_LAYERS = 10
TIME_DIM = 16


def tiny_flux(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """One double and one single block; the same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    return model.to(dtype)


def flux_inputs(timesteps: Tensor, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(timesteps)
    return {
        "hidden_states": torch.randn(batch, 6, 4, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 8, generator=generator).to(dtype),
        "timestep": timesteps,
        "img_ids": torch.arange(18.0).view(6, 3) % 4,
        "txt_ids": torch.zeros(5, 3),
    }


class DynamicMLP(nn.Module):
    """A dynamic model in miniature: it owns the state, its blocks open the scope, and it has routers."""

    def __init__(self, blocks: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.timestep_state = TimestepState()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"fc1": nn.Linear(dim, 2 * dim), "fc2": nn.Linear(2 * dim, dim), "dy_token": nn.Linear(dim, 1)}
            )
            for _ in range(blocks)
        )

    def block(self, block: nn.ModuleDict, x: Tensor, t_emb: Tensor) -> Tensor:
        with self.timestep_state.scope(t_emb):
            return x + block["dy_token"](x).sigmoid() * block["fc2"](block["fc1"](x).relu())

    def forward(self, x: Tensor, t_emb: Tensor, checkpoint: Any = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self.block, block, x, t_emb) if checkpoint else self.block(block, x, t_emb)
        return x


def tiny_mlp() -> DynamicMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DynamicMLP()


def mlp_config(**changes: Any) -> TDLoraConfig:
    return TDLoraConfig(**{"target_modules": ["fc1", "fc2"], "rank": 2, "time_dim": TIME_DIM, **changes})


def flux_config(**changes: Any) -> TDLoraConfig:
    return TDLoraConfig(**{"target_modules": list(FLUX_TARGETS), "rank": 2, "alpha": 3.0, "experts": 3, **changes})


@torch.no_grad()
def shake(model: nn.Module, seed: int = 7, size: float = 0.3) -> nn.Module:
    """Make every adapter parameter random, as after training, so that the gates differ between timesteps."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part.startswith("td_") for part in name.split(".")):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapted_flux(dtype: torch.dtype = torch.float32, **changes: Any) -> FluxTransformer2DModel:
    """A Flux with an adapter that does something."""
    return shake(add_td_lora(tiny_flux(dtype), flux_config(**changes)))  # type: ignore[return-value]


def adapted_mlp(**changes: Any) -> DynamicMLP:
    return shake(add_td_lora(tiny_mlp(), mlp_config(**changes)))  # type: ignore[return-value]


def embeddings(batch: int, seed: int = 3) -> Tensor:
    return torch.randn(batch, TIME_DIM, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int = 5, seed: int = 4) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed))
