"""What of a run goes into a checkpoint's tensors, under the same names for every engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dydit_scale.checkpoint.store import Checkpoint
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import MOMENTS, Engine

OPTIMIZER_UPDATES, EMA_UPDATES = "count.optimizer", "count.ema"


def capture(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """All tensors of a run (fp32, full, CPU) on rank 0, {} elsewhere. Collective.

    param.<name>, exp_avg.<name>, exp_avg_sq.<name>, ema.<name>, and the 0-d counts of applied steps count.optimizer
    and count.ema. Frozen parameters are not among them: they come from the base model.
    """
    tensors = {f"param.{name}": tensor for name, tensor in engine.trainable_state().items()}
    for name, tensor in engine.optimizer_state().items():
        tensors[OPTIMIZER_UPDATES if name == "step" else name] = tensor
    if ema is not None:
        averages = ema.state()
        if engine.world.is_main:
            tensors |= {f"ema.{name}": tensor for name, tensor in averages.items()}
            tensors[EMA_UPDATES] = torch.tensor(ema.updates)
    return tensors


def restore(checkpoint: Checkpoint, engine: Engine, ema: Ema | None) -> None:
    """Put a run back where ``capture`` found it, under any engine and number of ranks. Collective.

    Raises ValueError, naming the first tensor, if checkpoint and run do not hold the same names and shapes.
    """
    tensors = checkpoint.tensors
    known = {"param", "ema", "count", *MOMENTS}
    if strangers := [name for name in tensors if name.partition(".")[0] not in known]:
        raise ValueError(f"{checkpoint.path}: {strangers[0]} is not part of a {sorted(known)} checkpoint")
    if (ema is not None) != (EMA_UPDATES in tensors):
        has = "an average" if EMA_UPDATES in tensors else "no average"
        raise ValueError(f"{checkpoint.path}: holds {has} of the weights, the run expects the opposite; change ema")
    optimizer = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in MOMENTS}
    if OPTIMIZER_UPDATES in tensors:
        optimizer["step"] = tensors[OPTIMIZER_UPDATES]
    try:
        engine.load(_named(tensors, "param."), optimizer)
        if ema is not None:
            ema.load(_named(tensors, "ema."), int(tensors[EMA_UPDATES]))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
