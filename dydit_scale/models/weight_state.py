"""Whether a model's weights are still those that its packed sub-networks were cut from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dydit_scale.dynamic.weight_only import is_plain


class Held(NamedTuple):
    """A parameter or buffer, and where its module keeps it."""

    registry: dict[str, Any]
    name: str
    tensor: Tensor


class WeightState:
    """The parameters and buffers of a model as they are when this is made.

    ``still_holds`` reads nothing from the device. It sees other tensors (``load_state_dict(assign=True)``), other
    memory (``p.data = ...``) and changes in place, which torch counts in ``_version``. ``have_contents`` sees, by the
    first element of each plain weight, those that torch does not count: ``p.data.copy_(...)``, as in diffusers'
    ``EMAModel.copy_to``. A write through ``.data`` that leaves all first elements as they were goes unseen.

    Args:
        followed: modules that the sub-networks share with the model, and which may change therefore.
    """

    def __init__(self, model: nn.Module, followed: Iterable[nn.Module] = ()) -> None:
        left_out = {id(module) for root in followed for module in root.modules()}
        self._note(
            [
                Held(registry, name, tensor)
                for module in model.modules()
                if id(module) not in left_out
                for registry in (module._parameters, module._buffers)
                for name, tensor in registry.items()
                if tensor is not None
            ]
        )

    def _note(self, held: list[Held]) -> None:
        self._held, self._broken = held, False
        tensors = [at.tensor for at in held]
        plain = [tensor for tensor in tensors if is_plain(tensor) and not tensor.is_meta and tensor.numel()]
        self._counting = [tensor for tensor in tensors if not tensor.is_inference()]  # others have no version
        self._versions = [tensor._version for tensor in self._counting]
        self._plain, self._places = plain, [tensor.data_ptr() for tensor in plain]
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in plain:
            first = tensor.detach()[(slice(1),) * tensor.ndim].view(1)
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(first)
        self._firsts = [(views, _bits(views)) for views in by_kind.values()]

    def still_holds(self) -> bool:
        """Whether all of them are the same tensors, and none was written to that torch knows of."""
        return (
            not self._broken
            and all(registry.get(name) is tensor for registry, name, tensor in self._held)
            and [tensor._version for tensor in self._counting] == self._versions
            and [tensor.data_ptr() for tensor in self._plain] == self._places
        )

    def have_contents(self) -> bool:
        """Whether their first elements are what they were; a GPU is waited for."""
        return all(torch.equal(_bits(views), bits) for views, bits in self._firsts)

    # A copy's tensors start at other versions in other places.
    def __getstate__(self) -> dict[str, Any]:
        return {"held": self._held, "broken": not (self.still_holds() and self.have_contents())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._note(state["held"])
        self._broken = state["broken"]


def _bits(views: list[Tensor]) -> Tensor:
    """Of the elements; NaN equals itself in them."""
    return torch.cat(views).view(torch.uint8)
