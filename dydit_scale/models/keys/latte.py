"""Vchitect's class-conditional and unconditional Latte against our ClassLatteTransformer3DModel.

The names are DiT's and a table of positions in time, ``temp_embed``; an unconditional file has no ``y_embedder``.
Blocks stand in one list on both sides, spatial and temporal in turn. (Latte-1, text to video, is published in
diffusers' layout.)
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

from dydit_scale.models.keys.dit import class_rules, classes, network_rules, sizes, timestep_rules
from dydit_scale.models.keys.layout import Config, Layout, Tensors, shape
from dydit_scale.models.keys.rules import Computed, Rule

_EMBEDDER = "time_class_embed"


def latte_config(tensors: Tensors, heads: int | None) -> Config:
    """``config.json`` of a ClassLatteTransformer3DModel, from shapes."""
    conditional = any(name.startswith("y_embedder.") for name in tensors)
    return {
        "_class_name": "ClassLatteTransformer3DModel",
        **sizes(tensors, heads),
        "num_classes": classes(tensors) if conditional else None,
        "video_length": shape(tensors, "temp_embed", 3)[1],
    }


def latte_rules(config: Config) -> list[Rule]:
    """DiT's rules, with one embedder, and the positions in time."""
    dim, frames = config["num_attention_heads"] * config["attention_head_dim"], config["video_length"]
    in_time = Computed(
        ("temp_embed",),
        (),
        lambda: get_1d_sincos_pos_embed_from_grid(dim, torch.arange(frames), output_type="pt").float()[None],
        "the class computes the positions in time and cannot keep others",
    )
    labels = [] if config["num_classes"] is None else class_rules([_EMBEDDER])
    return timestep_rules([_EMBEDDER]) + labels + [in_time] + network_rules(config)


LATTE = Layout(
    title="Latte, class-conditional or unconditional (Vchitect)",
    target="ClassLatteTransformer3DModel",
    config=latte_config,
    rules=latte_rules,
    wrapper="ema",
)
