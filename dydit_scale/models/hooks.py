"""What diffusers hangs onto a model (caches, offloading, casting, adapters), made to work with dynamic blocks and
packed sub-networks, or refused with a reason where it would silently compute something else."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any, ClassVar

from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LatteTransformer3DModel,
    MagCacheConfig,
    ModelMixin,
    SeaCacheConfig,
)
from diffusers.hooks import HookRegistry
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import TensorParallelConfig
from torch import nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.precise import UpcastLinear

ADAPTER_CHANGES = (
    "load_lora_adapter",
    "add_adapter",
    "set_adapter",
    "set_adapters",
    "enable_adapters",
    "disable_adapters",
    "enable_lora",
    "disable_lora",
    "delete_adapters",
    "unload_lora",
    "fuse_lora",
    "unfuse_lora",
)
"""Methods of diffusers' PeftAdapterMixin after which packed sub-networks would hold other weights than the model."""


class HookedModelMixin:
    """The part of a dynamic model that diffusers' conveniences go through; it stands before the diffusers class."""

    _plan: Any = None
    _cache_guard: Any = None
    static_class: ClassVar[type[ModelMixin]]
    dynamic: DynamicConfig

    def enable_cache(self, config: Any) -> None:
        """diffusers' caches. Those of whole blocks (FirstBlockCache, MagCache, SeaCache, TaylorSeer's lite mode) act on
        packed sub-networks too, in either order of the two calls.

        Raises:
            ValueError: the cache acts on nothing here, or would silently compute something else.
        """
        before = _hooks(self)
        super().enable_cache(config)  # type: ignore[misc]
        try:
            self._check_cache(config, {k: module for k, module in _hooks(self).items() if k not in before})
        except ValueError:
            super().disable_cache()  # type: ignore[misc]
            raise
        self._cache_guard = self.register_forward_pre_hook(_refuse_masks, with_kwargs=True)  # type: ignore[attr-defined]
        self._pack_again()

    def disable_cache(self) -> None:
        """Remove the cache, from packed sub-networks too."""
        super().disable_cache()  # type: ignore[misc]
        if self._cache_guard is not None:
            self._cache_guard.remove()
            self._cache_guard = None
            self._pack_again()

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' group offloading of the masked model.

        Raises:
            ValueError: the model is packed.
        """
        self._refuse_packed("enable_group_offload", "the cut weights stay where they are")
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc]

    def enable_layerwise_casting(self, *args: Any, skip_modules_classes: Any = None, **kwargs: Any) -> None:
        """diffusers' layerwise casting; routers and the timestep embedding that they read keep their precision.

        Raises:
            ValueError: the model is packed.
        """
        self._refuse_packed("enable_layerwise_casting", "the cut weights would not be cast")
        skipped = (*(skip_modules_classes or ()), UpcastLinear)
        super().enable_layerwise_casting(*args, skip_modules_classes=skipped, **kwargs)  # type: ignore[misc]

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """diffusers' context parallelism, where the static class has a plan for it.

        Raises:
            ValueError: tensor parallelism, a model without a plan, a router that reads all text tokens, or a packed
                model.
        """
        name = type(self).__name__
        if isinstance(config, TensorParallelConfig) or getattr(config, "tensor_parallel_config", None) is not None:
            raise ValueError(
                f"{name}: tensor parallelism splits heads and channels over ranks, and their masks with it, which is "
                "not implemented; use to_static(), or FSDP2, which splits weights only"
            )
        if cp_plan is None and self._cp_plan is None:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: {self.static_class.__name__} has no context parallel plan")
        if self.dynamic.tokens and self.dynamic.token_router == "flux":
            raise ValueError(
                f"{name}: the token router 'flux' reads the mean of all text tokens, of which context parallelism "
                "gives each rank a part; train with dynamic.token_router=dit for it"
            )
        self._refuse_packed("enable_parallelism", "Ulysses exchanges equally many heads between ranks")
        super().enable_parallelism(config=config, cp_plan=cp_plan)  # type: ignore[misc]

    def fuse_qkv_projections(self) -> None:
        """Refused: fused projections would bypass adapters, and cannot be cut by head."""
        raise ValueError("a dynamic model cuts q, k and v by head; do not fuse them")

    # For pack
    def _check_packable(self) -> None:
        """ValueError if something hangs on the model that packed copies of its blocks would not follow."""
        if getattr(self, "_parallel_config", None) is not None:
            raise ValueError("pack: a context parallel model runs masked; Ulysses exchanges equally many heads")
        if _is_group_offload_enabled(self):
            raise ValueError(
                "pack: the model's weights are offloaded in groups, which cut copies would not follow; load it without "
                "enable_group_offload, or sample without packing"
            )
        for block in self.dynamic_blocks():  # type: ignore[attr-defined]
            for module in block.modules():
                if _is_wrapped(module) and (module is not block or hasattr(module, "_hf_hook")):
                    raise ValueError(
                        f"pack: {type(module).__name__} has a hook around its forward (a cache, offloading, casting), "
                        "which packed copies would not follow; pack before you set it, or sample without packing"
                    )

    def _pack_again(self) -> None:
        if self._plan is not None:
            build, wishes = type(self._plan).build, self._plan.wishes  # the plan's copies go before new ones come
            self.unpack()  # type: ignore[attr-defined]
            gc.collect()  # hooks and their blocks refer to each other
            object.__setattr__(self, "_plan", build(self, **wishes))

    def _refuse_packed(self, method: str, reason: str) -> None:
        if self._plan is not None:
            raise ValueError(f"{method}: the model is packed, and {reason}; unpack() it first")

    def _check_cache(self, config: Any, hooked: dict[tuple[str, str], nn.Module]) -> None:
        kind = type(config).__name__
        blocks = self.dynamic_blocks()  # type: ignore[attr-defined]
        if not any(name for name, _ in hooked):
            raise ValueError(
                f"enable_cache: {kind} finds no module of {type(self).__name__} to act on; name them in the config "
                "(TaylorSeer: cache_identifiers)"
            )
        if isinstance(config, (FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig)):
            lists = [m for n, m in self.named_children() if n in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS]  # type: ignore[attr-defined]
            if [block for blocks in lists for block in blocks] != blocks:
                raise ValueError(
                    f"enable_cache: {kind} takes the first block's input from the last one's output, but the blocks of "
                    f"{type(self).__name__} alternate between two layouts; use PyramidAttentionBroadcast"
                )
        if (
            isinstance(config, FasterCacheConfig)
            and not config.is_guidance_distilled
            and self.static_class is not LatteTransformer3DModel
        ):
            raise ValueError(
                f"enable_cache: {kind} would leave out the unconditional half of a batch, which only Latte's pipeline "
                "orders as it expects; set is_guidance_distilled=True, which caches attention only"
            )
        inside = {id(m) for block in blocks for m in block.modules()} - {id(block) for block in blocks}
        found = [name for (name, _), module in hooked.items() if id(module) in inside]
        if found and self._plan is not None:
            raise ValueError(
                f"enable_cache: {kind} acts inside blocks (first {found[0]}), which packed sub-networks replace; use a "
                "cache of whole blocks such as FirstBlockCache, or unpack() first"
            )


def _forgetting(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(PeftAdapterMixin, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._drop(f"{name} changes the weights")
        return getattr(super(HookedModelMixin, self), name)(*args, **kwargs)

    return method


for _name in ADAPTER_CHANGES:
    setattr(HookedModelMixin, _name, _forgetting(_name))


def copy_hooks(block: nn.Module, packed: nn.Module) -> None:
    """Hang the hooks of a block onto its packed copy. What they remember is shared, so that a cache filled by one
    step's sub-network serves the next step's."""
    if (registry := getattr(block, "_diffusers_hook", None)) is not None:
        for name in registry._hook_order:
            HookRegistry.check_if_exists_or_initialize(packed).register_hook(copy.copy(registry.hooks[name]), name)


def _hooks(model: Any) -> dict[tuple[str, str], nn.Module]:
    """(module, hook) names and the module, of all hooks of diffusers."""
    return {
        (name, hook): module
        for name, module in model.named_modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks
    }


def _is_wrapped(module: nn.Module) -> bool:
    """Whether something has replaced the module's forward; removing a hook leaves the original there."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _refuse_masks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("collect"):
        raise ValueError("collect: a block that the cache leaves out has no masks; disable_cache() first")
