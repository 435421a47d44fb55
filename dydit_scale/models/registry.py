"""The families of models, and which one a pipeline or a transformer belongs to."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from diffusers import ModelMixin

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models import families
from dydit_scale.models.base import DynamicModelMixin
from dydit_scale.models.family import Family


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Those of every module in ``models.families``."""
    found: list[Family] = []
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        found += importlib.import_module(module.name).FAMILIES
    return tuple(found)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline, by its class.

    Raises ValueError if there is none.
    """
    return family_named(type(pipeline).__name__, f"{type(pipeline).__name__}")


def family_named(pipeline_class: str, where: str) -> Family:
    """The family whose pipeline has this class name; ``where`` begins the ValueError if there is none."""
    known = {n: f for f in all_families() for n in (f.pipeline_class.__name__, *f.also_reads)}
    if pipeline_class not in known:
        raise ValueError(f"{where}: no family of models has a {pipeline_class}; there are {', '.join(sorted(known))}")
    return known[pipeline_class]


def make_dynamic(static: ModelMixin, config: DynamicConfig | None = None, *, rank: bool = True) -> DynamicModelMixin:
    """The dynamic model of a static one, sharing its tensors; it computes the same until its routers are trained.

    Args:
        rank: order heads and channels by importance, so that the always-on ones are the most important.

    Raises ValueError for a class that has no dynamic counterpart.
    """
    known = {family.static_class: family.dynamic_class for family in all_families()}
    names = ", ".join(sorted(c.__name__ for c in known))
    known |= {dynamic: dynamic for dynamic in known.values()}  # with nothing dynamic in it, as converted weights have
    if type(static) not in known:
        raise ValueError(f"make_dynamic: no dynamic class for {type(static).__name__}; there is one for {names}")
    return known[type(static)].from_static(static, config, rank=rank)
