"""Who is told of a run's measurements, and what they are told first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dydit_scale.monitoring.prometheus import Endpoint
from dydit_scale.monitoring.records import RUN_FILE, read_about
from dydit_scale.monitoring.sinks import open_sinks
from dydit_scale.parallel.world import World
from dydit_scale.train.attempt import Attempt, read_holder
from dydit_scale.train.metrics import Metrics, records_before
from dydit_scale.train.observer import Observer, measured_peak
from dydit_scale.train.recipe import Recipe, flat_values


class Listeners:
    """Sinks, and an endpoint that is told, too, how many records were lost on the way to them."""

    def __init__(self, recipe: Recipe, first_step: int, endpoints: Sequence[Endpoint], say: Callable[[str], object]):
        self._endpoints = endpoints
        self._sinks = open_sinks(
            recipe.monitor.sinks, Path(recipe.run),
            name=recipe.name, first_step=first_step, config=flat_values(recipe), say=say,
        )  # fmt: skip

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass a record on."""
        for sink in self._sinks:
            sink.write(record)
        dropped = {sink.name: sink.dropped for sink in self._sinks}
        failures = {sink.name: sink.failures for sink in self._sinks}
        for endpoint in self._endpoints:
            endpoint.write({**record, "dropped": dropped, "sink_failures": failures})

    def close(self) -> None:
        """The last record is written; endpoints belong to their process's own log."""
        for sink in self._sinks:
            sink.close()


def make_endpoint(recipe: Recipe, world: World) -> list[Endpoint]:
    """The endpoint of this process, if it has one."""
    port = recipe.monitor.prometheus_port
    return [Endpoint(recipe.name, world.rank, port, print)] if port and world.local_rank == 0 else []


def peak_of(recipe: Recipe, world: World) -> float:
    """10^12 operations per second of one device; on other ranks than the first, which compute no utilisation, 1."""
    if not world.is_main:
        return 1.0
    return recipe.monitor.peak_tflops or measured_peak(world.device, recipe.engine.precision)


def start_metrics(
    recipe: Recipe, observer: Observer, attempt: Attempt, endpoints: Sequence[Endpoint], *, first_step: int
) -> Metrics:
    """On rank 0: begin or continue the record of a run."""
    folder, world = Path(recipe.run), observer.world
    earlier = read_about(folder)
    kept = records_before(folder, first_step)
    holder = read_holder(folder)
    began = observer.began if holder is None else holder.began
    observer.went_before(earlier.get("began", began), kept)
    metrics = Metrics(
        folder, name=recipe.name, steps=recipe.train.steps, first_step=first_step, kept=kept,
        listeners=lambda say: [Listeners(recipe, first_step, endpoints, say)],
    )  # fmt: skip
    about = {
        "name": recipe.name,
        "token": attempt.token,
        "began": observer.began,
        "restarts": _restarts(earlier, attempt),
        "ranks": world.world_size,
        "engine": recipe.engine.name,
        "device": world.device.type,
        "peak_tflops": observer.peak,
        "peak": "recipe" if recipe.monitor.peak_tflops else "measured",
        "first_step": first_step,
        "steps": recipe.train.steps,
        "save_every": recipe.train.save_every,
        "checkpoint_step": first_step,
    }
    path = folder / RUN_FILE
    try:
        draft = path.with_name(f".{path.name}")
        draft.write_text(json.dumps(about, indent=1) + "\n")
        draft.replace(path)
    except OSError as error:
        metrics.say(f"warning: {path} was not written: {error}; training goes on")
    for endpoint in endpoints:
        endpoint.write(about)
    return metrics


def _restarts(earlier: Mapping[str, Any], attempt: Attempt) -> dict[str, int]:
    """How often the run was started again, by how it had ended before."""
    counts = dict(earlier.get("restarts", {}))
    if attempt.before is not None:
        how = attempt.before.ended or "killed"
        counts[how] = counts.get(how, 0) + 1
    return counts
