"""One file with everything that was found at a size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.evidence.claims import CLAIMS, TEMPERATURES
from benchmarks.evidence.units import Place, Unit
from dydit_scale.sampling.speed import machine


def collect(place: Place, claims: Sequence[str], file: Path) -> dict[str, Any]:
    """Write what these claims found to ``file``, beside what it holds of other claims; returns all of it.

    Raises ValueError naming what is missing.
    """
    known = json.loads(file.read_text())["claims"] if file.is_file() else {}
    found = {**known, **{name: {**_of_claim(place, name), **machine()} for name in claims}}
    ordered = {name: found[name] for name in CLAIMS if name in found}
    settings = json.loads(json.dumps(asdict(place.size)))
    done = {"size": place.size_name, "settings": settings, "claims": ordered}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(done, indent=1) + "\n")
    return done


def _of_claim(place: Place, name: str) -> dict[str, Any]:
    claim, size = CLAIMS[name], place.size
    result: dict[str, Any] = {"units": [_read(place.record(unit)) for unit in claim.units(size)]}
    seconds = {
        part.stem: _read(part)["seconds"] for t in claim.trials for part in sorted(place.trial(t).glob("*.json"))
    }
    result["seconds"] = {"prepared": seconds, "units": round(sum(unit["seconds"] for unit in result["units"]), 1)}
    if name == "calibration":
        units = [Unit("dit", variant, seed) for seed in size.seeds for variant in TEMPERATURES]
        result["rows"] = [row for unit in units for row in _read(place.out / "calibration" / f"{unit.name}.json")]
    if name == "tempo":
        result["rows"] = _read(place.out / "tempo.json")
    return result


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is missing: run the claim first, without --page-only")
    return json.loads(file.read_text())
