"""Runs that stop, save and go on elsewhere: python -m tests.checkpoint.resume OUT, once per rank."""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_scale.checkpoint.folder import checkpoint_path, list_checkpoints
from dydit_scale.checkpoint.parts import Parts, whole
from dydit_scale.checkpoint.state import EMA_UPDATES, OPTIMIZER_UPDATES, capture, restore
from dydit_scale.checkpoint.store import CheckpointError, load_checkpoint
from dydit_scale.checkpoint.writer import CheckpointWriter, save_checkpoint
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.world import World, close, init_world
from tests.parallel.toy import as_lists, config_of, losses_of, make_toy, toy_engine

SOURCES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
TARGETS = ("ddp", "zero2", "zero3", "fsdp")
HALF, STEPS = 3, 6


def start(world: World, name: str, *, spoiled: bool = False) -> Ema:
    """An engine and its average; ``spoiled`` weights must all be replaced by a restore."""
    toy = make_toy()
    if spoiled:
        for param in toy.parameters():
            if param.requires_grad:
                param.data += 1.0
    return Ema(toy_engine(config_of(name), world, toy=toy), decay=0.9)


def go(ema: Ema, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses += losses_of(ema.engine, range(step, step + 1))
        ema.update()
    return losses


def save(out: Path, world: World, name: str) -> dict[str, Any]:
    """Train half, save, and train the rest without interruption: the reference."""
    ema = start(world, name)
    go(ema, range(HALF))
    writer = CheckpointWriter(out / f"{name}@{world.world_size}", world, engine=name)
    writer.save(HALF, capture(ema.engine, ema), {"consumed": 24})
    losses = go(ema, range(HALF, STEPS))  # while it is written
    writer.wait()
    return {"losses": losses, "end": as_lists(gathered(ema))}


def gathered(ema: Ema) -> dict[str, Tensor]:
    """What a checkpoint holds, whole, on rank 0."""
    state = {f"param.{name}": tensor for name, tensor in ema.engine.trainable_state().items()}
    state |= {OPTIMIZER_UPDATES if k == "step" else k: v for k, v in ema.engine.optimizer_state().items()}
    averages = ema.state()
    if not ema.engine.world.is_main:
        return {}
    return state | {f"ema.{k}": v for k, v in averages.items()} | {EMA_UPDATES: torch.tensor(ema.updates)}


def resume(out: Path, world: World, source: str, name: str) -> dict[str, Any]:
    ema = start(world, name, spoiled=True)
    checkpoint = load_checkpoint(out / source, world=world)
    assert checkpoint is not None and checkpoint.step == HALF and checkpoint.meta == {"consumed": 24}
    restore(checkpoint, ema.engine, ema)
    return {"losses": go(ema, range(HALF, STEPS)), "end": as_lists(gathered(ema))}


def on_main(world: World, tensors: dict[str, Tensor]) -> Parts:
    return whole(tensors) if world.is_main else {}


def together(out: Path, world: World) -> dict[str, Any]:
    """Failures that only one rank sees at first."""
    blocked = out / "blocked"
    if world.is_main:
        blocked.write_text("a file where the folder should be")
    try:
        save_checkpoint(blocked, 1, {}, {}, world=world)
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    folder = out / "damaged"
    for step in (1, 2):
        save_checkpoint(folder, step, on_main(world, {"x": torch.tensor(step)}), {}, world=world)
    if world.is_main:
        next(checkpoint_path(folder, 2).glob("*.safetensors")).write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        older = load_checkpoint(folder, world=world)
    assert older is not None
    nothing = load_checkpoint(out / "empty", world=world)
    return {"refused": refused, "step": older.step, "x": int(older.tensors["x"]), "nothing": nothing}


def main(out: Path) -> None:
    world = init_world(timedelta(minutes=3), device="cpu")
    results: dict[str, Any] = {"together": together(out, world)}
    for name in SOURCES:
        results[f"{name}@2"] = save(out, world, name)
    for folder in ["single@1", *(f"{name}@2" for name in SOURCES)]:
        assert list_checkpoints(out / folder)
        for name in TARGETS:
            results[f"{folder} -> {name}@2"] = resume(out, world, folder, name)
    (out / f"rank{world.rank}.json").write_text(json.dumps(results))
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
