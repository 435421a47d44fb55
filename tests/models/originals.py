"""Checkpoints in the layouts of other projects, at toy size with random weights."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

DIM, HEADS, DEPTH, GRID, PATCH, CHANNELS, CLASSES = 128, 2, 2, 4, 2, 4, 5
"""Of the DiTs."""
FRAMES = 3
"""Of the Lattes."""


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, large enough that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator) * (0.1 if len(size) == 1 else size[-1] ** -0.5)
        for name, size in shapes.items()
    }


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a linear layer."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def positions() -> Tensor:
    """DiT's positions [1, tokens, dim]: sines and cosines of the column, then of the row."""
    omega = 1.0 / 10000 ** (np.arange(DIM // 4, dtype=np.float64) / (DIM / 4.0))
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    angles = [np.outer(axis.astype(np.float32), omega) for axis in (columns, rows)]
    return torch.from_numpy(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)).float()[None]


def original_dit(seed: int = 0) -> dict[str, Tensor]:
    """facebookresearch's DiT and SiT."""
    shapes = {"x_embedder.proj.weight": (DIM, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": (DIM,)}
    shapes |= linear("t_embedder.mlp.0", DIM, 256) | linear("t_embedder.mlp.2", DIM, DIM)
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, DIM)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= linear(f"{block}.attn.qkv", 3 * DIM, DIM) | linear(f"{block}.attn.proj", DIM, DIM)
        shapes |= linear(f"{block}.mlp.fc1", 4 * DIM, DIM) | linear(f"{block}.mlp.fc2", DIM, 4 * DIM)
        shapes |= linear(f"{block}.adaLN_modulation.1", 6 * DIM, DIM)
    shapes |= linear("final_layer.linear", 2 * CHANNELS * PATCH**2, DIM)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * DIM, DIM)
    return {"pos_embed": positions(), **filled(shapes, seed)}


def original_dydit(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """DyDiT with so many rows in its width routers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= linear(f"{block}.attn_rate.router", rows, DIM) | linear(f"{block}.mlp_rate.router", rows, DIM)
        shapes |= linear(f"{block}.token_selection.mlp_head.0", DIM // 16, DIM)
        shapes |= linear(f"{block}.token_selection.mlp_head.2", 1, DIM // 16)
    return {**original_dit(seed), **filled(shapes, seed + 1)}


def original_latte(classes: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Vchitect's Latte, class-conditional or not."""
    omega = 1.0 / 10000 ** (np.arange(DIM // 2, dtype=np.float64) / (DIM / 2.0))
    angles = np.outer(np.arange(FRAMES), omega)
    in_time = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()[None]
    state = {**original_dit(seed), "temp_embed": in_time}
    return state if classes else {n: t for n, t in state.items() if not n.startswith("y_embedder.")}


def original_flux(dim: int = 64, head_dim: int = 32, columns: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """black-forest-labs' FLUX.1; ``columns`` replaces the inputs of every layer."""
    n = columns or dim
    shapes = linear("img_in", dim, columns or 12) | linear("txt_in", dim, columns or 24)
    for name, width in (("time_in", 256), ("vector_in", 20), ("guidance_in", 256)):
        shapes |= linear(f"{name}.in_layer", dim, columns or width) | linear(f"{name}.out_layer", dim, n)
    for i in range(1 if columns else 2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= linear(f"{block}_mod.lin", 6 * dim, n)
            shapes |= linear(f"{block}_attn.qkv", 3 * dim, n) | linear(f"{block}_attn.proj", dim, n)
            shapes |= {f"{block}_attn.norm.{x}_norm.scale": (head_dim,) for x in ("query", "key")}
            shapes |= linear(f"{block}_mlp.0", 4 * dim, n) | linear(f"{block}_mlp.2", dim, columns or 4 * dim)
    for i in range(1 if columns else 3):
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.linear1", 7 * dim, n) | linear(f"{block}.linear2", dim, columns or 5 * dim)
        shapes |= {f"{block}.norm.{x}_norm.scale": (head_dim,) for x in ("query", "key")}
        shapes |= linear(f"{block}.modulation.lin", 3 * dim, n)
    shapes |= linear("final_layer.linear", 12, n) | linear("final_layer.adaLN_modulation.1", 2 * dim, n)
    return filled(shapes, seed)


def original_dyflux(seed: int = 0) -> dict[str, Tensor]:
    """DyFLUX: a FLUX of diffusers with token routers."""
    flux = FluxTransformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in flux.state_dict().items()}
    for block in ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"):
        router = f"{block}.token_selection"
        shapes |= linear(f"{router}.linear_t", 4 * 64, 64) | linear(f"{router}.router", 1, 64)
        shapes |= {f"{router}.norm.weight": (64,), f"{router}.norm.bias": (64,)}
    return filled(shapes, seed)
