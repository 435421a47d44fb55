"""DeepSpeed ZeRO: the moments are shared out over the ranks; from stage 2 the gradients too; in stage 3 the weights."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dydit_scale.parallel.deepspeed_config import deepspeed_config
from dydit_scale.parallel.engine import MOMENTS, AdamWConfig, Engine, EngineConfig, ParamGroup, Piece, StepResult
from dydit_scale.parallel.reduce import sum_tensor
from dydit_scale.parallel.single import build_adamw, start_moments
from dydit_scale.parallel.world import World, ensure_group, same_timeout


class Place(NamedTuple):
    """Where this rank's piece of one parameter lies in its flat fp32 buffers."""

    group: int
    start: int
    piece: Piece


class ZeroEngine(Engine):
    """DeepSpeed's engine around torch's AdamW, which steps one flat fp32 buffer per group and rank."""

    def __init__(
        self,
        config: EngineConfig,
        network: nn.Module,
        groups: Sequence[ParamGroup],
        world: World,
        adamw: AdamWConfig,
        accumulation: int,
    ) -> None:
        super().__init__(config, network, groups, world)
        ensure_group(world)
        deepspeed = load_deepspeed(world)
        self.optimizer = build_adamw(groups, adamw)
        self.deepspeed, *_ = deepspeed.initialize(
            model=network,
            optimizer=self.optimizer,
            config=deepspeed_config(config, world, accumulation),
            dist_init_required=False,
        )
        same_timeout()  # DeepSpeed's groups would wait half an hour for a lost peer
        self.module = self.deepspeed
        self.optimizer.state.clear()  # from here on it steps flat buffers
        self.flat = self._flat_buffers()
        for flat in self.flat:
            start_moments(self.optimizer, flat)
        places = ((name, self._place(param)) for group in self.groups for name, param in group.params.items())
        self.places = {name: place for name, place in places if place is not None and place.piece.numel}
        self._ready = False

    def _flat_buffers(self) -> list[Tensor]:
        """What AdamW steps on this rank, in fp32."""
        return [settings["params"][0] for settings in self.optimizer.param_groups]

    def _place(self, param: nn.Parameter) -> Place | None:
        """Where this rank holds ``param``, by DeepSpeed's own map; None if it lies with the others."""
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        whole = mapping.lp_fragment_address
        return Place(mapping.param_group_index, mapping.hp_fragment_address.start, Piece(whole.start, whole.numel))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        self._ready = last

    def step(self, lr_scale: float, *, frozen: bool = False) -> StepResult:
        assert self._ready, "step() before backward(last=True)"
        self._ready = False
        self._set_lr(lr_scale, frozen)
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(norm, self.deepspeed.was_step_applied())

    def local_parameters(self) -> dict[str, Tensor]:
        return self._views([flat.detach() for flat in self.flat])

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        return {kind: self._views([self.optimizer.state[flat][kind] for flat in self.flat]) for kind in MOMENTS}

    def _views(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: flats[p.group].narrow(0, p.start, p.piece.numel) for name, p in self.places.items()}

    @property
    def pieces(self) -> dict[str, Piece]:
        return {name: place.piece for name, place in self.places.items()}

    def refresh(self) -> None:
        self.deepspeed.optimizer.update_lp_params()

    def gather(self, local: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        full = {}
        for name in self.shapes if names is None else names:
            shape = self.shapes[name]
            flat = torch.zeros(shape.numel(), device=self.world.device)
            if name in local:
                flat.narrow(0, *self.places[name].piece).copy_(local[name])
            sum_tensor(flat)
            if self.world.is_main:
                full[name] = flat.view(shape).cpu()
        return full

    @property
    def updates(self) -> int:
        return int(self.optimizer.state[self.flat[0]]["step"])

    @updates.setter
    def updates(self, value: int) -> None:
        for flat in self.flat:
            self.optimizer.state[flat]["step"].fill_(value)


class Zero3Engine(ZeroEngine):
    """Stage 3: a parameter is cut into equal pieces, one per rank, the last ones padded."""

    def _flat_buffers(self) -> list[Tensor]:
        return list(self.deepspeed.optimizer.fp32_partitioned_groups_flat)

    def _place(self, param: nn.Parameter) -> Place | None:
        stage3, of_rank = self.deepspeed.optimizer, param.partition_numel()  # type: ignore[attr-defined]
        group, start, _ = stage3.grad_position[stage3.get_param_id(param)]
        first = of_rank * self.world.rank
        return Place(group, start, Piece(first, max(0, min(of_rank, param.ds_numel - first))))  # type: ignore[attr-defined]

    def refresh(self) -> None:
        stage3 = self.deepspeed.optimizer
        stage3._partition_all_parameters()  # a forward without backward leaves some of them gathered
        for group in range(len(self.flat)):
            stage3._reassign_or_swap_out_partitioned_parameters(group)
        if small := stage3.persistent_parameters:
            small[0].all_gather(small)


def load_deepspeed(world: World) -> Any:
    """The deepspeed module, set up for the device of ``world``; it chooses its accelerator when first imported."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    accelerator = deepspeed.get_accelerator().device_name()
    if accelerator != world.device.type:
        raise ValueError(f"deepspeed: expected {world.device.type}, runs on {accelerator}; set DS_ACCELERATOR to match")
    if accelerator == "cpu":
        # DeepSpeed would try its compilers on every kernel it knows, then compile a shared-memory all-reduce if it
        # could. None of them is used here and gloo reduces as well, so it is told beforehand that none will work.
        vars(deepspeed.ops).setdefault("__compatible_ops__", defaultdict(bool))["deepspeed_shm_comm"] = False
    return deepspeed
