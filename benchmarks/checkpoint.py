"""How long training stands still for a checkpoint: asynchronous, synchronous, and the same bytes written plainly.

    python benchmarks/checkpoint.py OUT                       # 256 MiB, 7 repetitions; OUT is on the disk to measure
    python benchmarks/checkpoint.py OUT --mib 8 --repeat 2 --quick

One process, tensors on CUDA if there is any. The kinds take turns within each repetition. "plain" writes the bytes
and forces them to the disk; a save also computes sha256, reads back and compares, and commits. Beside the stall of an
asynchronous save stands what the steps lose that run while it is written. Writes benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dydit_scale.checkpoint.parts import Parts, whole
from dydit_scale.checkpoint.writer import CheckpointWriter, SaveReport
from dydit_scale.parallel.world import ONE_PROCESS
from dydit_scale.sampling.speed import machine

ROOT = Path(__file__).parents[1]
TENSORS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the checkpoints, on the disk to measure; emptied afterwards")
    parser.add_argument("--mib", type=int, default=256, help="size of the state")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="write the results to OUT")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = {f"param.{n}": torch.randn(args.mib * 2**18 // TENSORS, device=device) for n in range(TENSORS)}
    work = args.out / "checkpoint-benchmark"
    work.mkdir(parents=True)
    step = stepper(device)
    kinds: dict[str, Callable[[int], dict[str, float]]] = {
        "plain": lambda n: plain(work / "plain", state),
        "sync": Saves(work / "sync", whole(state), step, asynchronous=False),
        "async": Saves(work / "async", whole(state), step, asynchronous=True),
    }
    for kind in kinds.values():  # the first save makes its buffers, the first step its caches
        kind(0)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for n in range(1, args.repeat + 1):
        for name, kind in kinds.items():
            rows[name].append(kind(n))
        print(f"repetition {n} of {args.repeat}: " + line({name: found[-1] for name, found in rows.items()}))
    shutil.rmtree(work)
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    result = {
        **machine(), "mib": args.mib, "repeat": args.repeat, "medians": medians,
        "async_stall_of_sync": medians["async"]["stall"] / medians["sync"]["stall"],
        "sync_stall_of_plain": medians["sync"]["stall"] / medians["plain"]["stall"],
        "rows": rows,
    }  # fmt: skip
    out = (args.out if args.quick else ROOT / "benchmarks" / "results") / "checkpoint.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"medians: {line(medians)}\nresults: {out}")


def line(rows: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{name} " + ", ".join(f"{key} {value:.3f} s" for key, value in r.items()) for name, r in rows.items()
    )


def plain(path: Path, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Write the bytes of ``state`` into one file and force it to the disk."""
    data = [tensor.cpu().numpy().data for tensor in state.values()]
    began = time.perf_counter()
    with path.open("wb") as file:
        for part in data:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return {"stall": took, "total": took}


def stepper(device: torch.device) -> Callable[[], float]:
    """A step of some milliseconds; returns its seconds."""
    a = torch.randn(1024 if device.type == "cuda" else 384, 4096, device=device)

    def step() -> float:
        began = time.perf_counter()
        float((a @ a.T).relu().sum())  # waits for the device
        return time.perf_counter() - began

    return step


class Saves:
    """One save a call, with steps going on until it is committed if it is asynchronous."""

    def __init__(self, folder: Path, parts: Parts, step: Callable[[], float], *, asynchronous: bool) -> None:
        self.parts, self.step, self.reports = parts, step, list[SaveReport]()
        self.writer = CheckpointWriter(
            folder, ONE_PROCESS, keep=1, failures=1, asynchronous=asynchronous, tell=self.reports.append
        )

    def __call__(self, n: int) -> dict[str, float]:
        quiet = statistics.median(self.step() for _ in range(9))
        self.writer.save(n, self.parts, {})
        steps: list[float] = []
        while not self.reports and not self.writer.done:
            steps.append(self.step())
        self.writer.wait()
        report: Any = self.reports.pop()
        lost = max(0.0, sum(steps) - quiet * len(steps))
        return {"stall": report.blocked_seconds, "total": report.total_seconds, "slower_steps": lost}


if __name__ == "__main__":
    main()
