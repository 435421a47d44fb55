"""DeepSpeed ZeRO stages 1 and 2: every rank has all weights; moments (and gradients) are shared out."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dydit_scale.parallel.engine import MOMENTS, AdamWConfig, Engine, EngineConfig, ParamGroup, StepResult
from dydit_scale.parallel.reduce import sum_tensor
from dydit_scale.parallel.single import build_adamw, start_moments
from dydit_scale.parallel.world import World, ensure_group


class Piece(NamedTuple):
    """The part of one parameter that lies in this rank's flat fp32 buffer of one group."""

    group: int
    flat_start: int  # in the flat buffer
    param_start: int  # in the flattened parameter
    numel: int


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
        deepspeed = _import_deepspeed(world)
        self.optimizer = build_adamw(groups, adamw)
        self.deepspeed, *_ = deepspeed.initialize(
            model=network,
            optimizer=self.optimizer,
            config=deepspeed_config(config, world, accumulation),
            dist_init_required=False,
        )
        self.module = self.deepspeed
        self.optimizer.state.clear()  # the moments of the parameters; from here on it steps flat buffers
        self.flat: list[Tensor] = [settings["params"][0] for settings in self.optimizer.param_groups]
        for flat in self.flat:
            start_moments(self.optimizer, flat)
        self.pieces = {name: piece for name, param in self._params() if (piece := _piece(param)) is not None}
        self._ready = False

    def _params(self) -> list[tuple[str, nn.Parameter]]:
        return [item for group in self.groups for item in group.params.items()]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        self._ready = last

    def step(self, lr_scale: float) -> StepResult:
        assert self._ready, "step() before backward(last=True)"
        self._ready = False
        for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = group.lr * lr_scale
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(norm, self.deepspeed.was_step_applied())

    def local_parameters(self) -> dict[str, Tensor]:
        return self._views([flat.detach() for flat in self.flat])

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        return {kind: self._views([self.optimizer.state[flat][kind] for flat in self.flat]) for kind in MOMENTS}

    def _views(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: flats[p.group].narrow(0, p.flat_start, p.numel) for name, p in self.pieces.items()}

    def refresh(self) -> None:
        self.deepspeed.optimizer.update_lp_params()

    def gather(self, local: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        full = {}
        for name in self.shapes if names is None else names:
            shape = self.shapes[name]
            flat = torch.zeros(shape.numel(), device=self.world.device)
            if name in local:
                piece = self.pieces[name]
                flat.narrow(0, piece.param_start, piece.numel).copy_(local[name])
            sum_tensor(flat)
            if self.world.is_main:
                full[name] = flat.view(shape).cpu()
        return full

    def scatter(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: full[name].reshape(-1).narrow(0, piece.param_start, piece.numel).to(self.world.device, torch.float32)
            for name, piece in self.pieces.items()
        }

    @property
    def updates(self) -> int:
        return int(self.optimizer.state[self.flat[0]]["step"])

    @updates.setter
    def updates(self, value: int) -> None:
        for flat in self.flat:
            self.optimizer.state[flat]["step"].fill_(value)


def _import_deepspeed(world: World) -> Any:
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


def _piece(param: nn.Parameter) -> Piece | None:
    """Where this rank holds ``param``, by DeepSpeed's own map; None if it lies with the others."""
    mapping = param._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    piece = Piece(
        mapping.param_group_index,
        mapping.hp_fragment_address.start,
        mapping.lp_fragment_address.start,
        mapping.lp_fragment_address.numel,
    )
    return piece if piece.numel else None


def deepspeed_config(config: EngineConfig, world: World, accumulation: int) -> dict[str, Any]:
    """Every value that touches the numbers, written out: DeepSpeed's own defaults clip at 1.0 and change over time."""
    return {
        # the engine never sees a batch; these three only have to agree with each other
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world.world_size,
        "gradient_clipping": config.clip_norm,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        # no lower-precision module: DeepSpeed would reduce the gradients of those in bf16
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
        },
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "steps_per_print": None,
    }
