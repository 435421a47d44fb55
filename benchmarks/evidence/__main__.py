"""Runs the method's claims beside their controls, and writes tables, plots and docs/evidence.md.

    python -m benchmarks.evidence OUT                          # small: everything on two CPU cores, under 90 minutes
    python -m benchmarks.evidence OUT --claims half-dit
    python -m benchmarks.evidence OUT --size gpu --claims half-dit
    python -m benchmarks.evidence OUT --size quick             # a few steps of everything, to see that it runs

What OUT holds already is not done again, unless its settings have changed; so a run that was cut off goes on where it
was. Results go to benchmarks/results/evidence-SIZE.json, page and pictures to docs/evidence.md and docs/evidence (those
of gpu to docs/evidence-gpu.md and docs/evidence-gpu).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.evidence.claims import CLAIMS
from benchmarks.evidence.page import write_page
from benchmarks.evidence.pool import Task, run_all
from benchmarks.evidence.results import collect
from benchmarks.evidence.sizes import ROOT, SIZES
from benchmarks.evidence.units import STAGES, Place, parts_of, prepare, run_unit


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for data, bases, runs and pictures; may be continued")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), metavar="CLAIM",
                        help=f"of {', '.join(CLAIMS)} (default: all)")  # fmt: skip
    parser.add_argument("--skip", nargs="+", choices=CLAIMS, default=[], metavar="CLAIM", help="leave these out")
    parser.add_argument("--workers", type=int, help="units side by side (default: the size's)")
    parser.add_argument("--page-only", action="store_true", help="from what OUT holds")
    args = parser.parse_args()
    place = Place(args.out.resolve(), args.size)
    claims = [claim for claim in args.claims if claim not in args.skip]
    os.chdir(ROOT)
    if not args.page_only:
        began = time.monotonic()
        run_claims(place, claims, args.workers or place.size.workers)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    quick = args.size == "quick"
    results = place.out if quick else ROOT / "benchmarks" / "results"
    found = collect(place, claims, results / f"evidence-{args.size}.json")
    write_page(found, place, place.out / "docs" if quick else ROOT / "docs", claims)


def run_claims(place: Place, names: list[str], workers: int) -> None:
    """Everything that these claims need and OUT does not hold yet."""
    claims, size, logs = [CLAIMS[name] for name in names], place.size, place.out / "logs"
    trials = dict.fromkeys(trial for claim in claims for trial in claim.trials)
    for title, parts in STAGES.items():
        tasks: list[Task] = [
            (f"{part}-{trial}", prepare, (place, trial, part))
            for trial in sorted(trials, key=lambda name: -size.trials[name].work)
            for part in parts
            if part in parts_of(size.trials[trial])
        ]
        run_all(tasks, workers=workers, logs=logs, title=title)
    units = dict.fromkeys(unit for claim in claims for unit in claim.units(size))
    ordered = sorted(units, key=lambda unit: unit.seed)  # so that a run that is cut off has whole seeds
    run_all([(u.name, run_unit, (place, u)) for u in ordered], workers=workers, logs=logs, title="units")
    for claim in claims:
        if claim.extra is not None:
            run_all(claim.extra(place), workers=1 if claim.alone else workers, logs=logs, title=claim.title)


if __name__ == "__main__":
    main()
