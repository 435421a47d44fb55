"""The released DyFLUX: diffusers' FLUX names plus a token router in every block; heads and channels are static.

A skipped image token of a single block misses the whole output, and the router's norm has weights (DyFLUX, dy_utils).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.keys.flux import checked_heads, flux_rules, rope_axes
from dydit_scale.models.keys.layout import Config, Layout, Tensors, depth, shape
from dydit_scale.models.keys.rules import Rule, rename
from dydit_scale.models.keys.units import contiguous_units

_DYNAMIC: dict[str, Any] = {
    "heads": False,
    "mlp": False,
    "token_router": "flux",
    "token_bottleneck": 0,
    "single_bypass": "attn_out+mlp",
}
_TABLES = {
    "transformer_blocks": ("dy_channel_unit", "dy_context_channel_unit"),
    "single_transformer_blocks": ("dy_channel_unit",),
}


def dyflux_config(tensors: Tensors, heads: int | None) -> Config:
    """``config.json`` of a DyFluxTransformer2DModel, from shapes."""
    dim, channels = shape(tensors, "x_embedder.weight", 2)
    (head_dim,) = shape(tensors, "transformer_blocks.0.attn.norm_q.weight", 1)
    dynamic = DynamicConfig(**_DYNAMIC, token_bias=5.0, temperature=5.0)
    return {
        "_class_name": "DyFluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape(tensors, "proj_out.weight", 2)[0],
        "num_layers": depth(tensors, "transformer_blocks"),
        "num_single_layers": depth(tensors, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": checked_heads(dim, head_dim, heads),
        "joint_attention_dim": shape(tensors, "context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape(tensors, "time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "guidance_embeds": any(name.startswith("time_text_embed.guidance_embedder.") for name in tensors),
        "axes_dims_rope": rope_axes(head_dim),
        "dynamic": asdict(dynamic),
    }


def dyflux_rules(config: Config) -> list[Rule]:
    """The base weights under their own names, then each block's router and unit tables."""
    heads = config["num_attention_heads"]
    channels = 4 * heads * config["attention_head_dim"]
    rules = [Rule((name,), (name,)) for rule in flux_rules(config) for name in rule.ours]
    for kind, count in (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers")):
        for block in (f"{kind}.{i}" for i in range(config[count])):
            rules += rename(f"{block}.token_selection.linear_t", f"{block}.dy_token.modulate")
            rules += rename(f"{block}.token_selection.norm", f"{block}.dy_token.norm")
            rules += rename(f"{block}.token_selection.router", f"{block}.dy_token.up")
            rules += contiguous_units(block, heads, dict.fromkeys(_TABLES[kind], channels))
    return rules


DYFLUX = Layout(
    title="DyFLUX",
    target="DyFluxTransformer2DModel",
    config=dyflux_config,
    rules=dyflux_rules,
    settings={f"dynamic.{name}": value for name, value in _DYNAMIC.items()} | {"dynamic.tokens": True},
    wrapper="module",
)
