"""What is claimed, and which units and measurements tell whether it holds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence import calibration, tempo
from benchmarks.evidence.pool import Task
from benchmarks.evidence.sizes import Size
from benchmarks.evidence.units import Place, Unit
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.report.inputs import Missing, read_run
from dydit_scale.sampling.speed import machine
from dydit_scale.workflows.evaluate import evaluate_run

HALF = (
    "base", "static", "narrow", "uniform", "random", "width", "tokens", "dynamic-0.7", "dynamic-0.5", "dynamic-0.3",
    "complete", "alone",
)  # fmt: skip
LORA = ("td-lora-1", "td-lora-2", "td-lora-4", "td-lora-8", "lora")
TEMPERATURES = ("dynamic-0.5", "tau-2", "tau-5")
LONG = ("static", "uniform", "dynamic-0.5")
EMOJI = ("base", "static", "uniform", "dynamic-0.7", "dynamic-0.5")
BUILT_IN = ("dit", "sit", "flux", "latte")


class Claim(NamedTuple):
    """One question."""

    title: str
    trials: tuple[str, ...]
    variants: tuple[str, ...]
    extra: Callable[[Place], list[Task]] | None = None
    """More to measure, once the units are done."""
    alone: bool = False
    """``extra`` measures time: nothing may run beside it."""
    one_seed: bool = False
    """It looks at the first seed alone."""

    def units(self, size: Size) -> list[Unit]:
        """What is trained, seed by seed."""
        return [
            Unit(trial, variant, seed)
            for seed in (size.seeds[:1] if self.one_seed else size.seeds)
            for trial in self.trials
            for variant in self.variants
            if not (variant == "narrow" and not size.trials[trial].base_steps)
        ]


def _calibrations(place: Place) -> list[Task]:
    units = [Unit("dit", variant, seed) for seed in place.size.seeds for variant in TEMPERATURES]
    return [(f"calibration-{unit.name}", _calibrate, (place, unit)) for unit in units]


def _calibrate(place: Place, unit: Unit) -> None:
    _keep(place.more(f"calibration-{unit.name}"), [unit], place, lambda: calibration.calibrate(place, unit))


def _gates(place: Place) -> list[Task]:
    units = [Unit(trial, "dynamic-0.5", place.size.seeds[0]) for trial in BUILT_IN]
    return [(f"gates-{unit.name}", _look, (place, unit)) for unit in units]


def _look(place: Place, unit: Unit) -> None:
    """Let ``dydit evaluate`` write what the gates do."""
    trial, run = place.size.trials[unit.trial], place.run(unit)

    def look() -> list[Any]:
        prompts = min(48, trial.pictures)
        evaluate_run(run, prompts=prompts, steps=trial.sampler_steps, cfg=trial.cfg, pairs=1, timed=2, batch=48)
        widths = read_run(run).widths
        assert not isinstance(widths, Missing), "evaluate_run writes them"
        shares = {"heads": widths.heads, "groups": widths.groups, "tokens": widths.tokens}
        return [{"trial": unit.trial} | {name: float(np.nanmean(found)) for name, found in shares.items()}]

    _keep(place.more(f"gates-{unit.name}"), [unit], place, look)


def _tempo(place: Place) -> list[Task]:
    return [("tempo", _time, (place,))]


def _time(place: Place) -> None:
    seed = place.size.seeds[0]
    units = [Unit("flux", variant, seed) for variant in tempo.MODELS]
    _keep(place.more("tempo"), units, place, lambda: tempo.measure(place, "flux", seed))


def measured_of(place: Place, units: Sequence[Unit]) -> Any:
    """All that a measurement of these units depends on; for JSON."""
    records = [json.loads(place.record(unit).read_text()) for unit in units]
    for record in records:
        del record["seconds"]
    asked = {"timed": place.size.timed, "steps": tempo.STEPS, "cached": tempo.CACHED_STEPS,
             "thresholds": tempo.CACHE_THRESHOLDS, "rules": list(calibration.RULES)}  # fmt: skip
    return json.loads(json.dumps([*records, asked]))


def _keep(file: Path, units: Sequence[Unit], place: Place, measure: Callable[[], list[Any]]) -> None:
    """Write what is measured of the units, unless it is there and they have not been made anew."""
    of = measured_of(place, units)
    if file.exists() and json.loads(file.read_text())["of"] == of:
        return
    quiet_libraries()
    began = time.monotonic()
    rows = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"of": of, "rows": rows, "seconds": round(time.monotonic() - began, 1), **machine()}
    file.write_text(json.dumps(found, indent=1))


CLAIMS: dict[str, Claim] = {
    **{f"half-{trial}": Claim("half the MACs at equal quality", (trial,), HALF) for trial in BUILT_IN},
    "longer": Claim("what a longer training changes", ("dit",), (*LONG, *(f"{name}-long" for name in LONG))),
    "emoji": Claim("half the MACs at equal quality, on real pictures", ("emoji",), EMOJI),
    "td-lora": Claim("TD-LoRA beside LoRA", ("flux",), ("base", "static", "dynamic-0.5", *LORA)),
    "calibration": Claim("the trained ratio is the sampled one", ("dit",), TEMPERATURES, _calibrations),
    "gates": Claim("where the work goes", BUILT_IN, ("dynamic-0.5",), _gates, one_seed=True),
    "tempo": Claim("quality against time", ("flux",), tempo.MODELS, _tempo, alone=True, one_seed=True),
}
