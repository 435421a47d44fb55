"""What of a run goes into a checkpoint's tensors, under the same names for every engine."""

from __future__ import annotations

import torch

from dydit_scale.checkpoint.parts import Part, Parts, whole
from dydit_scale.checkpoint.store import Checkpoint
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import MOMENTS, Engine, EngineConfig
from dydit_scale.parallel.lazy import Renamed

OPTIMIZER_UPDATES, EMA_UPDATES = "count.optimizer", "count.ema"


def capture(engine: Engine, ema: Ema | None) -> Parts:
    """What this rank holds of a run: live fp32 pieces, not copied; no communication.

    param.<name>, exp_avg.<name>, exp_avg_sq.<name>, ema.<name>, and from rank 0 the 0-d counts of applied steps
    count.optimizer and count.ema. Frozen parameters are not among them: they come from the base model.
    """
    parts: Parts = {}
    if engine.owns_pieces:
        kinds = {"param": engine.local_parameters(), **engine.local_moments()}
        if ema is not None:
            kinds["ema"] = ema.local
        pieces = engine.pieces
        for kind, local in kinds.items():
            for name, tensor in local.items():
                if tensor.numel() or not engine.shapes[name].numel():
                    parts[f"{kind}.{name}"] = Part(tensor, engine.shapes[name], pieces[name].start)
    if engine.world.is_main:
        counts = {OPTIMIZER_UPDATES: engine.updates} | ({EMA_UPDATES: ema.updates} if ema is not None else {})
        parts |= whole({name: torch.tensor(count) for name, count in counts.items()})
    return parts


def restore(checkpoint: Checkpoint, engine: Engine, ema: Ema | None) -> None:
    """Put a run back where ``capture`` found it, under any engine and number of ranks. Collective.

    Each rank reads its own pieces, one at a time. Raises ValueError, naming the first tensor, if checkpoint and run do
    not hold the same names and shapes.
    """
    tensors = checkpoint.tensors
    known = {"param", "ema", "count", *MOMENTS}
    if strangers := [name for name in tensors if name.partition(".")[0] not in known]:
        raise ValueError(f"{checkpoint.path}: {strangers[0]} is not part of a {sorted(known)} checkpoint")
    if (ema is not None) != (EMA_UPDATES in tensors):
        has = "an average" if EMA_UPDATES in tensors else "no average"
        raise ValueError(f"{checkpoint.path}: holds {has} of the weights, the run expects the opposite; change ema")
    optimizer = {name: name for name in tensors if name.partition(".")[0] in MOMENTS}
    if OPTIMIZER_UPDATES in tensors:
        optimizer["step"] = OPTIMIZER_UPDATES
    try:
        engine.load(of_kind(checkpoint, "param"), Renamed(tensors, optimizer))
        if ema is not None:
            ema.load(of_kind(checkpoint, "ema"), int(tensors[EMA_UPDATES]))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def of_kind(checkpoint: Checkpoint, kind: str) -> Renamed:
    """The tensors ``kind``.<name> (param, ema, exp_avg, exp_avg_sq) as <name>; each is read when it is asked for."""
    names = (name for name in checkpoint.tensors if name.startswith(f"{kind}."))
    return Renamed(checkpoint.tensors, {name.removeprefix(f"{kind}."): name for name in names})


def engine_name(config: EngineConfig) -> str:
    """For the manifest: single, fsdp, zero1, zero2 or zero3."""
    return f"zero{config.zero_stage}" if config.name == "zero" else config.name
