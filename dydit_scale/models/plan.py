"""Sub-networks for the timesteps of a sampler, cut once before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dydit_scale.dynamic.masks import WidthMasks
from dydit_scale.dynamic.packing import is_adapted
from dydit_scale.models.hooks import copy_hooks

if TYPE_CHECKING:
    from dydit_scale.models.base import DynamicModelMixin


class PackableBlock(Protocol):
    """A block that can cut itself."""

    def packed(self, width: WidthMasks, t_emb: Float[Tensor, "1 dim"]) -> nn.Module:
        """The block with its active heads and channels only; ``width`` [units] for one sample."""

    def depends_on_timestep(self) -> bool:
        """Whether a layer's weight changes with the timestep even where the masks do not (TD-LoRA)."""


@dataclass(frozen=True)
class StepTable:
    """Width masks of a schedule, for one sample."""

    timesteps: Float[Tensor, " steps"]
    t_emb: Float[Tensor, "steps dim"]
    heads: Bool[Tensor, "layers steps heads"] | None
    groups: Bool[Tensor, "layers steps groups"] | None

    @classmethod
    @torch.no_grad()
    def build(cls, model: DynamicModelMixin, timesteps: Float[Tensor, " steps"]) -> StepTable:
        device = next(p.device for p in model.parameters())  # type: ignore[attr-defined]
        t_emb = model.routing_embedding(timesteps.to(device).float())
        masks = model.width_masks(t_emb, "threshold")
        return cls(timesteps.float().cpu(), t_emb, *(None if m is None else m.bool() for m in masks))

    def at(self, step: int, batch: int) -> WidthMasks:
        """[layers, batch, units] of one step, as a forward's masks."""
        return WidthMasks(
            *(None if m is None else m[:, step, None].expand(-1, batch, -1).float() for m in (self.heads, self.groups))
        )

    def masks(self, layer: int, step: int) -> WidthMasks:
        """[units] of one layer at one step."""
        return WidthMasks(*(None if m is None else m[layer, step] for m in (self.heads, self.groups)))


class AdaptedLayer(NamedTuple):
    """A layer with adapters, and what acted in it."""

    parent: nn.Module
    name: str
    layer: nn.Module
    acting: tuple[object, ...]


@dataclass(frozen=True)
class AdapterState:
    """Which adapters of a model act, and how strongly: slices hold them as they were when they were cut."""

    names: tuple[str, ...]
    """Of all adapters, as peft knows them."""
    layers: tuple[AdaptedLayer, ...]

    @classmethod
    def of(cls, model: nn.Module) -> AdapterState:
        found = (
            AdaptedLayer(parent, name, layer, _acting(layer))
            for parent in model.modules()
            for name, layer in parent.named_children()
            if is_adapted(layer)
        )
        return cls(tuple(getattr(model, "peft_config", ())), tuple(found))

    def still_holds(self, model: nn.Module) -> bool:
        """Whether nothing was added, removed, switched, merged or rescaled since."""
        return self.names == tuple(getattr(model, "peft_config", ())) and all(
            at.parent._modules.get(at.name) is at.layer and _acting(at.layer) == at.acting for at in self.layers
        )


def _acting(layer: Any) -> tuple[object, ...]:
    """Whether adapters are off, which are active, which are merged, and how strong they are."""
    scales = tuple(layer.scaling.items())
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), scales


@dataclass(frozen=True)
class PackedPlan:
    """For each step, one sub-block per layer."""

    table: StepTable
    blocks: tuple[tuple[nn.Module, ...], ...]
    """[steps][layers]"""
    distinct: int
    """Sub-blocks that had to be cut."""
    bytes: int
    """Memory of the weights that were copied, not viewed."""
    tolerance: float
    """How far, as a share, a timestep may be from the planned one."""
    adapters: AdapterState
    """What is folded into the sub-blocks."""

    @classmethod
    @torch.no_grad()
    def build(
        cls, model: DynamicModelMixin, timesteps: Float[Tensor, " steps"], *, max_bytes: int | None
    ) -> PackedPlan:
        table = model.step_table(timesteps)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}  # type: ignore[attr-defined]
        cut: dict[tuple, nn.Module] = {}
        used = 0
        rows = []
        for step in range(len(table.timesteps)):
            row = []
            for layer, block in enumerate(model.dynamic_blocks()):
                key = _key(block, table, layer, step)
                if key not in cut:
                    _check_heads(table, layer, step)
                    cut[key] = block.packed(  # type: ignore[operator]
                        table.masks(layer, step), table.t_emb[step : step + 1]
                    )
                    copy_hooks(block, cut[key])
                    used += _copied_bytes(cut[key], own)
                    if max_bytes is not None and used > max_bytes:
                        raise ValueError(
                            f"pack: the sub-networks of {step + 1} of {len(table.timesteps)} steps already take "
                            f"{used / 2**20:.0f} MiB, more than max_bytes = {max_bytes / 2**20:.0f} MiB; "
                            "raise it, sample in fewer steps, or sample without packing"
                        )
                row.append(cut[key])
            rows.append(tuple(row))
        adapters = AdapterState.of(model)  # type: ignore[arg-type]
        return cls(table, tuple(rows), len(cut), used, model.timestep_tolerance, adapters)

    def step_of(self, timestep: float) -> int | None:
        """The planned step nearest to ``timestep``, or None where none is near."""
        distance = (self.table.timesteps - timestep).abs()
        nearest = int(distance.argmin())
        return nearest if float(distance[nearest]) <= self.tolerance * max(abs(timestep), 1e-3) else None


def _check_heads(table: StepTable, layer: int, step: int) -> None:
    """ValueError if no head is on, which only a model without an always-on unit can come to."""
    heads = table.masks(layer, step).heads
    if heads is not None and not heads.any():
        raise ValueError(
            f"pack: layer {layer} has no head on at timestep {float(table.timesteps[step]):g}, and attention cannot be "
            "cut to nothing; sample without packing"
        )


def _key(block: Any, table: StepTable, layer: int, step: int) -> tuple:
    units = tuple(None if m is None else m.cpu().numpy().tobytes() for m in table.masks(layer, step))
    return (layer, *units, step if block.depends_on_timestep() else None)


def _copied_bytes(block: nn.Module, own: set[int]) -> int:
    tensors = [p for p in block.parameters() if p.untyped_storage().data_ptr() not in own]
    return sum(p.numel() * p.element_size() for p in tensors)
