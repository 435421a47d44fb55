"""Sub-networks for the timesteps of a sampler, cut once before it starts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dydit_scale.dynamic.masks import WidthMasks
from dydit_scale.dynamic.packing import fold_lasting, is_adapted
from dydit_scale.dynamic.weight_only import Kind
from dydit_scale.models.ahead import AheadModulation
from dydit_scale.models.hooks import copy_hooks
from dydit_scale.models.part_store import PartStore, Storage, allot, copied_bytes
from dydit_scale.models.parts import AttentionSource, MLPPart, Source
from dydit_scale.models.weight_state import WeightState

if TYPE_CHECKING:
    from dydit_scale.models.routed import RoutedModelMixin


SLACK = 2**20
"""What biases and scales may take beyond a budget for weights."""


@dataclass(frozen=True)
class StepTable:
    """Width masks of a schedule, for one sample."""

    timesteps: Float[Tensor, " steps"]
    t_emb: Float[Tensor, "steps dim"]
    heads: Bool[Tensor, "layers steps heads"] | None
    groups: Bool[Tensor, "layers steps groups"] | None

    @classmethod
    @torch.no_grad()
    def build(cls, model: RoutedModelMixin, timesteps: Float[Tensor, " steps"]) -> StepTable:
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
    scales = tuple(getattr(layer, "scaling", {}).items())
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), scales


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How cut weights are kept; see :class:`PartStore`."""

    kernel_layout: bool = True
    weights: Kind | None = None
    fused_tokens: bool = False


@dataclass(frozen=True)
class TokenPlan:
    """How packed blocks choose their tokens."""

    counts: list[list[int]] | None = None
    """[steps][layers], of each sample; None: the tokens above the router's threshold."""
    share_scores: bool = False
    """The branches of guidance, the two halves of a batch, skip the same tokens."""


@dataclass
class RunState:
    """What happened since the plan was made."""

    fallback: str | None = None
    """Why forwards run masked, if they do."""
    autocast: torch.dtype | None = None
    """Another dtype than the weights' that forwards ran under."""
    last: int | None = None
    """The step that ran last."""

    def begins(self, step: int) -> bool:
        """Whether a sampler begins with this step: the first of all, or one before the last."""
        last, self.last = self.last, step
        return last is None or step < last or step == 0


class FusedTokens(NamedTuple):
    """Where the MLPs of chosen tokens run, if the fused kernels were asked for."""

    parts: int
    """Distinct ones."""
    fused: int
    """Those that run in the kernels."""
    reason: str | None
    """Why one does not."""


