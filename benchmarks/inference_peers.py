"""What benchmarks/inference.py sets beside dynamic models: diffusers' caches, a fixed number of tokens, merged ones."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.dynamic.fused_tokens import fixed_rows


class Skipped(Exception):
    """A variant that cannot be measured here, and why."""


class CacheableDiT(DiTTransformer2DModel, CacheMixin):
    """diffusers' DiT with diffusers' caches, which its class does not offer."""


class EveryOther(float):
    """A threshold that FirstBlockCache finds exceeded at every second step, whatever it compares: on random weights its
    own verdict would mean nothing."""

    exceeded = False

    def __lt__(self, difference: float) -> bool:
        verdict, self.exceeded = self.exceeded, not self.exceeded
        return verdict


def cache_config(kind: str, steps: int, *, few: bool) -> Any:
    """A cache that leaves out every second step or (``few``) decides as diffusers' defaults have it."""
    blocks, out = [r"(single_)?transformer_blocks\.\d+"], [r"proj_out(_2)?"]
    if kind == "fbc":
        return FirstBlockCacheConfig() if few else FirstBlockCacheConfig(threshold=EveryOther())
    if kind == "taylor":
        often = {} if few else {"cache_interval": 2, "disable_cache_before_step": 1}
        return TaylorSeerCacheConfig(skip_predict_identifiers=blocks, cache_identifiers=out, **often)
    if kind == "mag":
        return MagCacheConfig(
            mag_ratios=[1.0] * steps, num_inference_steps=steps, max_skip_steps=1, retention_ratio=0.0
        )
    raise ValueError(f"cache {kind!r}: expected fbc, taylor or mag")


def cacheable(static: Any) -> Any:
    """A twin of the static model that diffusers' caches can be enabled on."""
    twin = twin_of(static)
    if type(twin) is DiTTransformer2DModel:
        twin.__class__ = CacheableDiT
    return twin


def twin_of(model: Any) -> Any:
    """The model again as modules of its own, which share its tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a static or dynamic model, in order."""
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


@contextmanager
def watched_blocks(model: Any) -> Iterator[list[int]]:
    """The numbers of the blocks as they compute, seen by a part of each: the token router, which packed blocks share,
    or in a static model the first norm."""
    ran: list[int] = []
    parts = [next(getattr(b, n) for n in ("dy_token", "norm1", "norm") if hasattr(b, n)) for b in blocks_of(model)]
    hooks = [part.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, part in enumerate(parts)]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def counted_macs(run: Callable[[], Any]) -> float:
    """MACs as torch counts them; attention runs as plain products for that, because fused kernels may count as none."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


class FixedK(nn.Module):
    """A feed-forward on the k tokens of each sample with the largest scores; the others get zeros."""

    def __init__(self, ff: Any, k: int) -> None:
        super().__init__()
        weight = ff.net[2].weight
        self.ff, self.k = ff, k
        self.score = nn.Linear(weight.shape[0], 1, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim]"""
        rows, flat = fixed_rows(self.score(x).squeeze(-1), self.k), x.flatten(0, 1)
        return torch.zeros_like(flat).index_copy_(0, rows, self.ff(flat.index_select(0, rows))).view_as(x)


def with_fixed_k(static: Any, cost: ModelCost, tokens: int, target: float) -> Any:
    """A twin whose MLPs see equally many tokens in every block and step, at a cost of ``target``.

    Raises:
        Skipped: MLPs cannot leave out so much, or are no modules of their own.
    """
    twin = twin_of(static)
    if not all(hasattr(block, "ff") for block in blocks_of(twin)):
        raise Skipped("the MLP of a single block is no module of its own that could be given fewer tokens")
    mlp = sum(block.groups_tokens for block in cost.blocks) / cost.static
    k = round(tokens * (1 - (1 - target) / mlp))
    if k < 1:
        raise Skipped(f"without any MLP a ratio of {1 - mlp:.2f} is left, which is more than {target}")
    torch.manual_seed(0)
    for block in blocks_of(twin):
        block.ff = FixedK(block.ff, k)
    return twin


def with_merged_tokens(static: Any, target: float) -> Any:
    """A twin whose attention and MLPs see tokens merged by tomesd, so many fewer as ``target`` asks for.

    Raises:
        Skipped: not a DiT, or tomesd is not installed.
    """
    if type(static) is not DiTTransformer2DModel:
        raise Skipped("it patches the blocks of U-Nets, which only diffusers' DiT shares")
    try:
        tomesd = importlib.import_module("tomesd")
    except ImportError as error:
        raise Skipped("not installed: pip install tomesd") from error
    at_most = 0.75  # it keeps one of each 2 x 2 tokens
    return tomesd.apply_patch(twin_of(static), ratio=min(at_most, 1 - target), max_downsample=2, merge_mlp=True)
