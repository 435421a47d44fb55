"""What every dynamic model shares: made from a static one and turned back, routed, packed, saved and loaded."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.dynamic.masks import GateMode, WidthMasks
from dydit_scale.dynamic.timestep import TimestepState
from dydit_scale.dynamic.width import Router, WidthRouter
from dydit_scale.models.plan import PackedPlan, StepTable

logger = logging.getLogger(__name__)
M = TypeVar("M", bound="DynamicModelMixin")


class DynamicModelMixin:
    """Mixed into a subclass of a diffusers model, before it. The base weights keep their names; ours begin with
    ``dy_``."""

    static_class: ClassVar[type[ModelMixin]]
    """The diffusers class whose weights this one takes."""
    dy_width: WidthRouter
    dynamic: DynamicConfig
    timestep_state: TimestepState
    _plan: PackedPlan | None = None

    def _init_dynamic(self, *, layers: int, dim: int, heads: int) -> None:
        """Called last in ``__init__``: everything at the root that is dynamic."""
        d = self.dynamic
        self.dy_width = WidthRouter(
            layers=layers,
            dim=dim,
            heads=heads if d.heads else None,
            groups=(d.mlp_groups or heads) if d.mlp else None,
            bias=d.width_bias,
            temperature=d.temperature,
            always_on=d.always_on,
        )
        self.timestep_state = TimestepState()

    # What a model defines
    def dynamic_blocks(self) -> list[nn.Module]:
        """The blocks in the order of the masks' layers."""
        raise TypeError(f"{type(self).__name__} must define dynamic_blocks")

    def routing_embedding(self, timestep: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The pure timestep embedding in fp32, for timesteps as the forward takes them."""
        raise TypeError(f"{type(self).__name__} must define routing_embedding")

    def cost(self, image_tokens: int, text_tokens: int) -> ModelCost:
        """MACs of one forward."""
        raise TypeError(f"{type(self).__name__} must define cost")

    def rank_units(self) -> None:
        """Order heads and channels by importance: the always-on unit gets the best (see dynamic/ranking.py)."""
        raise TypeError(f"{type(self).__name__} must define rank_units")

    # Static and back
    @classmethod
    def from_static(
        cls: type[M], static: ModelMixin, config: DynamicConfig | None = None, *, rank: bool = True, seed: int = 0
    ) -> M:
        """The dynamic model of ``static``, sharing its tensors; all gates start open.

        Raises:
            ValueError: the model is not of the class that this one makes dynamic.
        """
        if type(static) is not cls.static_class:
            raise ValueError(
                f"{cls.__name__}.from_static: expected a {cls.static_class.__name__}; got {type(static).__name__}"
            )
        settings = {k: v for k, v in static.config.items() if not k.startswith("_")}
        with init_empty_weights():
            model = cls.from_config(  # type: ignore[attr-defined]
                {**settings, "dynamic": asdict(config or DynamicConfig())}
            )
        missing, unexpected = model.load_state_dict(static.state_dict(keep_vars=True), strict=False, assign=True)
        if unexpected or any(".dy_" not in f".{k}" for k in missing):
            raise ValueError(
                f"{cls.__name__}.from_static: weights do not fit: missing {missing}, unexpected {unexpected}"
            )
        _materialise_routers(model, seed)
        model.train(static.training)
        if rank:
            model.rank_units()
        return model

    def to_static(self) -> ModelMixin:
        """The static model with the same tensors; routers stay behind."""
        settings = {k: v for k, v in self.config.items() if not k.startswith("_") and k != "dynamic"}  # type: ignore[attr-defined]
        with init_empty_weights():
            static = self.static_class.from_config(settings)
        base = {k: v for k, v in self.state_dict(keep_vars=True).items() if ".dy_" not in f".{k}"}  # type: ignore[attr-defined]
        static.load_state_dict(base, strict=True, assign=True)
        return static.train(self.training)  # type: ignore[attr-defined]

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        # diffusers leaves parameters that the checkpoint lacks on the meta device, with a warning only.
        out = super()._load_pretrained_model(model, *args, **kwargs)  # type: ignore[misc]
        _materialise_routers(model, seed=0)
        return out

    # Routing and packing
    def width_masks(self, t_emb: Float[Tensor, "batch dim"], mode: GateMode) -> WidthMasks:
        """Masks of all layers, or none in the complete model."""
        return WidthMasks(None, None) if mode == "open" else self.dy_width(t_emb, mode)

    def pack(self, timesteps: Float[Tensor, " steps"], *, max_bytes: int | None = None) -> PackedPlan:
        """Cut a sub-network for each of the sampler's timesteps (as the forward takes them); forwards without gradient
        use them from now on. Equal sub-blocks are shared between steps.

        Args:
            max_bytes: refuse with ValueError if the copied weights would take more.
        """
        self.unpack()
        plan = PackedPlan.build(self, timesteps, max_bytes=max_bytes)
        object.__setattr__(self, "_plan", plan)
        return plan

    def unpack(self) -> None:
        """Forget the packed sub-networks."""
        object.__setattr__(self, "_plan", None)

    def step_table(self, timesteps: Float[Tensor, " steps"]) -> StepTable:
        """Which units work at each of the timesteps."""
        return StepTable.build(self, timesteps)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        before = _places(self)
        out = super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        if self._plan is not None and _places(self) != before:
            logger.warning(
                "the model was moved or cast: its packed sub-networks stayed behind and are dropped; pack it again"
            )
            self.unpack()
        return out

    def train(self, mode: bool = True) -> Any:
        """As any module's; training changes the weights, so it forgets the packed sub-networks."""
        if mode:
            self.unpack()
        return super().train(mode)  # type: ignore[misc]


def _places(model: Any) -> set[tuple[torch.device, torch.dtype]]:
    return {(p.device, p.dtype) for p in model.parameters()}


def _materialise_routers(model: nn.Module, seed: int) -> None:
    """Give routers that are still on the meta device storage in fp32 and their start; the same on every rank."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Router) and any(p.is_meta for p in module.parameters()):
            module.to_empty(device="cpu").float()
            module.reset_parameters(generator)
            module.to(device)