@dataclass(frozen=True)
class PackedPlan:
    """For each step, one sub-block per layer."""

    table: StepTable
    blocks: tuple[tuple[nn.Module, ...], ...]
    """[steps][layers]"""
    distinct: int
    """Sub-blocks that differ."""
    bytes: int
    """Memory of the weights that were copied, not viewed."""
    stored: dict[Storage, int]
    """How many attentions and MLPs are kept in each way (see :class:`PartStore`)."""
    tolerance: float
    """How far, as a share, a timestep may be from the planned one."""
    adapters: AdapterState
    """What is folded into the sub-blocks."""
    weights: WeightState
    """What they are cut from, and what their steps were found with."""
    tokens: TokenPlan = TokenPlan()
    """How tokens are chosen."""
    max_bytes: int | None = None
    """The budget, and"""
    storage: StorageOptions = StorageOptions()
    """the ways that were asked for."""
    run: RunState = field(default_factory=RunState)
    ahead: AheadModulation | None = None
    """The modulations of coming steps, for models whose blocks have layers for them."""
    fused_tokens: FusedTokens | None = None

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: RoutedModelMixin,
        timesteps: Float[Tensor, " steps"],
        *,
        max_bytes: int | None,
        storage: StorageOptions = StorageOptions(),
        tokens: TokenPlan = TokenPlan(),
        run: RunState | None = None,
    ) -> PackedPlan:
        table = model.step_table(timesteps)
        steps, blocks = len(table.timesteps), model.dynamic_blocks()
        for layer, step in itertools.product(range(len(blocks)), range(steps)):
            _check_heads(table, layer, step)
        stores = [
            {
                name: PartStore(source, _masks_of(table, layer, source), **asdict(storage))
                for name, source in block.pack_sources().items()  # type: ignore[operator]
            }
            for layer, block in enumerate(blocks)
        ]
        allot([store for layer in stores for store in layer.values()], max_bytes)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}  # type: ignore[attr-defined]
        columns = [_sub_blocks(block, parts, table) for block, parts in zip(blocks, stores, strict=True)]
        rows = tuple(zip(*columns, strict=True))
        distinct = {id(block): block for row in rows for block in row}
        copied = copied_bytes(distinct.values(), own)
        if max_bytes is not None and copied > max_bytes + SLACK:
            raise ValueError(
                f"pack: adapters folded into other layers than attentions and MLPs bring the copies to "
                f"{copied / 2**20:.0f} MiB, more than max_bytes = {max_bytes / 2**20:.0f} MiB; raise it, or take "
                "the adapter off those layers"
            )
        return cls(
            table,
            rows,
            len(distinct),
            copied,
            dict(Counter(store.storage for layer in stores for store in layer.values())),
            model.timestep_tolerance,
            AdapterState.of(model),  # type: ignore[arg-type]
            WeightState(model, _token_routers(blocks)),  # type: ignore[arg-type]
            tokens,
            max_bytes,
            storage,
            RunState() if run is None else run,
            ahead=_ahead(rows, table),
            fused_tokens=_fused_tokens(distinct.values(), model) if storage.fused_tokens else None,
        )

    @property
    def wishes(self) -> dict[str, Any]:
        """What to give ``build`` for the same plan anew; what happens to that is told to this one's holders too."""
        return {
            "timesteps": self.table.timesteps, "max_bytes": self.max_bytes, "storage": self.storage,
            "tokens": self.tokens, "run": self.run,
        }  # fmt: skip

    def stale(self, model: RoutedModelMixin) -> str | None:
        """What has changed in the model since, so that the sub-networks are no longer its own; None if nothing has."""
        if not self.adapters.still_holds(model):  # type: ignore[arg-type]
            return "adapters have changed since pack"
        return None if self.weights.still_holds() else "weights have changed since pack"

    def step_of(self, timestep: float) -> int | None:
        """The planned step nearest to ``timestep``, or None where none is near."""
        distance = (self.table.timesteps - timestep).abs()
        nearest = int(distance.argmin())
        return nearest if float(distance[nearest]) <= self.tolerance * max(abs(timestep), 1e-3) else None


def _token_routers(blocks: Iterable[Any]) -> list[nn.Module]:
    return [block.dy_token for block in blocks if block.dy_token is not None]


def _ahead(rows: tuple[tuple[Any, ...], ...], table: StepTable) -> AheadModulation | None:
    if not all(block.modulation for block in rows[0]):
        return None
    return AheadModulation([[block.modulation for block in row] for row in rows], table.timesteps)


def _fused_tokens(blocks: Iterable[nn.Module], model: Any) -> FusedTokens:
    parts = {id(part): part for block in blocks for part in block.modules() if isinstance(part, MLPPart) and part.fused}
    if not model.dynamic.tokens:
        return FusedTokens(0, 0, "no token is routed, so that all pass through every MLP")
    reasons = [part.why_unfused(torch.empty(0, dtype=model.dtype, device=model.device)) for part in parts.values()]
    unfused = [reason for reason in reasons if reason is not None]
    return FusedTokens(len(parts), len(parts) - len(unfused), unfused[0] if unfused else None)


def _masks_of(table: StepTable, layer: int, source: Source) -> Bool[Tensor, "steps units"] | None:
    masks = table.heads if isinstance(source, AttentionSource) else table.groups
    return None if masks is None else masks[layer].cpu()


def _sub_blocks(block: Any, stores: dict[str, PartStore], table: StepTable) -> list[nn.Module]:
    """The block's sub-block for each step; those of equal parts are one."""
    cut_layers = {id(layer) for store in stores.values() for layer in store.layers}
    others = [m for m in block.modules() if hasattr(m, "weight_at") and id(m) not in cut_layers]
    block = fold_lasting(block, cut_layers)
    made: dict[tuple, nn.Module] = {}
    column = []
    for step in range(len(table.timesteps)):
        t_emb = table.t_emb[step : step + 1]
        parts = {name: store.at(step, t_emb) for name, store in stores.items()}
        key = (*map(id, parts.values()), step if others else None)
        if key not in made:
            made[key] = block.assembled(parts, t_emb)
            copy_hooks(block, made[key])
        column.append(made[key])
    return column


def _check_heads(table: StepTable, layer: int, step: int) -> None:
    """ValueError if no head is on, which only a model without an always-on unit can come to."""
    heads = table.masks(layer, step).heads
    if heads is not None and not heads.any():
        raise ValueError(
            f"pack: layer {layer} has no head on at timestep {float(table.timesteps[step]):g}, and attention cannot be "
            "cut to nothing; sample without packing"
        )
