"""What every forward of a dynamic model asks: its blocks and gates at this timestep, packed or masked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.dynamic.masks import DynamicMasks, FrozenGates, GateMode, WidthMasks
from dydit_scale.dynamic.weight_only import Kind
from dydit_scale.dynamic.width import WidthRouter
from dydit_scale.models.ahead import Embed
from dydit_scale.models.blocks import BlockGates, block_gates, check_branches
from dydit_scale.models.hooks import HookedModelMixin
from dydit_scale.models.plan import PackedPlan, StepTable, StorageOptions, TokenPlan

logger = logging.getLogger(__name__)


class RoutedModelMixin(HookedModelMixin):
    """The part of a dynamic model that its forward goes through: the sub-network of a planned step where the model is
    packed, the masked model otherwise, and never silently so."""

    dy_width: WidthRouter
    timestep_tolerance: ClassVar[float] = 1e-5
    """How far, as a share, a timestep may be from the planned one to run its sub-network."""
    _plan: PackedPlan | None = None
    _fixed_step: int | None = None
    _values: list[float]
    """The timesteps of the forward under way, where it is packed; read from the device once."""

    # What a model defines
    def dynamic_blocks(self) -> list[nn.Module]:
        """The blocks in the order of the masks' layers."""
        raise TypeError(f"{type(self).__name__} must define dynamic_blocks")

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The pure timestep embedding in fp32, for timesteps as the forward takes them."""
        raise TypeError(f"{type(self).__name__} must define routing_embedding")

    # Routing and packing
    def width_masks(self, t_emb: Float[Tensor, "batch dim"], mode: GateMode) -> WidthMasks:
        """Masks of all layers, or none in the complete model."""
        if isinstance(mode, FrozenGates):
            return mode.network.masks(t_emb.device)
        return WidthMasks(None, None) if mode == "open" else self.dy_width(t_emb, mode)

    def pack(
        self,
        timesteps: Float[Tensor, " steps"],
        *,
        max_bytes: int | None = None,
        capacity: TokenCapacity | None = None,
        share_scores: bool = False,
        kernel_layout: bool = True,
        weights: Kind | None = None,
        fused_tokens: bool = False,
    ) -> PackedPlan:
        """Cut a sub-network for each of the sampler's timesteps (as the forward takes them); forwards without gradient
        use them from now on. Equal attentions and MLPs are shared between steps.

        Args:
            max_bytes: what the copied weights may take beside the model. The more, the faster: within it slices are
                fused, laid out for the CPU's kernels, and hold TD-LoRA's experts; then come views and thin products
                beside them. None takes up to half of the memory that is free.
            capacity: work on fixed numbers of tokens, those of the highest scores; None takes those above the router's
                threshold, as in training's evaluation.
            share_scores: let the branches of guidance, equal halves of a batch, skip the same tokens. FLUX's pipelines
                run their branches one after the other: there it is refused when the model runs.
            kernel_layout: False leaves copied weights plain, as torch.compile needs them.
            weights: keep the copies in int8 or (CUDA) fp8, cast at each call: half the memory, no more speed.
            fused_tokens: run the MLP of chosen tokens in two Triton kernels (CUDA, half precision) in place of gather,
                MLP and scatter, where they can (``plan.fused_tokens``). No GPU has measured them yet.

        Raises:
            ValueError: ``max_bytes`` is too little for views even, a capacity for other timesteps, or a hook that the
                cut copies would not follow (offloading, casting, a cache inside blocks).
        """
        self._check_packable()
        self.unpack()
        counts = None
        if capacity is not None:
            counts = capacity.at(timesteps.float().cpu(), len(self.dynamic_blocks()), self.timestep_tolerance)
        tokens = TokenPlan(None if counts is None else counts.tolist(), share_scores)
        storage = StorageOptions(kernel_layout=kernel_layout, weights=weights, fused_tokens=fused_tokens)
        plan = PackedPlan.build(self, timesteps, max_bytes=max_bytes, storage=storage, tokens=tokens)
        if (kernels := plan.fused_tokens) is not None and not kernels.fused:
            logger.warning("fused_tokens: no MLP runs in the fused kernels: %s", kernels.reason)
        object.__setattr__(self, "_plan", plan)
        return plan

    def unpack(self) -> None:
        """Forget the packed sub-networks."""
        object.__setattr__(self, "_plan", None)

    def step_table(self, timesteps: Float[Tensor, " steps"]) -> StepTable:
        """Which units work at each of the timesteps."""
        return StepTable.build(self, timesteps)

    def _planned_steps(
        self, timestep: Float[Tensor, " batch"], gates: GateMode, latents: Shaped[Tensor, "samples *shape"]
    ) -> dict[int | None, list[int]]:
        """Which rows of the batch go to which planned step (None: to the masked model); empty where nothing is packed,
        or not for these gates, or weights or adapters have changed since. Raises ValueError for latents that are not
        those of two branches where these share their scores."""
        rows: dict[int | None, list[int]] = {}
        if self._fixed_step is not None:
            return {self._fixed_step: list(range(len(timestep)))}
        if gates != "threshold" or self._plan is None:
            return rows
        if torch.is_grad_enabled():
            self._fell_back("gradients are recorded; sample under torch.no_grad()")
            return rows
        if (change := self._plan.stale(self)) is not None:
            self._drop(change)
            return rows
        self._check_autocast(timestep.device.type)
        values = timestep.tolist()
        object.__setattr__(self, "_values", values)
        for row, t in enumerate(values):
            rows.setdefault(self._plan.step_of(t), []).append(row)
        planned = [step for step in rows if step is not None]
        begins = bool(planned) and self._plan.run.begins(min(planned))  # what a GPU must be waited for: once a picture
        if begins and not self._plan.weights.have_contents():
            self._drop("weights have changed since pack")
            return {}
        if None in rows:
            self._fell_back(
                f"timestep {values[rows[None][0]]:g} is not among the {len(self._plan.table.timesteps)} packed ones; "
                "pack the timesteps of this sampler (sampler_timesteps)"
            )
        if len(rows) > 1 and self.is_cache_enabled:  # type: ignore[attr-defined]
            raise ValueError(f"a cache needs one timestep in a batch of packed sampling; got {values}")
        if len(rows) > 1 and self._plan.tokens.share_scores:
            raise ValueError(f"share_scores: the branches of guidance have one timestep; got {values}")
        if self._plan.tokens.share_scores:
            check_branches(latents, contents=begins)
        return rows

    def _fell_back(self, reason: str) -> None:
        """Tell, once for each plan, that a forward runs masked."""
        assert self._plan is not None, "only a packed model falls back"
        if self._plan.run.fallback is None:
            self._plan.run.fallback = reason
            logger.warning("a forward runs masked, at the static model's cost: %s", reason)

    def _check_autocast(self, device: str) -> None:
        """Tell, once for each plan, that autocast does not speed up weights that are not its own."""
        assert self._plan is not None, "only a packed model asks"
        if not torch.is_autocast_enabled(device):
            return
        wanted, run = torch.get_autocast_dtype(device), self._plan.run
        if wanted != self.dtype and run.autocast is None:  # type: ignore[attr-defined]
            run.autocast = wanted
            logger.warning(
                "autocast to %s is no gain for packed weights in %s, which are multiplied as they are or cast at each "
                "call; cast the model, model.to(%s), and pack it again", wanted, self.dtype, wanted,  # type: ignore[attr-defined]
            )  # fmt: skip

    def _drop(self, reason: str) -> None:
        """Forget packed sub-networks that are no longer the model's own, and tell it, their holders too."""
        if self._plan is None:
            return
        logger.warning("the packed sub-networks are dropped: %s; pack again", reason)
        self._plan.run.fallback = self._plan.run.fallback or reason
        self.unpack()

    @contextmanager
    def at_planned_step(self, step: int) -> Iterator[None]:
        """Inside, all forwards run the sub-networks of one planned step, whatever their timestep; nothing is read from
        the device."""
        object.__setattr__(self, "_fixed_step", step)
        try:
            yield
        finally:
            object.__setattr__(self, "_fixed_step", None)

    def _network_at(
        self, step: int | None, timestep: Float[Tensor, " batch"], gates: GateMode
    ) -> tuple[Float[Tensor, "batch_t dim"], tuple[nn.Module, ...], WidthMasks]:
        """(routing embedding, blocks, their width masks): the sub-network of a planned step, or the masked model."""
        if self._plan is not None and step is not None:
            return self._plan.table.t_emb[step : step + 1], self._plan.blocks[step], WidthMasks(None, None)
        t_emb = self.routing_embedding(timestep)
        return t_emb, tuple(self.dynamic_blocks()), self.width_masks(t_emb, gates)

    def _block_gates(
        self,
        layer: int,
        step: int | None,
        width: WidthMasks,
        gates: GateMode,
        modulations: list[Tensor] | None = None,
    ) -> BlockGates:
        """The gates of one block, and its modulation where that is known before."""
        if self._plan is not None and step is not None:
            tokens = self._plan.tokens
            k = None if tokens.counts is None else tokens.counts[step][layer]
            modulation = None if modulations is None else modulations[layer]
            return BlockGates(capacity=k, modulation=modulation, share_scores=tokens.share_scores)
        return block_gates(gates, width, layer)

    def _modulations(
        self,
        step: int | None,
        timestep: Shaped[Tensor, " batch_t"],
        conditions: Sequence[Any],
        temb: Float[Tensor, "batch dim"],
        embed: Embed,
    ) -> list[Tensor] | None:
        """Each block's modulation at a planned step, where it is computed ahead (see ``AheadModulation``)."""
        if self._plan is None or self._plan.ahead is None or step is None or self._fixed_step is not None:
            return None
        values = self._values
        if any(value != values[0] for value in values):
            return None
        return self._plan.ahead.at(step, values[0], timestep, conditions, temb, embed)

    def _masks(self, step: int | None, width: WidthMasks, tokens: Float[Tensor, "layers batch tokens"]) -> DynamicMasks:
        """All masks of a forward, ones where nothing is dynamic."""
        layers, batch = tokens.shape[:2]
        if self._plan is not None and step is not None:
            width = self._plan.table.at(step, batch)
        heads = self.config["num_attention_heads"]  # type: ignore[attr-defined]
        units = (heads, self.dynamic.mlp_groups or heads)
        heads_on, groups_on = (
            torch.ones(layers, batch, n, device=tokens.device) if m is None else m.expand(-1, batch, -1)
            for m, n in zip(width, units, strict=True)
        )
        return DynamicMasks(heads_on, groups_on, tokens)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        before = _places(self)
        out = super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        if self._plan is not None and _places(self) != before:
            self._drop("the model was moved or cast, and they stayed behind")
        return out

    def train(self, mode: bool = True) -> Any:
        """As any module's; training changes the weights, so it drops the packed sub-networks."""
        if mode:
            self._drop("train() was called, and training changes the weights")
        return super().train(mode)  # type: ignore[misc]


