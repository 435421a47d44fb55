"""One file with everything that was found at a size."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.evidence.claims import CLAIMS
from benchmarks.evidence.distance import distance, real_distance
from benchmarks.evidence.units import Place, Unit, recipe_of, settings_digest

Found = dict[str, Any]
WHERE = ("machine", "versions", "date")


def collect(place: Place, claims: Sequence[str], file: Path) -> Found:
    """Write what these claims found to ``file``, beside what it holds of other claims; returns all of it.

    Other claims that it holds with settings which the size no longer has are left out, with a warning. Raises
    ValueError naming what is missing, or what was made with other settings.
    """
    known = json.loads(file.read_text())["claims"] if file.is_file() else {}
    stale = [name for name in known.keys() - set(claims) if known[name]["settings"] != _settings(place, name)]
    if stale:
        warnings.warn(
            f"{file}: leaving out {', '.join(sorted(stale))}, of other settings; run them again", stacklevel=2
        )
    found = {name: claim for name, claim in known.items() if name not in stale} | {
        name: of_claim(place, name) for name in tqdm(claims, desc="collecting", unit="claim")
    }
    done = {"size": place.size_name, "claims": {name: found[name] for name in CLAIMS if name in found}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(done, indent=1) + "\n")
    return done


def of_claim(place: Place, name: str) -> Found:
    """What one claim found, with its settings and where it was measured."""
    claim, size = CLAIMS[name], place.size
    units = [_unit(place, unit) for unit in claim.units(size)]
    parts = {part: _read(part) for trial in claim.trials for part in sorted(place.trial(trial).glob("*.json"))}
    more = {task: _read(place.more(task)) for task, _, _ in (claim.extra(place) if claim.extra else [])}
    counts = {unit["trial"]: unit["pictures"] for unit in units}
    return json.loads(json.dumps({
        "settings": _settings(place, name),
        "units": [{key: value for key, value in unit.items() if key not in WHERE} for unit in units],
        "real": {trial: real_distance(place, trial, count) for trial, count in counts.items()},
        "rows": [row for found in more.values() for row in found["rows"]],
        "seconds": {
            "prepared": {f"{part.parent.name}-{part.stem}": found["seconds"] for part, found in parts.items()},
            "units": round(sum(unit["seconds"] for unit in units), 1),
            "more": round(sum(found["seconds"] for found in more.values()), 1),
        },
        "measured": _distinct([*units, *more.values()]),
    }))  # fmt: skip


def _settings(place: Place, name: str) -> Found:
    """Of a claim at this size."""
    size = place.size
    trials = {trial: asdict(size.trials[trial]) for trial in CLAIMS[name].trials}
    of_size = {"seeds": size.seeds, "held_out": size.held_out, "timed": size.timed, "trials": trials}
    return json.loads(json.dumps(of_size))


def _unit(place: Place, unit: Unit) -> Found:
    record = _read(place.record(unit))
    if record["settings"] != settings_digest(recipe_of(place, unit), place, unit):
        raise ValueError(f"{place.record(unit)} was made with other settings: run its claim again")
    return record | {"frechet": distance(place, unit.trial, np.load(place.pictures(unit))["arr_0"])}


def _distinct(records: Sequence[Found]) -> list[Found]:
    """Machines, versions and dates, each once."""
    found = [{key: record[key] for key in WHERE} for record in records]
    return [where for n, where in enumerate(found) if where not in found[:n]]


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is missing: run the claim first, without --page-only")
    return json.loads(file.read_text())
