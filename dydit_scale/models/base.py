"""What every dynamic model shares: made from a static one and turned back, saved and loaded, and routed (routed.py)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dydit_scale.dynamic.config import DynamicConfig, TokenRouterKind
from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.dynamic.precise import UpcastLinear
from dydit_scale.dynamic.timestep import TimestepState
from dydit_scale.dynamic.width import Router, WidthRouter
from dydit_scale.models.routed import RoutedModelMixin

M = TypeVar("M", bound="DynamicModelMixin")


class DynamicModelMixin(RoutedModelMixin):
    """Mixed into a subclass of a diffusers model, before it. The base weights keep their names; ours begin with
    ``dy_``."""

    static_class: ClassVar[type[ModelMixin]]
    """The diffusers class whose weights this one takes."""
    output_class: ClassVar[Any]
    """The named result (sample, masks) of a forward that was asked for its masks."""
    processor_class: ClassVar[type]
    """The attention processor that obeys head masks."""
    token_router: ClassVar[TokenRouterKind]
    """The family's token router, taken where the config names none."""
    own_settings: ClassVar[tuple[str, ...]] = ("dynamic",)
    """Fields of the config that the static class does not know."""
    timestep_state: TimestepState

    def _init_dynamic(self, *, layers: int, dim: int, heads: int) -> None:
        """Called last in ``__init__``: everything at the root that is dynamic."""
        d = self.dynamic
        for module in list(self.modules()):  # type: ignore[attr-defined]
            if isinstance(module, TimestepEmbedding):
                module.linear_1, module.linear_2 = UpcastLinear.of(module.linear_1), UpcastLinear.of(module.linear_2)
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

    @property
    def is_dynamic(self) -> bool:
        """Whether anything in it can be switched off."""
        return self.dynamic.heads or self.dynamic.mlp or self.dynamic.tokens

    # What a model defines
    def block_names(self) -> list[str]:
        """What to call the blocks in a table."""
        return [f"block {i}" for i in range(len(self.dynamic_blocks()))]

    def cost(self, image_tokens: int, text_tokens: int = 0) -> ModelCost:
        """MACs of one forward for one sample, from shapes; ``text_tokens`` is 0 where classes are the condition."""
        raise TypeError(f"{type(self).__name__} must define cost")

    @classmethod
    def _own_names(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A static state dict under this class' names."""
        return state

    def _static_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`_own_names`."""
        return state

    def rank_units(self) -> None:
        """The most important heads and channels of each block become its always-on unit (see dynamic/ranking.py)."""
        for block in self.dynamic_blocks():
            block.rank_units()  # type: ignore[operator]

    # Static and back
    @classmethod
    def from_static(
        cls: type[M], static: ModelMixin, config: DynamicConfig | None = None, *, rank: bool = True, seed: int = 0
    ) -> M:
        """The dynamic model of ``static``, sharing its tensors; all gates start open.

        ``static`` may also be of this class with nothing dynamic in it, as ``dydit convert`` writes weights that the
        diffusers class cannot compute exactly.

        Raises:
            ValueError: the model is not of the class that this one makes dynamic.
        """
        if not (type(static) is cls.static_class or (type(static) is cls and not static.is_dynamic)):
            got = f"a dynamic {cls.__name__}" if type(static) is cls else type(static).__name__
            raise ValueError(f"{cls.__name__}.from_static: expected a {cls.static_class.__name__}; got {got}")
        settings = {k: v for k, v in static.config.items() if not k.startswith("_")}
        with init_empty_weights():
            model = cls.from_config(  # type: ignore[attr-defined]
                {**settings, "dynamic": asdict((config or DynamicConfig()).for_family(cls.token_router))}
            )
        base = cls._own_names(static.state_dict(keep_vars=True))
        missing, unexpected = model.load_state_dict(base, strict=False, assign=True)
        if unexpected or any(".dy_" not in f".{k}" for k in missing):
            raise ValueError(
                f"{cls.__name__}.from_static: weights do not fit: missing {missing}, unexpected {unexpected}"
            )
        _share_buffers(static, model)
        _materialise_routers(model, seed)
        model.train(static.training)
        if rank and not any(p.is_meta for p in static.parameters()):  # without contents there is no order
            model.rank_units()
        return model

    def to_static(self) -> ModelMixin:
        """The static model with the same tensors; routers stay behind.

        Raises:
            ValueError: the model carries an adapter.
        """
        if adapted := [name for name in self.state_dict() if ".base_layer." in name]:  # type: ignore[attr-defined]
            raise ValueError(f"to_static: {adapted[0]} belongs to an adapted layer; merge or unload the adapter first")
        config = self.config  # type: ignore[attr-defined]
        settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in self.own_settings}
        with init_empty_weights():
            static = self.static_class.from_config(settings)
        base = {k: v for k, v in self.state_dict(keep_vars=True).items() if ".dy_" not in f".{k}"}  # type: ignore[attr-defined]
        static.load_state_dict(self._static_names(base), strict=True, assign=True)
        _share_buffers(self, static)
        return static.train(self.training)  # type: ignore[attr-defined]

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        # diffusers leaves parameters that the checkpoint lacks on the meta device, with a warning only.
        out = super()._load_pretrained_model(model, *args, **kwargs)  # type: ignore[misc]
        _materialise_routers(model, seed=0)
        return out

    def _result(self, sample: Tensor, masks: DynamicMasks | None, return_dict: bool) -> Any:
        """The named result where masks were collected, else what diffusers returns."""
        if masks is not None:
            return self.output_class(sample, masks)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_processors(self) -> None:
        for name, processor in self.attn_processors.items():  # type: ignore[attr-defined]
            if not isinstance(processor, self.processor_class):
                raise ValueError(
                    f"{name} is a {type(processor).__name__}, which ignores head masks; "
                    "choose kernels with set_attention_backend, or use to_static() for other processors"
                )


def _share_buffers(source: Any, target: Any) -> None:
    """Let ``target`` use the buffers of ``source`` that no state dict carries (tables of positions)."""
    buffers = dict(source.named_buffers())
    for name, module in target.named_modules():
        for leaf in module._non_persistent_buffers_set:
            if (full := f"{name}.{leaf}".lstrip(".")) in buffers:
                setattr(module, leaf, buffers[full])


def _materialise_routers(model: nn.Module, seed: int) -> None:
    """Give routers that are still on the meta device storage in fp32 and their start; the same on every rank."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Router) and any(p.is_meta for p in module.parameters()):
            module.to_empty(device="cpu").float()
            module.reset_parameters(generator)
            module.to(device)
