"""Checkpoints of other layouts into diffusers' (or our) names and back, strictly: tensors in, tensors out.

The layout is recognised by its names. What the file must hold follows from the model class: its names and shapes, taken
through the rules backwards.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from torch import Tensor

from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.models.class_latte import ClassLatteTransformer3DModel
from dydit_scale.models.dit import DyDiTTransformer2DModel
from dydit_scale.models.flux import DyFluxTransformer2DModel
from dydit_scale.models.keys.dit import DIT, DIT_COMPLETE
from dydit_scale.models.keys.dydit import DYDIT
from dydit_scale.models.keys.dyflux import DYFLUX
from dydit_scale.models.keys.flux import FLUX
from dydit_scale.models.keys.latte import LATTE
from dydit_scale.models.keys.layout import Config, Layout, Shapes
from dydit_scale.models.keys.rules import Computed, Rule

LAYOUTS = (DIT, DYDIT, LATTE, FLUX, DYFLUX)
_CLASSES = {
    c.__name__: c
    for c in (
        ClassLatteTransformer3DModel,
        DiTTransformer2DModel,
        DyDiTTransformer2DModel,
        DyFluxTransformer2DModel,
        FluxTransformer2DModel,
    )
}
_SMALLEST: Config = {
    **dict.fromkeys(("num_layers", "num_single_layers", "num_attention_heads", "sample_size", "patch_size"), 1),
    "attention_head_dim": 32,
    "guidance_embeds": True,
    "num_classes": 1,
    "video_length": 1,
}
_PREFIXES = ("module.", "model.diffusion_model.")
"""What DistributedDataParallel and ComfyUI put before every name."""
_LEAST_LIKENESS = 0.5
"""Share of common names below which a file is of no known layout."""


class Converted(NamedTuple):
    """A model in diffusers' layout."""

    layout: Layout
    config: Config
    tensors: dict[str, Tensor]


def to_diffusers(tensors: Mapping[str, Tensor], where: str, heads: int | None = None) -> Converted:
    """The model of an original checkpoint.

    Args:
        where: the file, for errors.
        heads: number of attention heads, needed where neither the file nor the published sizes tell it.

    Raises:
        ValueError: unknown layout, a missing or surplus name, a wrong shape, several dtypes; the first is named.
    """
    tensors = _without_prefix(tensors)
    layout = detect(tensors, where)
    try:
        config = layout.config(tensors, heads)
        rules = layout.rules(config)
        _check(tensors, expected_originals(layout, config), f"{where}: taken for {layout.title}")
        _check_dtypes(tensors)
        out = {
            name: tensor
            for rule in rules
            for name, tensor in zip(rule.ours, rule.forward([tensors[n] for n in rule.originals]), strict=False)
        }
    except ValueError as error:
        raise ValueError(_told_once(where, f"taken for {layout.title}", error)) from error
    return Converted(layout, {**config, "_diffusers_version": diffusers.__version__}, out)


def to_original(tensors: Mapping[str, Tensor], config: Config, where: str) -> tuple[Layout, dict[str, Tensor]]:
    """The original checkpoint of a model, given its ``config.json``.

    Raises:
        ValueError: a class that no original layout belongs to, weights that do not fit the config, or a model that the
            original layout cannot hold.
    """
    layout = layout_of(config, where)
    name, config = layout.target, _defaults(layout) | config
    try:
        _check(tensors, target_shapes(layout, config), f"{where}: its config.json says {name}")
        _check_dtypes(tensors)
        rules = layout.rules(config)
        taken = {name for rule in rules for name in rule.ours}
        # Unit tables are no weights: the rules of layouts with units read them, others need none.
        if homeless := sorted(name for name in tensors.keys() - taken if not name.endswith("_unit")):
            raise ValueError(f"{homeless[0]} has no place in the original layout ({len(homeless)} in all)")
        out: dict[str, Tensor] = {}
        dtype = next(t.dtype for n, t in tensors.items() if ".dy_" not in f".{n}")
        for rule in rules:
            for original, tensor in zip(rule.originals, rule.back([tensors[n] for n in rule.ours]), strict=False):
                out[original] = tensor.to(dtype) if isinstance(rule, Computed) else tensor
    except ValueError as error:
        raise ValueError(_told_once(where, f"as {layout.title}", error)) from error
    return layout, out


