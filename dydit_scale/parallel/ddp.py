"""Data parallel: every rank holds everything, gradients are averaged once a step. For adapters: theirs are small.

torch's DistributedDataParallel would overlap that with the backward, but it counts each forward, and a step here has
several before its backward; and there is little to overlap.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dydit_scale.parallel.reduce import sum_tensor
from dydit_scale.parallel.single import SingleEngine

_BUCKET = 1 << 24  # elements, 64 MiB of gradients


class DdpEngine(SingleEngine):
    """``SingleEngine`` on each rank, with the mean of all ranks' gradients."""

    @property
    def owns_pieces(self) -> bool:
        return self.world.is_main

    def gather(self, local: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        return super().gather(local, names) if self.world.is_main else {}

    @torch.no_grad()
    def _complete(self, grads: Sequence[Tensor]) -> None:
        for bucket in _buckets(grads):
            flat = torch.cat([grad.flatten() for grad in bucket])
            sum_tensor(flat).div_(self.world.world_size)
            for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(mean.view_as(grad))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket
