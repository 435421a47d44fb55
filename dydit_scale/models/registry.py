"""Which dynamic class belongs to which static one."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel, ModelMixin

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.class_latte import ClassLatteTransformer3DModel
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.dy_class_latte import DyClassLatteTransformer3DModel
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.models.latte import DyLatteTransformer3DModel

DYNAMIC_CLASSES: dict[type[ModelMixin], type[DynamicModelMixin]] = {
    ClassLatteTransformer3DModel: DyClassLatteTransformer3DModel,
    DiTTransformer2DModel: DyDiTTransformer2DModel,
    FluxTransformer2DModel: DyFluxTransformer2DModel,
    LatteTransformer3DModel: DyLatteTransformer3DModel,
}


def make_dynamic(static: ModelMixin, config: DynamicConfig | None = None, *, rank: bool = True) -> DynamicModelMixin:
    """The dynamic model of a static one, sharing its tensors; it computes the same until its routers are trained.

    Args:
        rank: order heads and channels by importance, so that the always-on ones are the most important.

    Raises ValueError for a class that has no dynamic counterpart.
    """
    if type(static) not in DYNAMIC_CLASSES:
        known = ", ".join(c.__name__ for c in DYNAMIC_CLASSES)
        raise ValueError(f"make_dynamic: no dynamic class for {type(static).__name__}; there is one for {known}")
    return DYNAMIC_CLASSES[type(static)].from_static(static, config, rank=rank)
