"""What of a block's activations is kept for the backward pass, and what is computed a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dydit_scale.adapters.td_lora import checkpoint_with_timestep

_aten = torch.ops.aten
_ATTENTION = tuple(
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
    )
    if hasattr(_aten, name)
)
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)


def checkpoint_function(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    kind: Literal["full", "selective"],
    every: int = 1,
    *,
    carry_timestep: bool = False,
) -> Callable[..., Any]:
    """What ``network.enable_gradient_checkpointing`` takes: recomputes every ``every``-th of ``blocks``.

    Args:
        kind: "selective" keeps what attention and every second product of matrices gave, as torchtitan does.
        carry_timestep: For static networks with TD-LoRA, whose layers ask for the timestep embedding again.
    """
    options = {"context_fn": _selective} if kind == "selective" else {}
    run = checkpoint_with_timestep(network, **options) if carry_timestep else partial(_run, options)
    number = {id(block): n for n, block in enumerate(blocks)}

    def recomputed(block: nn.Module, *args: Any) -> Any:
        # a bound method stands for its module
        owner = getattr(block, "__self__", block)
        return block(*args) if number.get(id(owner), 0) % every else run(block, *args)

    return recomputed


def _run(options: dict[str, Any], block: nn.Module, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, **options)


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy())  # one of its own for each block, for it counts


def _policy() -> Callable[..., CheckpointPolicy]:
    """Counts products apart in the forward and in the recomputation, so that both keep the same ones."""
    products: Counter[bool] = Counter()

    def decide(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = op in _ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return decide
