"""FLUX.1 in one file (black-forest-labs' names) against diffusers' FluxTransformer2DModel.

q, k and v are fused in the original, in single blocks together with the MLP's first layer; the final modulation is
(shift, scale) there and (scale, shift) in diffusers.
"""

from __future__ import annotations

from dydit_scale.models.keys.layout import Config, Layout, Tensors, depth, divided, shape
from dydit_scale.models.keys.rules import Rule, SwapHalves, rename, split


def rope_axes(head_dim: int) -> list[int]:
    """Rotary channels of the three axes, in FLUX.1's proportion 16 : 56 : 56. They are in no weight's shape; ValueError
    where the proportion does not give even numbers."""
    if head_dim % 32:
        raise ValueError(
            f"heads of {head_dim} channels: the rotary axes are not in the file, and FLUX's need a multiple of 32"
        )
    return [head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16]


def flux_config(tensors: Tensors, heads: int | None) -> Config:
    """``config.json`` of a FluxTransformer2DModel, from shapes; the heads are in the shape of the query's norm."""
    dim, channels = shape(tensors, "img_in.weight", 2)
    (head_dim,) = shape(tensors, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shape(tensors, "final_layer.linear.weight", 2)[0],
        "num_layers": depth(tensors, "double_blocks"),
        "num_single_layers": depth(tensors, "single_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": checked_heads(dim, head_dim, heads),
        "joint_attention_dim": shape(tensors, "txt_in.weight", 2)[1],
        "pooled_projection_dim": shape(tensors, "vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": any(name.startswith("guidance_in.") for name in tensors),
        "axes_dims_rope": rope_axes(head_dim),
    }


def checked_heads(dim: int, head_dim: int, heads: int | None) -> int:
    """Heads from the width of one. ValueError if the user's number is another."""
    found = divided(dim, head_dim)
    if heads not in (None, found):
        raise ValueError(f"--heads {heads}: the file has {found} heads of {head_dim} channels")
    return found


def flux_rules(config: Config) -> list[Rule]:
    """The embedders and the final layer, then double and single blocks."""
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    if not config["guidance_embeds"]:
        del embedders["guidance_in"]
    rules = [*rename("img_in", "x_embedder"), *rename("txt_in", "context_embedder")]
    for original, ours in embedders.items():
        rules += rename(f"{original}.in_layer", f"time_text_embed.{ours}.linear_1")
        rules += rename(f"{original}.out_layer", f"time_text_embed.{ours}.linear_2")
    for s in ("weight", "bias"):
        rules.append(SwapHalves((f"final_layer.adaLN_modulation.1.{s}",), (f"norm_out.linear.{s}",)))
    rules += rename("final_layer.linear", "proj_out")
    for i in range(config["num_layers"]):
        rules += _double(f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(config["num_single_layers"]):
        rules += _single(f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    return rules


def _double(original: str, ours: str) -> list[Rule]:
    attn = f"{ours}.attn"
    return [
        *rename(f"{original}.img_mod.lin", f"{ours}.norm1.linear"),
        *rename(f"{original}.txt_mod.lin", f"{ours}.norm1_context.linear"),
        *split(f"{original}.img_attn.qkv", [f"{attn}.to_{x}" for x in "qkv"], (1, 1, 1)),
        *split(f"{original}.txt_attn.qkv", [f"{attn}.add_{x}_proj" for x in "qkv"], (1, 1, 1)),
        *_scale(f"{original}.img_attn.norm.query_norm", f"{attn}.norm_q"),
        *_scale(f"{original}.img_attn.norm.key_norm", f"{attn}.norm_k"),
        *_scale(f"{original}.txt_attn.norm.query_norm", f"{attn}.norm_added_q"),
        *_scale(f"{original}.txt_attn.norm.key_norm", f"{attn}.norm_added_k"),
        *rename(f"{original}.img_attn.proj", f"{attn}.to_out.0"),
        *rename(f"{original}.txt_attn.proj", f"{attn}.to_add_out"),
        *rename(f"{original}.img_mlp.0", f"{ours}.ff.net.0.proj"),
        *rename(f"{original}.img_mlp.2", f"{ours}.ff.net.2"),
        *rename(f"{original}.txt_mlp.0", f"{ours}.ff_context.net.0.proj"),
        *rename(f"{original}.txt_mlp.2", f"{ours}.ff_context.net.2"),
    ]


def _single(original: str, ours: str) -> list[Rule]:
    fused = [*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp"]
    return [
        *rename(f"{original}.modulation.lin", f"{ours}.norm.linear"),
        *split(f"{original}.linear1", fused, (1, 1, 1, 4)),
        *_scale(f"{original}.norm.query_norm", f"{ours}.attn.norm_q"),
        *_scale(f"{original}.norm.key_norm", f"{ours}.attn.norm_k"),
        *rename(f"{original}.linear2", f"{ours}.proj_out"),
    ]


def _scale(original: str, ours: str) -> list[Rule]:
    return [Rule((f"{original}.scale",), (f"{ours}.weight",))]


FLUX = Layout(
    title="FLUX.1 (black-forest-labs)",
    target="FluxTransformer2DModel",
    config=flux_config,
    rules=flux_rules,
)
