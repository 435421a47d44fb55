"""Ideal and realised speed-up, measured beside the static model in one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """One comparison; ``share`` says how much of what the cost model promises the clock confirms."""

    machine: str
    versions: dict[str, str]
    date: str
    batch: int
    steps: int
    macs_static: float
    """MACs of one picture, all steps, transformer only."""
    macs_dynamic: float
    seconds_static: float
    """Median seconds of one batch, text encoding and decoding included."""
    seconds_dynamic: float
    ideal: float
    """macs_static / macs_dynamic."""
    realised: float
    """seconds_static / seconds_dynamic, median over pairs run one after the other."""
    share: float
    """realised / ideal."""
    execution: str = "eager"
    """How the dynamic model's steps were launched; the static one's always op by op."""
    fallback: str | None = None
    """Why forwards of the dynamic model ran masked, at the static one's cost, if some did."""
    op_by_op: str | None = None
    """Why some were launched op by op, where ``execution`` says otherwise."""

    def table(self) -> str:
        """For the terminal."""
        rows = [
            ("", "static", "dynamic", "ratio"),
            (
                "MACs a picture",
                f"{self.macs_static / 1e9:.2f} G",
                f"{self.macs_dynamic / 1e9:.2f} G",
                f"{self.ideal:.2f}x ideal",
            ),
            (
                "seconds a batch",
                f"{self.seconds_static:.2f}",
                f"{self.seconds_dynamic:.2f}",
                f"{self.realised:.2f}x realised",
            ),
        ]
        if self.execution == "eager":  # else the launching counts, too
            rows.append(("share of the ideal", "", "", f"{self.share:.0%}"))
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        return "\n".join([*lines, *fallback_lines(self.fallback, self.op_by_op)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def fallback_lines(masked: str | None, op_by_op: str | None = None) -> list[str]:
    """What a terminal says of forwards that ran masked, or op by op, for these reasons; nothing where none did."""
    lines = [] if masked is None else [f"some forwards ran masked, at the static model's cost: {masked}"]
    return lines if op_by_op is None else [*lines, f"some forwards ran op by op: {op_by_op}"]


def timed_pairs(
    static: Callable[[int], Any], dynamic: Callable[[int], Any], pairs: int, *, progress: bool = True
) -> list[tuple[float, float]]:
    """Seconds of two callables, run in turn (A B A B ...) after one warm-up each; CUDA is synchronised around each.

    Args:
        static, dynamic: called with 0 to warm up, then with 1, 2, ..., to draw other pictures each time: kernels may be
            made for a number of tokens, which pictures seen before would find there.
    """
    for run in (static, dynamic):
        run(0)
    seconds: list[tuple[float, float]] = []
    for pair in tqdm(
        range(1, pairs + 1), desc="timing static beside dynamic", unit="pair", disable=not progress, dynamic_ncols=True
    ):
        seconds.append((_time(static, pair), _time(dynamic, pair)))
    return seconds


def speed_report(
    seconds: Sequence[tuple[float, float]], *, macs_static: float, macs_dynamic: float, batch: int, steps: int
) -> SpeedReport:
    """What the (static, dynamic) seconds of pairs say."""
    realised = statistics.median(a / b for a, b in seconds)
    ideal = macs_static / macs_dynamic
    return SpeedReport(
        **machine(),
        batch=batch,
        steps=steps,
        macs_static=macs_static,
        macs_dynamic=macs_dynamic,
        seconds_static=statistics.median(a for a, _ in seconds),
        seconds_dynamic=statistics.median(b for _, b in seconds),
        ideal=ideal,
        realised=realised,
        share=realised / ideal,
    )


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what something is measured: ``machine``, ``versions``, ``date``.

    Without ``device``: CUDA if there is one.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    packages = ("torch", "diffusers", "peft", "deepspeed")
    return {
        "machine": name,
        "versions": {p: found for p in packages if (found := _version(p))},
        "date": date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # deepspeed is installed on Linux only
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _time(run: Callable[[int], Any], pair: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(pair)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
