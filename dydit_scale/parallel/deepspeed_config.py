"""The DeepSpeed configuration of a run: generated, every value written out, with the user's own JSON laid over it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.world import World

_ELSEWHERE = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "engine.clip_norm",
    "optimizer": "train.lr, train.betas and train.weight_decay",
    "scheduler": "train.warmup_steps and train.final_lr",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload",
    "zero_optimization.offload_param.device": "engine.offload",
    "activation_checkpointing": "train.gradient_checkpointing",
    "compile": "engine.compile",
}
"""What belongs to the recipe, and where it stands there."""
_FIXED = ("communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor", "elasticity",
          "zero_optimization.ignore_unused_parameters", "zero_optimization.round_robin_gradients")  # fmt: skip
"""What every engine has in common, so that all of them compute the same and read each other's checkpoints."""


def deepspeed_config(config: EngineConfig, world: World, accumulation: int) -> dict[str, Any]:
    """Every value that touches the numbers, written out: DeepSpeed's own defaults clip at 1.0 and change over time.

    Raises ValueError if ``config.deepspeed`` names no JSON object, or if it contradicts the recipe.
    """
    generated = _generated(config, world, accumulation)
    if config.deepspeed is None:
        return generated
    return _merged(generated, _read(config.deepspeed), config.deepspeed, "")


def _generated(config: EngineConfig, world: World, accumulation: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        # elements; DeepSpeed's own 5e8 is a buffer of 2 GB on every rank
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "sub_group_size": 1_000_000_000,
    }
    pinned = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if config.offload != "none":
        zero["offload_optimizer"] = dict(pinned)
    if config.offload == "parameters":
        zero["offload_param"] = dict(pinned)
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
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the CPU as well
        "wall_clock_breakdown": False,
        "steps_per_print": None,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"engine.deepspeed: {path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"engine.deepspeed: {path}: expected a JSON object, got {type(values).__name__}")
    return values


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], path: str, where: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        name, ours = f"{where}{key}", base.get(key)
        if _agrees(value, ours):
            continue
        text = f"engine.deepspeed: {path}: {name} is {json.dumps(value)}"
        if name == "zero_optimization.offload_optimizer.device" and value == "nvme":
            raise ValueError(f"{text}: what lies there cannot be averaged and saved; only parameters can go there")
        if name == "zero_optimization.offload_param.device" and (value, ours) == ("nvme", "cpu"):
            merged[key] = value
            continue
        if name in _ELSEWHERE:
            said = "nothing" if key not in base else json.dumps(ours)
            raise ValueError(f"{text}, the recipe says {said}; take it out, and set {_ELSEWHERE[name]} in the recipe")
        if name in _FIXED:
            raise ValueError(f"{text}, here it is {json.dumps(ours)} for every engine; take it out")
        nested = isinstance(value, Mapping)
        merged[key] = _merged(ours if isinstance(ours, dict) else {}, value, path, f"{name}.") if nested else value
    return merged


def _agrees(value: Any, ours: Any) -> bool:
    """True if ``value`` asks for nothing else than what is there; "auto" is how others say "as the program likes"."""
    if isinstance(value, Mapping):
        have = ours if isinstance(ours, dict) else {}
        return all(_agrees(v, have.get(k)) for k, v in value.items())
    return value in ("auto", ours) or (ours is None and value in (None, False, "none"))
