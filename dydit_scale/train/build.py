"""From a recipe to the network that it trains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import nn

from dydit_scale.adapters.td_lora import TDLoraConfig, add_td_lora, is_dynamic_name
from dydit_scale.models.family import Family
from dydit_scale.models.loading import family_of_base, load_pipeline, load_transformer
from dydit_scale.parallel.engine import ParamGroup
from dydit_scale.train.frozen import decides_width
from dydit_scale.train.objective import sample_size
from dydit_scale.train.recipe import AdapterConfig, Recipe


class Parts(NamedTuple):
    """A run's network and what surrounds it."""

    network: Any
    """The transformer that learns: dynamic or static, adapters in place, fp32, frozen where the recipe says so."""
    pipeline: Any
    """The rest of the pipeline, with ``network`` as its transformer."""
    teacher: Any
    """The frozen static model to distil from, where it is not the network itself with its adapters off; or None."""


def build_parts(recipe: Recipe, *, text_encoders: bool = True) -> Parts:
    """Load the base and make of it what the recipe trains; the same tensors on every rank, device CPU.

    Args:
        text_encoders: False leaves them out of the pipeline.

    Raises ValueError if the base does not fit, or the target ratio is below what the architecture can reach.
    """
    dtype = frozen_dtype(recipe)
    family = family_of_base(recipe.model.base)
    pipeline = load_pipeline(recipe.model.base, family, dtype, text_encoders=text_encoders)
    torch.manual_seed(recipe.seed)  # fresh weights (from_scratch, plain LoRA) are equal on every rank
    network = load_transformer(recipe.model.base, family, from_scratch=recipe.model.from_scratch)
    network = trainable_network(recipe, family, network)
    teacher = None
    if has_teacher(recipe):
        teacher = load_transformer(recipe.model.base, family).requires_grad_(False).eval().to(dtype)
    pipeline.register_modules(transformer=network)
    _check_size_and_target(recipe, family, network, pipeline)
    return Parts(network, pipeline, teacher)


def frozen_dtype(recipe: Recipe) -> torch.dtype:
    """Of everything that does not learn."""
    return torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32


def has_teacher(recipe: Recipe) -> bool:
    """Whether a second, static network is distilled from; of an adapter, or of routers alone, the network itself is
    the teacher."""
    distils = recipe.dynamic is not None and recipe.supervision.kind == "distill"
    return distils and recipe.adapter.kind == "none"


def trainable_network(recipe: Recipe, family: Family, network: Any) -> Any:
    """Of a static network in fp32 the one that the recipe trains: dynamic or not, adapters in place, frozen where the
    recipe says so."""
    if recipe.dynamic is not None:
        network = family.dynamic_class.from_static(network, recipe.dynamic, seed=recipe.seed)
    network.requires_grad_(recipe.adapter.kind == "none")
    for name, parameter in network.named_parameters():
        if is_dynamic_name(name):
            parameter.requires_grad_(True)
    if network.config.get("guidance_embeds"):
        network.time_text_embed.guidance_embedder.requires_grad_(False)
    add_adapter(network, recipe.adapter, recipe.seed)
    for parameter in network.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(frozen_dtype(recipe))
    return network


def add_adapter(network: nn.Module, config: AdapterConfig, seed: int) -> None:
    """Put the recipe's adapter into the network; only adapters and routers stay trainable then."""
    alpha: Any = config.rank if config.alpha is None else config.alpha
    if config.kind == "td_lora":
        add_td_lora(
            network,
            TDLoraConfig(
                target_modules=config.targets,
                rank=config.rank,
                alpha=alpha,
                experts=config.experts,
                gate=config.gate,
                gate_scope=config.gate_scope,
                seed=seed,
            ),
        )
    elif config.kind == "lora":
        routers = [p for name, p in network.named_parameters() if is_dynamic_name(name)]
        lora = LoraConfig(
            r=config.rank, lora_alpha=alpha, target_modules=config.targets,
            use_rslora=config.variant == "rslora", use_dora=config.variant == "dora",
        )  # fmt: skip
        network.add_adapter(lora)  # type: ignore[operator]
        for parameter in routers:
            parameter.requires_grad_(True)


def param_groups(recipe: Recipe, network: nn.Module) -> list[ParamGroup]:
    """Trainable parameters: routers and adapter gates learn at ``router_lr``, everything else at ``lr``. What
    ``frozen_routers`` will hold still is in groups of its own."""
    train, freeze = recipe.train, recipe.frozen_routers
    groups: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            kind = "routers" if is_dynamic_name(name) or ".td_router." in name else "weights"
            freezes = decides_width(name) or (freeze.tokens and ".dy_token." in name)
            groups.setdefault((kind, freeze.from_step is not None and freezes), {})[name] = parameter
    settings = {"weights": (train.lr, train.weight_decay), "routers": (train.router_lr or train.lr, 0.0)}
    return [
        ParamGroup(
            name=f"{kind} to freeze" if freezes else kind, params=groups[kind, freezes], lr=lr, weight_decay=decay,
            freezes=freezes,
        )
        for kind, (lr, decay) in settings.items()
        for freezes in (False, True)
        if (kind, freezes) in groups
    ]  # fmt: skip


def shard_units(network: nn.Module) -> list[nn.Module]:
    """The blocks, which FSDP gathers one at a time."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]


def _check_size_and_target(recipe: Recipe, family: Family, network: Any, pipeline: Any) -> None:
    size = sample_size(recipe)
    family.image_tokens(pipeline, size)
    if recipe.data.buckets and (over := recipe.data.bucket_step % (side := family.token_side(pipeline))):
        raise ValueError(
            f"data.bucket_step {recipe.data.bucket_step}: expected a multiple of {side} pixels, the side of one token; "
            f"take {recipe.data.bucket_step + side - over}"
        )
    drawn = family.clip_lengths(network.config)[0]
    if size.frames != drawn:
        raise ValueError(
            f"data.frames {size.frames}: the model makes clips of {drawn}; set data.frames to that. A source of single "
            "pictures has frames of its own"
        )
    if recipe.dynamic is None:
        return
    cost = family.cost(network, pipeline, size, recipe.model.text_tokens)
    d = network.dynamic
    heads = network.config["num_attention_heads"]
    floor = cost.floor(heads if d.heads else 1, (d.mlp_groups or heads) if d.mlp else 1, tokens=d.tokens)
    if recipe.cost.target < floor:
        raise ValueError(
            f"cost.target {recipe.cost.target}: with one head and one MLP group per block, and no image token in any "
            f"MLP, this model still costs {floor:.3f} of the static one; choose a target between that and 1"
        )
