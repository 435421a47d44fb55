"""What a step would allocate, found by running it on tensors without contents."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_IN_FP32 = frozenset(
    {
        torch.nn.functional.layer_norm,
        torch.layer_norm,
        torch.nn.functional.rms_norm,
        torch.rms_norm,
        torch.nn.functional.group_norm,
        torch.group_norm,
        torch.nn.functional.softmax,
        torch.softmax,
        Tensor.softmax,
        torch.nn.functional.mse_loss,
        torch.pow,
        Tensor.pow,
        Tensor.__pow__,
        torch.exp,
        Tensor.exp,
        torch.log,
        Tensor.log,
        torch.rsqrt,
        Tensor.rsqrt,
        torch.cumsum,
        Tensor.cumsum,
        torch.sum,
        Tensor.sum,
    }
)
"""What autocast computes in fp32 on a GPU and leaves in bf16 on a CPU (of ATen/autocast_mode.h, AT_FORALL_FP32), as far
as the models call it."""


class CudaAutocast(TorchFunctionMode):
    """Lets autocast on the CPU cast as it does on a GPU; ``on`` False changes nothing."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self._on = on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._on and func in _IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_float, (args, kwargs))
        return func(*args, **kwargs)


def _float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype is torch.bfloat16 else x


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that still live.

    Args:
        grown: Called with the bytes each time they have grown.
        freed: Called with the ``era`` in which a storage was made, and its bytes, when it is freed.
    """

    def __init__(self, grown: Callable[[int], None], freed: Callable[[int, int], None]) -> None:
        super().__init__()
        self.live, self.era = 0, 0
        self._grown, self._freed = grown, freed
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Count no storage of this tensor, which was there before."""
        self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = self.live
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._add(storage, storage.nbytes())
        if self.live > before:
            self._grown(self.live)
        return out

    def _add(self, storage: Any, size: int) -> None:
        key, era = storage._cdata, self.era
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size
            self._freed(era, size)

        self.live += size
        self._known[key] = weakref.ref(storage, freed)
