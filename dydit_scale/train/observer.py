"""What is measured in every step, on every rank, besides the losses. Nothing here waits for the device or for other
ranks: numbers are read when the step has waited anyway, and travel in its one reduction."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dydit_scale.checkpoint.writer import Commit
from dydit_scale.data.loader import Loader
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.parallel.world import World
from dydit_scale.train.metrics import RankLog
from dydit_scale.train.objective import Inputs, Objective, Terms
from dydit_scale.train.recipe import Recipe

KINDS = ("heads", "groups", "tokens")
TIMESTEPS = 1000
"""Of DDPM, whose levels are integers."""


class Observer:
    """Measures a run. ``begin``, ``has_data``, ``saw``, ``values``, ``reduced`` and ``finish`` are called in this order
    in each step, on every rank.

    Operations are counted as twice the MACs of the cost model, for the forward, the gradients of activations and, where
    all weights learn, those of weights. Recomputation, adapters, encoders and a teacher are work, but not counted.
    """

    def __init__(self, recipe: Recipe, world: World, objective: Objective, log: RankLog, peak: float) -> None:
        """``peak`` is of one device, in 10^12 operations per second."""
        self.recipe, self.world, self.log, self.peak = recipe, world, log, peak
        self.began = time.time()
        """When the run's first process began (seconds since 1970)."""
        self.loader: Loader | None = None
        self.nonfinite = 0
        """Steps left out since the start of this process, for gradients that were not finite."""
        self.failed_saves = 0
        self._cost = objective.cost if hasattr(objective.network, "cost") else None
        self._passes = 3 if recipe.adapter.kind == "none" else 2
        dynamic = recipe.dynamic
        routed = {} if dynamic is None else dict(zip(KINDS, (dynamic.heads, dynamic.mlp, dynamic.tokens), strict=True))
        self._kinds = [kind for kind, has in routed.items() if has]
        self._buckets = recipe.monitor.timestep_buckets
        self._loss = torch.zeros(2, self._buckets, device=world.device)  # sums, counts
        self._routers: _Routers | None = None
        self._stopwatch = _Stopwatch(world.device)
        self._began = self._data = self._macs = self._longest_wait = self._productive = 0.0
        self._fresh = True
        self._seconds: dict[int, float] = {}

    def went_before(self, began: float, records: Iterable[Mapping[str, Any]]) -> None:
        """The run began earlier, and left ``records`` of steps that count."""
        self.began = began
        for record in records:
            if "seconds" in record and math.isfinite(record["grad_norm"]):
                self._count(record["step"], record["seconds"])

    def begin(self) -> None:
        """A step begins."""
        self._began, self._macs, self._fresh = time.perf_counter(), 0.0, True
        self._loss.zero_()

    def has_data(self) -> None:
        """Its batches are read."""
        self._data = time.perf_counter() - self._began
        self._stopwatch.start()

    @torch.no_grad()
    def saw(self, inputs: Inputs, terms: Terms) -> None:
        """The forward of a micro-batch is done."""
        if self._fresh:
            self._stopwatch.stop()
            self._fresh = False
        if self._cost is not None:
            self._macs += self._cost(inputs.size, inputs.text_tokens).static * len(inputs.level)
        bucket = bucket_of(inputs.level, self._buckets)
        flow = terms.flow.detach().float()
        self._loss.index_add_(1, bucket[: len(flow)], torch.stack([flow, torch.ones_like(flow)]))
        if terms.masks is not None:
            if self._routers is None:
                self._routers = _Routers(terms.masks, self._buckets, self._kinds)
            self._routers.add(terms.masks, bucket)

    def values(self, step: int) -> dict[str, float]:
        """This rank's share in the step's reduction; the same names on all ranks."""
        bad, hits, misses = (0, 0, 0) if self.loader is None else self.loader.counts()
        own = {"macs": self._macs, "bad": bad, "hits": hits, "misses": misses}
        per_rank = [0.0] * (2 * self.world.world_size)
        per_rank[self.world.rank] = self._data
        per_rank[self.world.world_size + self.world.rank] = self._data + self._stopwatch.seconds()
        rows = {"rank": per_rank, "loss": self._loss.flatten().tolist()}
        if self._routers is not None and (step + 1) % self.recipe.monitor.routers_every == 0:
            rows["routers"] = self._routers.sums()
        numbered = {f"seen.{name}.{i}": value for name, row in rows.items() for i, value in enumerate(row)}
        return {f"seen.{name}": float(value) for name, value in own.items()} | numbered

    def reduced(self, means: dict[str, float]) -> dict[str, Any]:
        """Takes its means over ranks out of ``means``, and returns what they mean for the step's record."""
        ranks = self.world.world_size
        sums = {name: means.pop(name) * ranks for name in list(means) if name.startswith("seen.")}
        rows: dict[str, list[float]] = {}
        for name, value in sums.items():
            rows.setdefault(name.split(".")[1], []).append(value)
        wait, work = rows["rank"][:ranks], rows["rank"][ranks:]
        self._macs, self._longest_wait = rows["macs"][0], max(wait)
        record: dict[str, Any] = {
            "loss_timestep": _ratios(rows["loss"][: self._buckets], rows["loss"][self._buckets :]),
            "rank_seconds": {"min": min(work), "mean": sum(work) / ranks, "max": max(work)},
            "slowest_rank": work.index(max(work)),
            "bad_samples": round(rows["bad"][0]),
        }
        if rows["hits"][0] + rows["misses"][0]:
            record |= {"cache_hits": round(rows["hits"][0]), "cache_misses": round(rows["misses"][0])}
        if "routers" in rows and self._routers is not None:
            record |= self._routers.found(rows["routers"])
        return record

    def finish(self, record: dict[str, Any], *, consumed: int, counts: bool, commit: Commit | None) -> None:
        """The step is done: add to its record what needs the clock, and write this rank's own.

        Args:
            consumed: samples read so far.
            counts: the step was applied.
            commit: the newest of this process.
        """
        now, seconds = time.time(), time.perf_counter() - self._began
        if counts:
            self._count(record["step"], seconds)
        operations = 2 * self._passes * self._macs / self.world.world_size / seconds / 1e12
        tflops = {"activated": operations * record["ratio"], "dense": operations}
        record |= {
            "time": now,
            "consumed": consumed,
            "seconds": seconds,
            "data_seconds": self._data,
            "data_wait": min(1.0, self._longest_wait / seconds),
            "samples_per_second": self.recipe.train.batch_size / seconds,
            "goodput": self._goodput(now),
        }
        if self._cost is not None:
            record |= {"tflops": tflops, "mfu": {work: value / self.peak for work, value in tflops.items()}}
        if commit is not None:
            record |= {"checkpoint_step": commit.step, "checkpoint_time": commit.time}
        own = {"step": record["step"], "time": now, "rank_step_seconds": seconds, "rank_data_seconds": self._data}
        if self.world.device.type == "cuda":
            own["gpu_memory"] = torch.cuda.max_memory_allocated(self.world.device)
        self.log.step(own)

    def back_to(self, step: int) -> None:
        """The run went back: the steps from ``step`` on no longer count."""
        for undone in [known for known in self._seconds if known >= step]:
            self._productive -= self._seconds.pop(undone)
        if self._routers is not None:
            self._routers.clear()

    def _count(self, step: int, seconds: float) -> None:
        self._productive += seconds - self._seconds.get(step, 0.0)
        self._seconds[step] = seconds

    def _goodput(self, now: float) -> float:
        return min(1.0, self._productive / max(1e-9, now - self.began))


