"""Where the parts of packed blocks keep their weights: copies, views of one copy in a better order, or of the model.

A speed for memory bargain, struck for all layers at once under a budget.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dydit_scale.dynamic.kernel_layout import KernelLinear, has_kernel_layout
from dydit_scale.dynamic.packing import effective_weight, is_adapted, members_of
from dydit_scale.dynamic.weight_only import Kind, is_plain
from dydit_scale.models.parts import MLPPart, Part, Source, with_experts

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells what a container may use."""
Storage = Literal["own", "shared", "in place"]
"""``own``: each distinct part has its weights, fused and, on a CPU, in its kernel's layout. ``shared``: one copy of all
units that ever work, in an order in which most parts are runs of it, hence views. ``in place``: slices of the model's
own weights, views where its units lie together."""


class PartStore:
    """The parts of one attention or MLP for all steps of a schedule.

    Args:
        masks: which units work at each step, on the CPU; None: all at every step.
        kernel_layout: whether weights of its own may take the layout of the machine's kernels, if these have one.
        weights: keep weights of its own in 8 bits; nothing is shared or in place then.
        fused_tokens: whether MLPs run fused kernels for their chosen tokens where they can.
    """

    def __init__(
        self,
        source: Source,
        masks: Bool[Tensor, "steps units"] | None,
        *,
        kernel_layout: bool = True,
        weights: Kind | None = None,
        fused_tokens: bool = False,
    ) -> None:
        self.source = source
        self.masks = masks
        self.patterns: dict[bytes, Bool[Tensor, " units"]] = {}
        if masks is not None:
            self.patterns = {mask.numpy().tobytes(): mask for mask in masks}
        self.order = _order(masks) if masks is not None else None
        self.storage: Storage = "in place"
        self.weights, self.fused_tokens = weights, fused_tokens
        self.layers: list[Any] = [getattr(layer, "layer", layer) for layer in source.layers]
        """What is cut; their adapters and columns included."""
        bases: list[Any] = [
            layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in self.layers
        ]
        is_quantised = any(not is_plain(getattr(m, "weight", None)) for m in bases)
        weight = effective_weight(source.layers[0], None) if is_quantised else bases[0].weight
        self.device, self.itemsize = weight.device, weight.itemsize
        self.has_kernel_layout = kernel_layout and not weights and has_kernel_layout(weight.device, weight.dtype)
        self.is_made = is_quantised or any(map(is_adapted, self.layers))
        """Whether the weights that are cut are made for it: dequantised, or with adapters folded in."""
        self.folded = False
        """Whether TD-LoRA's experts are folded into weights of each step's own."""
        self.has_experts = any(hasattr(getattr(m, "layer", m), "low_rank_at") for m in source.layers)
        self._parts: dict[tuple, Part] = {}
        self._home: Part | None = None

    # What it would take
    def bytes_as(self, storage: Storage, *, folded: bool = False) -> int:
        """Memory of the copies."""
        if self.weights and storage != "own":
            return sys.maxsize // 2**20  # never chosen
        unit = self.source.unit_bytes(1 if self.weights else self.itemsize)
        if folded:
            return sum(unit * int(mask.sum()) for mask in self._steps())
        sizes = {key: unit * int(mask.sum()) for key, mask in self._distinct().items()}
        if storage == "own" or (storage == "shared" and self.order is None):
            return sum(sizes.values())
        if storage == "shared" and self.order is not None:
            alone = sum(sizes[key] for key, mask in self.patterns.items() if _run(mask, self.order) is None)
            return unit * len(self.order) + alone
        return sum(size for key, size in sizes.items() if not self._lies_in_place(key))

    def _steps(self) -> Sequence[Bool[Tensor, " units"]]:
        return [self._all()] if self.masks is None else list(self.masks)

    def _distinct(self) -> dict[bytes, Bool[Tensor, " units"]]:
        return self.patterns or {b"": self._all()}

    def _all(self) -> Bool[Tensor, " units"]:
        return torch.ones(int(self.source.unit_of.max()) + 1, dtype=torch.bool)

    def _lies_in_place(self, key: bytes) -> bool:
        if self.is_made:
            return False
        if not self.patterns or bool(self.patterns[key].all()):
            return True
        members = members_of(self._ascending(key), self.source.unit_of)
        return bool((members.diff() == 1).all())

    def _ascending(self, key: bytes) -> Int64[Tensor, " active"]:
        return self.patterns[key].nonzero().squeeze(1)

    # The parts
    def at(self, step: int, t_emb: Float[Tensor, "1 dim"]) -> Part:
        """The part of one step; the same object for steps whose parts are equal."""
        key = b"" if self.masks is None else self.masks[step].numpy().tobytes()
        if self.has_experts:
            if (key, step) not in self._parts:
                made = self._cut(key, t_emb) if self.folded else with_experts(self._part(key), t_emb)
                self._parts[key, step] = made
            return self._parts[key, step]
        return self._part(key)

    def _part(self, key: bytes) -> Part:
        if (key,) not in self._parts:
            run = None
            if self.storage == "shared" and self.order is not None:
                run = _run(self.patterns[key], self.order)
            if run is None:
                self._parts[(key,)] = self._cut(key, None)
            else:
                if self._home is None:
                    self._home = self._with_kernels(self.source.part(self.order, fused=True, t_emb=None))
                self._parts[(key,)] = self._home.narrowed(*run)
        return self._parts[(key,)]

    def _cut(self, key: bytes, t_emb: Float[Tensor, "1 dim"] | None) -> Part:
        whole = not self.patterns or bool(self.patterns[key].all())
        units = None if whole else self._ascending(key)
        part = self.source.part(units, fused=self.storage != "in place", t_emb=t_emb)
        if self.weights and (units is None or len(units)):
            part = part.compressed(self.weights)
        elif self.storage == "own" and self.has_kernel_layout and (units is None or len(units)):
            part = part.in_kernel_layout()
        return self._with_kernels(part)

    def _with_kernels(self, part: Part) -> Part:
        if self.fused_tokens and isinstance(part, MLPPart):
            part.fused = self.source.on_chosen  # type: ignore[union-attr]
        return part


