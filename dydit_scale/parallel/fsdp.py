"""torch FSDP2: parameters, gradients and moments sharded over the ranks (ZeRO-3 in DeepSpeed's words)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dydit_scale.parallel.engine import AdamWConfig, EngineConfig, ParamGroup, Piece
from dydit_scale.parallel.reduce import sum_tensor
from dydit_scale.parallel.single import SingleEngine
from dydit_scale.parallel.world import World, ensure_group, same_timeout


class FsdpEngine(SingleEngine):
    """Each shard unit is gathered for its own forward and backward; the root holds what is left.

    Gradients are reduced after every micro-batch and accumulate as shards: holding them whole until the last one
    would save traffic and cost the memory that sharding is for.
    """

    def __init__(
        self,
        config: EngineConfig,
        network: nn.Module,
        groups: Sequence[ParamGroup],
        world: World,
        adamw: AdamWConfig,
        shard_units: Sequence[nn.Module],
    ) -> None:
        ensure_group(world)
        ranks = config.shard_ranks or world.world_size
        if world.world_size % ranks:
            raise ValueError(f"engine.shard_ranks: {world.world_size} ranks make no groups of {ranks}")
        self.copies = world.world_size // ranks
        hybrid = {"mesh_shape": (self.copies, ranks), "mesh_dim_names": ("replicate", "shard")}
        mesh = init_device_mesh(world.device.type, **(hybrid if self.copies > 1 else {"mesh_shape": (ranks,)}))
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": config.reshard}
        if config.offload == "parameters":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        for unit in (*shard_units, network):
            fully_shard(unit, **options)
        same_timeout()  # the groups of a mesh have torch's own
        super().__init__(config, network, _sharded(network, groups), world, adamw)

    @property
    def pieces(self) -> dict[str, Piece]:
        pieces = {}
        for name in self.params:
            like, local = self._param(name), self._param(name).to_local()
            # shards along the first dimension, as torch.chunk cuts it: each is one run of elements
            rows = -(-like.shape[0] // like.device_mesh.size(-1))
            start = min(rows * like.device_mesh.get_local_rank(-1), like.shape[0])
            pieces[name] = Piece(start * like.shape[1:].numel(), local.numel())
        return pieces

    def refresh(self) -> None:
        # a forward without backward leaves the root gathered, and the next forward would use it as it is
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather(self, local: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        full = {}
        for name in local if names is None else names:
            tensor = self._as_dtensor(name, local[name]).full_tensor()
            if self.world.is_main:
                full[name] = tensor.to("cpu", copy=True)
        return full

    def _as_dtensor(self, name: str, shard: Tensor) -> DTensor:
        like = self._param(name)
        return DTensor.from_local(
            shard.to(self.world.device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def _param(self, name: str) -> DTensor:
        param = self.params[name]
        assert isinstance(param, DTensor), f"{name} was not sharded"
        return param

    @property
    def owns_pieces(self) -> bool:
        return self.copies == 1 or self._param(next(iter(self.params))).device_mesh.get_local_rank(0) == 0

    def _sum(self, x: Tensor) -> Tensor:
        return sum_tensor(x.to(self.world.device)) / self.copies


def _sharded(network: nn.Module, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """``groups`` with the sharded parameters that took the place of the given ones."""
    params = dict(network.named_parameters())
    return [replace(group, params={name: params[name] for name in group.params}) for group in groups]
