"""Small reductions over the ranks. With one process each of them returns what it was given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks that take part in a reduction."""
    return dist.get_world_size() if dist.is_initialized() else 1


def global_mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over the ranks as value, with the gradient of the local ``x``; any shape, equal on all ranks.

    For a loss that is a nonlinear function f of a batch statistic, such as the squared gap between the mean cost and
    its target. Let W ranks hold x_r(theta), all with the same theta, and m = (1/W) sum_r x_r. Wanted is

        d f(m) / d theta = f'(m) (1/W) sum_r d x_r / d theta.

    Here rank r gets y_r with the value m and d y_r / d x_r = 1, so its local gradient is f'(m) d x_r / d theta. The
    engine averages the gradients over ranks, which gives (1/W) sum_r f'(m) d x_r / d theta: the same. Differentiating
    the mean itself would count 1/W twice. It is written m + (x - stop(x)), so that the value is m without rounding.

    The sum is taken in fp32 at least, whatever the dtype of ``x``. Collective.
    """
    ranks = world_size()
    if ranks == 1:
        return x
    mean = x.detach().to(torch.promote_types(x.dtype, torch.float32)).clone()
    dist.all_reduce(mean)
    return (mean / ranks).to(x.dtype) + (x - x.detach())


def max_flag(flag: bool) -> bool:
    """True on every rank if ``flag`` is true on any. Collective."""
    if world_size() == 1:
        return flag
    box = torch.tensor(int(flag), dtype=torch.int32, device=_collective_device())
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box.item())


def mean_values(values: Mapping[str, float]) -> dict[str, float]:
    """Each of ``values`` averaged over the ranks in one reduction (fp64); the same names in the same order on all."""
    if world_size() == 1:
        return dict(values)
    box = torch.tensor(list(values.values()), dtype=torch.float64, device=_collective_device())
    dist.all_reduce(box)
    return dict(zip(values, (box / world_size()).tolist(), strict=True))


def sum_tensor(x: Tensor) -> Tensor:
    """``x`` summed over the ranks, in place and without gradient; on the device of this rank. Collective."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast_module(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, in place, so that differently seeded ranks start alike."""
    if world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        flat = tensor.detach().contiguous().reshape(-1)
        # as bytes: gloo has no broadcast for every dtype (bool, float8)
        dist.broadcast(flat.view(torch.uint8), src=0)
        tensor.detach().copy_(flat.view_as(tensor))


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
