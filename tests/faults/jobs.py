"""Training jobs as their launchers start them, and whether two runs came to the same."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dydit_scale.checkpoint.store import load_checkpoint
from dydit_scale.monitoring.records import read_metrics
from tests.faults.processes import VARIABLE, Process, kill, processes, wait_until
from tests.parallel.launch import ROOT, child_environment, free_port

BIN = Path(sys.executable).parent
ENGINES = {
    "fsdp": ("engine.name=fsdp",),
    "zero2": ("engine.name=zero", "engine.zero_stage=2"),
    "zero3": ("engine.name=zero", "engine.zero_stage=3"),
}


def command(engine: str, *options: str, module: str = "dydit_scale.train") -> list[str]:
    """The launcher of ``engine`` with ``options`` of its own, up to the module: recipe and overrides follow."""
    if engine == "fsdp":
        return [str(BIN / "torchrun"), *options, "-m", module]
    return [str(BIN / "deepspeed"), *options, "--module", module]


def on_this_machine(engine: str, *options: str, module: str = "dydit_scale.train") -> list[str]:
    """The same for two ranks here."""
    if engine == "fsdp":
        where = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    else:
        where = ("--num_gpus", "2", "--master_port", str(free_port()))
    return command(engine, *where, *options, module=module)


class Job:
    """A launcher, its ranks and all that they started; none of it outlives the ``with``."""

    def __init__(self, words: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.name, self.log = secrets.token_hex(8), log
        with log.open("ab") as file:
            self.launcher = subprocess.Popen(
                words,
                env=child_environment() | {VARIABLE: self.name} | (environment or {}),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        def dead() -> bool:
            kill(process.pid for process in self.processes())
            return not self.processes()

        wait_until(dead, "all processes of the job gone", 20)
        self.launcher.wait(20)

    def processes(self, which: Callable[[Process], bool] = lambda process: True) -> list[Process]:
        """Those that are alive."""
        return [process for process in processes(self.name) if which(process)]

    def left(self) -> bool:
        """Whether launcher, ranks and all that they started are gone."""
        return self.launcher.poll() is not None and not self.processes()

    def tail(self, characters: int = 4000) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-characters:]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The records of training steps (without those of evaluations), in order."""
    return [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def commits_of(run: Path) -> list[int]:
    """The steps of the committed checkpoints."""
    names = sorted(path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return [int(name) for name in names if name.isdigit()]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, moments, average and counters of the newest checkpoint."""
    checkpoint = load_checkpoint(run / "checkpoints")
    assert checkpoint is not None, f"{run}: no checkpoint"
    return dict(checkpoint.tensors)


def differences(run: Path, whole: Path, steps: int) -> list[str]:
    """In what ``run`` is not, bit for bit, the uninterrupted run ``whole``: each of ``steps`` steps counted once, their
    losses, and the final state. Empty if they are the same."""
    found = []
    a, b = ([(r["step"], r["loss"], r["grad_norm"]) for r in steps_of(folder)] for folder in (run, whole))
    assert [step for step, *_ in b] == list(range(steps)), f"{whole}: not all of {steps} steps"
    if [step for step, *_ in a] != list(range(steps)):
        found.append(f"steps {[step for step, *_ in a]}, not each of {steps} once")
    pairs = zip(a, b, strict=False)
    found += [f"step {one[0]}: loss and norm {one[1:]}, not {other[1:]}" for one, other in pairs if one != other]
    left, right = final_state(run), final_state(whole)
    found += [f"{name} is in one of them only" for name in sorted(left.keys() ^ right.keys())]
    common = sorted(left.keys() & right.keys())
    return found + [f"{name} differs" for name in common if not torch.equal(left[name], right[name])]