def at_full_strength(kwargs_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a forward whose ``kwargs_name`` may hold a LoRA ``scale``: refuse a scale that packed
    sub-networks, whose weights hold the adapters already, would not follow."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            scale = (kwargs.get(kwargs_name) or {}).get("scale", 1.0)
            if self._plan is not None and scale != 1.0:
                raise ValueError(
                    f"{kwargs_name}: scale {scale} would not reach the packed sub-networks, whose weights hold the "
                    "adapters at their strength when pack was called; scale the adapter first and pack again, or "
                    "unpack()"
                )
            return forward(self, *args, **kwargs)

        return checked

    return decorate


def timestep_embedding(embed: Any, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
    """The output of a diffusers embedder's timestep part (``time_proj``, ``timestep_embedder``) alone, in fp32."""
    mlp = embed.timestep_embedder
    first, second = (getattr(layer, "base_layer", layer) for layer in (mlp.linear_1, mlp.linear_2))  # without adapters
    with torch.autocast(timestep.device.type, enabled=False):
        return second(F.silu(first(embed.time_proj(timestep.float()))))


def in_batch_order(parts: list[Any], rows: list[list[int]]) -> tuple[Tensor, DynamicMasks | None]:
    """(sample, masks if there are any) of the whole batch, from the outputs for its ``rows``, part by part."""
    order = torch.tensor([i for part in rows for i in part]).argsort()
    sample = torch.cat([part[0] for part in parts])[order]
    if not hasattr(parts[0], "masks"):
        return sample, None
    kinds = zip(*(part.masks for part in parts), strict=True)
    return sample, DynamicMasks(*(torch.cat(kind, dim=1)[:, order] for kind in kinds))


def _places(model: Any) -> set[tuple[torch.device, torch.dtype]]:
    return {(p.device, p.dtype) for p in model.parameters()}
