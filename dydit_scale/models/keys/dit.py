"""facebookresearch's DiT and SiT (one layout) against diffusers' DiTTransformer2DModel.

diffusers keeps the timestep and class embedders in every block, has q, k and v apart, and computes the positions. Its
class embeds timesteps with ``downscale_freq_shift=1`` where the original has 0, so the static class deviates from the
original although every weight is right; ``time_freq_shift`` in ``config.json`` records the original's value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffusers.models.embeddings import get_2d_sincos_pos_embed

from dydit_scale.models.keys.layout import Config, Layout, Tensors, depth, divided, shape
from dydit_scale.models.keys.rules import Computed, Replicate, Rule, rename, split


def published_heads(dim: int) -> int:
    """Heads of the published sizes (DiT table 1): 72 channels each in XL, 64 in S, B and L. ValueError for others."""
    head_dim = 72 if dim == 1152 else 64
    if dim % head_dim:
        raise ValueError(
            f"no published size has {dim} channels, and the file does not say its number of heads: --heads"
        )
    return dim // head_dim


def sizes(tensors: Tensors, heads: int | None) -> Config:
    """The fields of ``config.json`` that say how large a DiT or Latte is, from shapes."""
    dim, channels, patch, _ = shape(tensors, "x_embedder.proj.weight", 4)
    grid = math.isqrt(shape(tensors, "pos_embed", 3)[1])
    heads = heads or published_heads(dim)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": divided(dim, heads),
        "in_channels": channels,
        "out_channels": shape(tensors, "final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": depth(tensors, "blocks"),
        "sample_size": grid * patch,
        "patch_size": patch,
    }


def classes(tensors: Tensors) -> int:
    """How many classes the table has, without the one that stands for none."""
    return shape(tensors, "y_embedder.embedding_table.weight", 2)[0] - 1


def dit_config(tensors: Tensors, heads: int | None) -> Config:
    """``config.json`` of a DiTTransformer2DModel, from shapes."""
    return {
        "_class_name": "DiTTransformer2DModel",
        **sizes(tensors, heads),
        "num_embeds_ada_norm": classes(tensors),
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        **ORIGINAL,
    }


def dit_rules(config: Config) -> list[Rule]:
    """All of diffusers' model, with embedders in every block."""
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(config["num_layers"])]
    return timestep_rules(embedders) + class_rules(embedders) + network_rules(config)


def timestep_rules(places: Sequence[str]) -> list[Rule]:
    """The embedder of timesteps, equal in all ``places``."""
    names = {
        f"{original}.{s}": f"{ours}.{s}"
        for original, ours in (("t_embedder.mlp.0", "linear_1"), ("t_embedder.mlp.2", "linear_2"))
        for s in ("weight", "bias")
    }
    return [Replicate((o,), tuple(f"{p}.timestep_embedder.{name}" for p in places)) for o, name in names.items()]


def class_rules(places: Sequence[str]) -> list[Rule]:
    """The table of classes, equal in all ``places``."""
    table = "embedding_table.weight"
    return [Replicate((f"y_embedder.{table}",), tuple(f"{p}.class_embedder.{table}" for p in places))]


def network_rules(config: Config) -> list[Rule]:
    """Everything but those embedders: the patches, the final layer, then each block."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    grid = config["sample_size"] // config["patch_size"]
    rules: list[Rule] = [
        *rename("x_embedder.proj", "pos_embed.proj"),
        Computed(
            ("pos_embed",),
            (),
            lambda: get_2d_sincos_pos_embed(dim, grid, base_size=grid, output_type="pt").float()[None],
            "diffusers computes the positions and cannot keep others",
        ),
        *rename("final_layer.adaLN_modulation.1", "proj_out_1"),
        *rename("final_layer.linear", "proj_out_2"),
    ]
    for i in range(config["num_layers"]):
        original, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        rules += split(f"{original}.attn.qkv", [f"{ours}.attn1.to_{x}" for x in "qkv"], (1, 1, 1))
        rules += rename(f"{original}.attn.proj", f"{ours}.attn1.to_out.0")
        rules += rename(f"{original}.mlp.fc1", f"{ours}.ff.net.0.proj")
        rules += rename(f"{original}.mlp.fc2", f"{ours}.ff.net.2")
        rules += rename(f"{original}.adaLN_modulation.1", f"{ours}.norm1.linear")
    return rules


ORIGINAL: Config = {"norm_eps": 1e-6, "time_freq_shift": 0.0}
"""Settings that the original's weights were trained with, and its loaders take for granted."""
EMBEDDER = "time_class_embed"
"""Of our class: timestep and class are embedded once."""
DIT = Layout(
    title="DiT or SiT (facebookresearch)",
    target="DiTTransformer2DModel",
    config=dit_config,
    rules=dit_rules,
    note="diffusers' static class embeds timesteps with a frequency shift of 1, the original with 0, so its output is "
    "not the original's; DiT and SiT have the same names, and the file does not say for which objective it was trained",
)
DIT_COMPLETE = Layout(
    title=DIT.title,
    target="DyDiTTransformer2DModel",
    config=dit_config,
    rules=lambda config: timestep_rules([EMBEDDER]) + class_rules([EMBEDDER]) + network_rules(config),
    settings={**ORIGINAL, "dynamic.heads": False, "dynamic.mlp": False, "dynamic.tokens": False},
)
"""The same file as our class with nothing dynamic in it, the form in which DiT and SiT are trained."""
