"""The released DyDiT (2025-03 and 2024-12): DiT's names plus width routers and a token router in every block.

Our names: timestep and class are embedded once, by ``time_class_embed``; the width routers of all layers are stacked at
the root (``dy_width.heads`` and ``dy_width.groups``, one row per unit); the token router is ``dy_token`` of its block.
The release of 2025-03 has H - 1 rows, unit 0 being always on; that of 2024-12 has H rows and no such unit.
"""

from __future__ import annotations

from dataclasses import asdict

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.keys.dit import EMBEDDER, ORIGINAL, class_rules, dit_config, network_rules, timestep_rules
from dydit_scale.models.keys.layout import Config, Layout, Tensors, shape
from dydit_scale.models.keys.rules import Rule, Stack, rename
from dydit_scale.models.keys.units import contiguous_units

_WIDTHS = {"attn_rate": "heads", "mlp_rate": "groups"}


def dydit_config(tensors: Tensors, heads: int | None) -> Config:
    """``config.json`` of our dynamic DiT, from shapes. ValueError if the routers have neither H nor H - 1 rows."""
    config = dit_config(tensors, heads)
    heads = config["num_attention_heads"]
    rows = shape(tensors, "blocks.0.attn_rate.router.weight", 2)[0]
    if rows not in (heads - 1, heads):
        raise ValueError(
            f"blocks.0.attn_rate.router.weight: expected {heads - 1} rows (2025-03) or {heads} (2024-12) for {heads} "
            f"heads, got {rows}; give another number of heads (--heads)"
        )
    dynamic = DynamicConfig(
        token_router="dit", always_on=rows == heads - 1, width_bias=15.0, token_bias=35.0, temperature=5.0
    )
    return {**config, "_class_name": "DyDiTTransformer2DModel", "dynamic": asdict(dynamic)}


def dydit_rules(config: Config) -> list[Rule]:
    """DiT's rules, then the routers and unit tables."""
    layers, heads = range(config["num_layers"]), config["num_attention_heads"]
    channels = 4 * heads * config["attention_head_dim"]
    rules = timestep_rules([EMBEDDER]) + class_rules([EMBEDDER]) + network_rules(config)
    for original, ours in _WIDTHS.items():
        for s in ("weight", "bias"):
            rules.append(Stack(tuple(f"blocks.{i}.{original}.router.{s}" for i in layers), (f"dy_width.{ours}.{s}",)))
    for i in layers:
        block = f"transformer_blocks.{i}"
        rules += rename(f"blocks.{i}.token_selection.mlp_head.0", f"{block}.dy_token.down")
        rules += rename(f"blocks.{i}.token_selection.mlp_head.2", f"{block}.dy_token.up")
        rules += contiguous_units(block, heads, {"dy_channel_unit": channels})
    return rules


DYDIT = Layout(
    title="DyDiT",
    target="DyDiTTransformer2DModel",
    config=dydit_config,
    rules=dydit_rules,
    settings={
        **ORIGINAL,
        "dynamic.heads": True,
        "dynamic.mlp": True,
        "dynamic.tokens": True,
        "dynamic.token_router": "dit",
    },
)