def detect(names: Iterable[str], where: str) -> Layout:
    """The layout whose names are most like those of a file.

    Raises ValueError for a layout that cannot be converted, saying why, and for an unknown one.
    """
    found = {_generic(name) for name in names}
    known = _known_names()
    likeness = {title: len(found & known[title]) / len(found | known[title]) for title in known}
    title = max(likeness, key=lambda t: likeness[t])
    if likeness[title] < _LEAST_LIKENESS:
        first = next(iter(sorted(found - known[title])), "nothing")
        near = get_close_matches(first, sorted(set().union(*known.values())), n=1)
        resembles = f", which resembles {near[0]}" if near else ""
        raise ValueError(
            f"{where}: no known layout; it is most like {title} ({likeness[title]:.0%} of the names in common), "
            f"but holds {first}{resembles}; known are {', '.join(known)}"
        )
    for layout in LAYOUTS:
        if title == layout.title:
            return layout
    raise ValueError(f"{where}: has the names of {title} already; nothing to convert")


def layout_of(config: Config, where: str) -> Layout:
    """The original layout that holds a model with this ``config.json``; ValueError if there is none, saying why."""
    name, layouts = config.get("_class_name"), (*LAYOUTS, DIT_COMPLETE)
    fitting = [layout for layout in layouts if layout.target == name]
    if not fitting:
        known = ", ".join(dict.fromkeys(layout.target for layout in layouts))
        raise ValueError(f"{where}: no original layout for {name}; there is one for {known}")
    reasons = []
    for layout in fitting:
        settings = _defaults(layout) | config
        flat = settings | {f"dynamic.{k}": v for k, v in asdict(DynamicConfig(**settings.get("dynamic") or {})).items()}
        wrong = [f"{k} {v!r}, not {flat[k]!r}" for k, v in layout.settings.items() if flat[k] != v]
        if not wrong:
            return layout
        reasons.append(f"{layout.title} has {wrong[0]}")
    raise ValueError(f"{where}: no original layout holds this {name}: {'; '.join(reasons)}")


def expected_originals(layout: Layout, config: Config) -> Shapes:
    """Names and shapes of the original file that belongs to a ``config.json``."""
    meta = {name: torch.empty(size, device="meta") for name, size in target_shapes(layout, config).items()}
    return {
        name: tuple(tensor.shape)
        for rule in layout.rules(config)
        for name, tensor in zip(rule.originals, rule.back([meta[n] for n in rule.ours]), strict=False)
    }


def target_shapes(layout: Layout, config: Config) -> Shapes:
    """Names and shapes of the model that belongs to a ``config.json``."""
    cls: Any = _CLASSES[layout.target]
    with init_empty_weights():
        model = cls(**{name: config[name] for name in _defaults(layout) if name in config})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _defaults(layout: Layout) -> Config:
    """The base class's settings with their defaults."""
    parameters = inspect.signature(_CLASSES[layout.target].__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _known_names() -> dict[str, set[str]]:
    """Names with their numbers blanked out, by layout; those of diffusers' (or our) models too."""
    rules: dict[str, list[Rule]] = {layout.title: layout.rules(_SMALLEST) for layout in LAYOUTS}
    known = {title: {_generic(n) for rule in rules[title] for n in rule.originals} for title in rules}
    for layout in LAYOUTS:
        known[layout.target] = {_generic(n) for rule in rules[layout.title] for n in rule.ours}
    return known


def _generic(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _without_prefix(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """ValueError naming the first missing name, else the first surplus one, else the first wrong shape."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    if missing:
        near = get_close_matches(missing[0], surplus, n=1)
        instead = f"; {near[0]} is there, which it resembles" if near else ""
        raise ValueError(f"{what}, but {missing[0]} is missing ({len(missing)} in all){instead}")
    if surplus:
        near = get_close_matches(surplus[0], expected, n=1)
        resembles = f"; it resembles {near[0]}" if near else ""
        raise ValueError(f"{what}, but {surplus[0]} does not belong there ({len(surplus)} in all){resembles}")
    for name, size in expected.items():
        if tuple(found[name].shape) != size:
            raise ValueError(f"{what}, but {name} has shape {list(found[name].shape)} where {list(size)} is expected")


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """ValueError naming the first weight of another dtype than most. Routers may stay in fp32 under other base weights,
    and unit tables hold integers."""
    weights = {name: t for name, t in tensors.items() if not name.endswith("_unit")}
    for routers in (False, True):
        dtypes = {name: t.dtype for name, t in weights.items() if (".dy_" in f".{name}") is routers}
        if not dtypes:
            continue
        ((usual, _),) = Counter(dtypes.values()).most_common(1)
        for name, dtype in dtypes.items():
            if dtype != usual or not dtype.is_floating_point:
                raise ValueError(f"{name} is {dtype} among weights of {usual}; expected one floating-point type")


def _told_once(where: str, what: str, error: ValueError) -> str:
    """The error's text, opened with the file and its layout where it does not say them itself."""
    return str(error) if str(error).startswith(where) else f"{where}: {what}: {error}"