class _Routers:
    """Sums over the steps since the last record, on the device."""

    def __init__(self, masks: DynamicMasks, buckets: int, kinds: list[str]) -> None:
        self._kinds = kinds
        layers, _, heads = masks.heads.shape
        self._active = masks.heads.new_zeros(len(KINDS), layers, buckets, dtype=torch.float32)
        self._seen = masks.heads.new_zeros(buckets, dtype=torch.float32)
        self._heads = masks.heads.new_zeros(layers, heads, dtype=torch.float32)

    def add(self, masks: DynamicMasks, bucket: Shaped[Tensor, " batch"]) -> None:
        """The gates of a micro-batch."""
        rates = torch.stack([rate.detach().float() for rate in masks.keep_rates()])
        self._active.index_add_(2, bucket, rates)
        self._seen.index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float32))
        self._heads += masks.heads.detach().float().sum(1)

    def sums(self) -> list[float]:
        """All of them, in one row; they begin anew."""
        row = torch.cat([part.flatten() for part in (self._seen, self._active, self._heads)]).tolist()
        self.clear()
        return row

    def clear(self) -> None:
        """Begin anew."""
        for part in (self._seen, self._active, self._heads):
            part.zero_()

    def found(self, row: list[float]) -> dict[str, Any]:
        """What the sums of all ranks say, for a record."""
        _, layers, buckets = self._active.shape
        seen, rest = row[:buckets], row[buckets:]
        active = [rest[i : i + buckets] for i in range(0, len(KINDS) * layers * buckets, buckets)]
        heads = rest[len(KINDS) * layers * buckets :]
        shares = [_ratios(line, seen) for line in active]
        return {
            "routers": {
                kind: shares[k * layers : (k + 1) * layers] for k, kind in enumerate(KINDS) if kind in self._kinds
            },
            "dead_heads": sum(not used for used in heads) / len(heads),
        }


class _Stopwatch:
    """Seconds between two places in the code as the device comes to them; read it when the device has."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._began = self._ended = 0.0

    def start(self) -> None:
        self._began = self._ended = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        self._ended = time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._ended - self._began


def bucket_of(level: Shaped[Tensor, " batch"], buckets: int) -> Shaped[Tensor, " batch"]:
    """Which of equal parts of the noise levels each level is in; the last is the noisiest."""
    share = level.float() if level.is_floating_point() else level.float() / TIMESTEPS
    return (share * buckets).long().clamp(0, buckets - 1)


def measured_peak(device: torch.device, precision: str) -> float:
    """10^12 operations per second of the best of some products of matrices, in a fraction of a second."""
    dtype, side = (torch.bfloat16 if precision == "bf16" else torch.float32), (8192 if device.type == "cuda" else 512)
    generator = torch.Generator(device).manual_seed(0)  # the global one is the run's
    a: Float[Tensor, "side side"] = torch.rand(side, side, dtype=dtype, device=device, generator=generator)
    stopwatch, best = _Stopwatch(device), float("inf")
    for _ in range(8):
        stopwatch.start()
        a @ a
        stopwatch.stop()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, stopwatch.seconds())
    return 2 * side**3 / best / 1e12


def _ratios(sums: list[float], counts: list[float]) -> list[float | None]:
    return [round(total / count, 5) if count else None for total, count in zip(sums, counts, strict=True)]