def allot(stores: Sequence[PartStore], max_bytes: int | None) -> None:
    """Choose each store's storage: the fastest for all, or for as many as the budget allows.

    Args:
        max_bytes: None takes half of the memory that is free, and is never too little.

    Raises:
        ValueError: the smallest choice takes more than ``max_bytes``.
    """
    costs = [{kind: store.bytes_as(kind) for kind in ("own", "shared", "in place")} for store in stores]
    smallest = sum(min(cost.values()) for cost in costs)
    if max_bytes is not None and smallest > max_bytes:
        raise ValueError(
            f"pack: the sub-networks take {smallest / 2**20:.0f} MiB beside the model at the least, more than "
            f"max_bytes = {max_bytes / 2**20:.0f} MiB; raise it, sample in fewer steps, or sample without packing"
        )
    left = (free_memory(stores[0].device) // 2 if max_bytes is None else max_bytes) - smallest
    upgrades = []
    for store, cost in zip(stores, costs, strict=True):
        store.storage = min(("shared", "own", "in place"), key=lambda kind: cost[kind])
        best: Storage = "own" if store.has_kernel_layout or cost["own"] <= cost["shared"] else "shared"
        upgrades.append((cost[best] - cost[store.storage], store, best))
    for extra, store, best in sorted(upgrades, key=lambda upgrade: upgrade[0]):
        if extra <= left:
            store.storage = best
            left -= extra
    for store in stores:
        if store.has_experts and (extra := store.bytes_as("own", folded=True)) <= left:
            store.folded, store.storage = True, "own"
            left -= extra


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there: of the GPU, or of the machine within the limit of its container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # a container without a limit says "max"
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(0, free)


def _order(masks: Bool[Tensor, "steps units"]) -> Int64[Tensor, " used"]:
    """The units that ever work, those that work most first, those of equal history together."""
    used = masks.any(0).nonzero().squeeze(1).tolist()
    by_history = sorted(used, key=lambda unit: (-int(masks[:, unit].sum()), masks[:, unit].tolist(), unit))
    return torch.tensor(by_history, dtype=torch.long)


def _run(mask: Bool[Tensor, " units"], order: Int64[Tensor, " used"]) -> tuple[int, int] | None:
    """(first, last + 1) of the working units in that order, if nothing lies between them that does not work."""
    places = mask[order].nonzero().squeeze(1)
    if not len(places):
        return None
    first, last = int(places[0]), int(places[-1])
    return (first, last + 1) if last - first + 1 == len(places) else None


def copied_bytes(blocks: Iterable[nn.Module], own: set[int]) -> int:
    """Memory of the weights that are not the model's ``own`` storages, each storage once."""
    found: dict[int, int] = {}
    for module in (m for block in blocks for m in block.modules()):
        if isinstance(module, KernelLinear):
            found[id(module.weight)] = module.nbytes
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if (storage := tensor.untyped_storage()).data_ptr() not in own and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
