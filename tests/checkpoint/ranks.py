"""Two ranks forked from one process that has torch loaded, so that many deaths cost little: python -m ... OUT."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dydit_scale.checkpoint.folder import list_checkpoints
from dydit_scale.checkpoint.parts import Part, Parts, whole
from dydit_scale.checkpoint.store import CheckpointError, load_checkpoint
from dydit_scale.checkpoint.writer import CheckpointWriter, SaveReport
from dydit_scale.parallel.world import World, close, init_world
from tests.parallel.launch import free_port

POINTS = (
    *((point, rank) for point in ("staged", "writing", "written") for rank in (0, 1)),
    *((point, 0) for point in ("before_commit", "after_rename", "pruning")),
)
CUT = 7
"""Where rank 1's piece of a tensor of 16 elements begins."""


def parts_of(step: int, world: World) -> Parts:
    """A tensor in two pieces, one that rank 1 holds alone, and a count of rank 0."""
    full = torch.arange(16.0).reshape(4, 4) + 100 * step
    mine = slice(0, CUT) if world.is_main else slice(CUT, 16)
    parts = {"param.cut": Part(full.flatten()[mine], full.shape, mine.start)}
    alone = {"count.optimizer": torch.tensor(step)} if world.is_main else {"param.other": torch.full((3,), float(step))}
    return parts | whole(alone)


def state_of(folder: Path) -> int | None:
    """The step of the newest checkpoint, all of whose tensors are of that step; None if there is none."""
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        return None
    step = checkpoint.step
    assert torch.equal(checkpoint.tensors["param.cut"], torch.arange(16.0).reshape(4, 4) + 100 * step)
    assert checkpoint.tensors["param.other"].tolist() == [step] * 3
    assert int(checkpoint.tensors["count.optimizer"]) == step and checkpoint.meta == {"consumed": 8 * step}
    return step


def save(writer: CheckpointWriter, step: int, *, must: bool = False) -> None:
    writer.save(step, parts_of(step, writer.world), {"consumed": 8 * step}, must=must)


def forked(ranks: int, action: Callable[[World], object], out: Path, fault: str) -> list[int]:
    """Run ``action`` once per rank, each in a process of its own; what it returns goes to OUT/rankN.json.

    Returns exit statuses, negative for a signal.
    """
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in where.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "DYDIT_FAULT": fault}
            try:
                world = init_world(timedelta(minutes=2), device="cpu")
                (out / f"rank{rank}.json").write_text(json.dumps(action(world)))
                close(world)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed(out: Path, point: str, rank: int) -> dict[str, Any]:
    """What a kill within the third save leaves of two ranks (one save is kept), and what a new start makes of it."""
    folder = out / f"{point}{rank}"

    def train(world: World) -> None:
        writer = CheckpointWriter(folder, world, keep=1)
        for step in (1, 2, 3):
            save(writer, step)
        writer.wait()

    # pruning is told the step that goes: in the third save the second
    step = 2 if point == "pruning" else 3
    codes = forked(2, train, out, f"checkpoint.{point}={step}@rank{rank}:kill")
    found = state_of(folder)
    writer = CheckpointWriter(folder, keep=1)
    writer.start()
    stale = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    again = state_of(folder)
    codes += forked(2, lambda world: save(CheckpointWriter(folder, world, keep=1), 4, must=True), out, "")
    names = sorted(path.name for path in folder.iterdir())
    return {"codes": codes, "found": found, "again": again, "stale": stale, "names": names, "end": state_of(folder)}


def failing(out: Path) -> dict[str, Any]:
    """Saves that fail on one rank: what both ranks are told, and that training goes on."""
    folder = out / "failing"

    def train(world: World) -> dict[str, Any]:
        reports: list[SaveReport] = []
        writer = CheckpointWriter(folder, world, tell=reports.append, failures=2)
        for step in (1, 2, 3, 4, 5, 6):
            save(writer, step)
        ends = []
        for end in (writer.wait, lambda: save(writer, 7, must=True)):
            try:
                end()
                ends.append("")
            except CheckpointError as error:
                ends.append(str(error))
        return {
            "told": [(r.step, r.path is not None, r.problem, r.failures) for r in reports],
            "bytes": [r.bytes for r in reports],
            "ends": ends,
        }

    faults = "checkpoint.written=2@rank1:enospc,checkpoint.staged=4@rank0:raise"
    faults += ",checkpoint.writing=6@rank1:raise,checkpoint.before_commit=7:raise"
    codes = forked(2, train, out, faults)
    told = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {"codes": codes, "told": told, "present": [path.name[-1] for path in list_checkpoints(folder)]}


def lost(out: Path) -> dict[str, Any]:
    """A process that no longer owns the run: both ranks end at once, and the folder is as it was."""
    folder = out / "lost"

    def train(world: World) -> str:
        calls = []

        def may_commit() -> None:
            calls.append(1)
            if len(calls) > 3:  # twice a save: the second save may write, but not commit
                raise RuntimeError("another process took over the run")

        writer = CheckpointWriter(folder, world, may_commit=may_commit, failures=9)
        save(writer, 1)
        save(writer, 2)
        try:
            writer.wait()
        except CheckpointError as error:
            return str(error)
        return ""

    codes = forked(2, train, out, "")
    told = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {"codes": codes, "told": told, "names": sorted(path.name for path in folder.iterdir())}


def shared_out(out: Path) -> dict[str, Any]:
    """Which files each rank hashes on load; and damage that only rank 1 reads."""
    folder = out / "shared"
    forked(2, lambda world: [save(CheckpointWriter(folder, world), step, must=True) for step in (1, 2)], out, "")
    files = sorted((folder / "step-0000000002").glob("*.safetensors"), key=lambda path: -path.stat().st_size)
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)

    def load(world: World) -> list[Any]:
        from dydit_scale.checkpoint import store

        read, real = [], store.check_content
        store.check_content = lambda path, file: (read.append(f"{path.name[-1]}/{file.name}"), real(path, file))[1]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            checkpoint = load_checkpoint(folder, world=world)
        assert checkpoint is not None
        return [checkpoint.step, read, [str(warning.message) for warning in seen]]

    codes = forked(2, load, out, "")
    return {"codes": codes, "ranks": [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]}


def main(out: Path) -> None:
    results: dict[str, Any] = {f"{point}@{rank}": killed(out, point, rank) for point, rank in POINTS}
    results |= {"failing": failing(out), "lost": lost(out), "shared": shared_out(out)}
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
