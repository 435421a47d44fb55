"""What a conversion has to know about a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dydit_scale.models.keys.rules import Rule

Config = dict[str, Any]
Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout of checkpoints, and the model class that takes it."""

    title: str
    """For messages."""
    target: str
    """Name of the class that takes the weights, as in ``config.json``."""
    config: Callable[[Tensors, int | None], Config]
    """``config.json`` from the shapes of an original file, and the number of heads if the user gives it."""
    rules: Callable[[Config], list[Rule]]
    """All rules of a model with this ``config.json``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a model's ``config.json`` must say (``dynamic.heads``: in its ``dynamic``) for this layout to hold it."""
    wrapper: str | None = None
    """Key under which the original's ``.pt`` files hold the weights."""
    note: str = ""
    """What a user should know about the result."""


def shape(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor from which the config is read. ValueError if it is missing or has other axes."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    found = tuple(tensors[name].shape)
    if len(found) != axes or 0 in found:
        raise ValueError(f"{name}: expected {axes} axes, got shape {list(found)}")
    return found


def depth(tensors: Tensors, prefix: str) -> int:
    """How many blocks ``prefix.0``, ``prefix.1``, ... there are. ValueError if there is none, or a hole."""
    numbers = {name.split(".")[1] for name in tensors if name.startswith(f"{prefix}.")}
    for i in range(len(numbers) or 1):
        if str(i) not in numbers:
            raise ValueError(f"{prefix}.{i} is missing")
    return len(numbers)


def divided(dim: int, heads: int) -> int:
    """Channels of a head. ValueError if they do not come out even."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{dim} channels cannot be cut into {heads} heads; give another number (--heads)")
    return dim // heads
