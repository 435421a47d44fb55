"""docs/evidence.md, its plots and pictures, made of the results; its prose is page.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from benchmarks.evidence import plots, tempo
from benchmarks.evidence.calibration import RULES
from benchmarks.evidence.claims import BUILT_IN, EMOJI, HALF, LONG, LORA, TEMPERATURES
from benchmarks.evidence.emoji import real_emoji
from benchmarks.evidence.tables import MEASURES, Row, difference, of, table
from benchmarks.evidence.units import LONGER, VARIANTS, Place

Found = dict[str, Any]
PROSE = Path(__file__).with_name("page.md")
ABSENT = "Not measured yet."
COMPARED = (
    ("dynamic-0.7", "static", "lambda 0.7 against the fine-tuned static model"),
    ("dynamic-0.5", "static", "lambda 0.5 against the same"),
    ("dynamic-0.3", "static", "lambda 0.3 against the same"),
    ("dynamic-0.5", "base", "lambda 0.5 against the base, for which nothing was trained"),
    ("dynamic-0.5", "narrow", "lambda 0.5 against the narrow model"),
    ("dynamic-0.5", "uniform", "lambda 0.5 against uniform width"),
    ("dynamic-0.5", "random", "lambda 0.5 against random routers"),
    ("dynamic-0.5", "width", "width and tokens against width only"),
    ("dynamic-0.5", "tokens", "width and tokens against tokens only"),
    ("dynamic-0.5", "complete", "the frozen teacher against the complete model"),
    ("dynamic-0.5", "alone", "the frozen teacher against neither"),
)
"""What the first claim asks for."""


def write_page(found: Found, place: Place, docs: Path) -> None:
    """The page and its pictures in ``docs``; a claim that was not measured says so."""
    size, claims, folder = place.size, found["claims"], docs / "evidence"
    dit = size.trials["dit"]
    steps = sorted({trial.steps for trial in size.trials.values()})
    values = {
        "size": found["size"], "steps": " or ".join(map(str, steps)), "pictures": dit.pictures,
        "seeds": len(size.seeds), "held_out": size.held_out, "emoji_steps": size.trials["emoji"].base_steps,
        "batch": tempo.BATCH, "timed": size.timed, "times": LONGER, "half": _half(claims, place, folder),
        "colophon": _colophon(claims),
    }  # fmt: skip
    sections = {
        "longer": _longer, "emoji": _emoji, "td-lora": _td_lora, "calibration": _calibration, "gates": _gates,
        "tempo": _tempo,
    }  # fmt: skip
    for name, section in sections.items():
        made = section(claims[name], place, folder) if name in claims else ABSENT
        values[name.replace("-", "_")] = made
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "evidence.md").write_text(Template(PROSE.read_text()).substitute(values))


def _half(claims: Found, place: Place, folder: Path) -> str:
    found = {trial: claims[f"half-{trial}"]["units"] for trial in BUILT_IN if f"half-{trial}" in claims}
    if not found:
        return ABSENT
    plots.half(found, place.size.trials, folder / "half.svg")
    parts = []
    for trial, units in found.items():
        plots.pictures(place, trial, ("static", "dynamic-0.5", "uniform", "random"), None, folder / f"{trial}.png")
        parts += [
            f"### {place.size.trials[trial].title}",
            answer(units),
            table(units, [v for v in HALF if of(units, v, "mse")], ("ratio", "score", "frechet", "mse")),
            _comparisons(units),
            f"![drawn from the same noise](evidence/{trial}.png)",
        ]
    return "\n\n".join(parts)


def _comparisons(units: Sequence[Row]) -> str:
    return "\n".join(
        f"* {title}: {_all(units, one, other)}."
        for one, other, title in COMPARED
        if of(units, other, "mse") and of(units, one, "mse")
    )


def _all(units: Sequence[Row], one: str, other: str) -> str:
    measures = [m for m in ("score", "frechet", "mse") if of(units, one, m)]
    return "; ".join(difference(units, one, other, m) for m in measures)


def answer(units: Sequence[Row]) -> str:
    """Whether half the MACs did as well as the static model here."""
    measures = [m for m in ("score", "frechet", "mse") if of(units, "static", m)]
    worse = [m for m in measures if ": worse" in difference(units, "dynamic-0.5", "static", m)]
    at = f"at {np.mean(of(units, 'dynamic-0.5', 'ratio')):.2f} of the MACs"
    kept = ""
    if "score" in measures:
        share = np.mean(of(units, "dynamic-0.5", "score")) / max(1e-9, np.mean(of(units, "static", "score")))
        kept = f" It keeps {share:.0%} of the judge's score."
    if not worse:
        return f"**Not refuted: {at} no loss against the fine-tuned static model is told from noise.**{kept}"
    said = " and ".join(f"the {MEASURES[m][0]}" for m in worse)
    verb = "is" if len(worse) == 1 else "are"
    return f"**It fails: {at} {said} {verb} worse than the fine-tuned static model's.**{kept}"


def _longer(claim: Found, place: Place, folder: Path) -> str:
    units = claim["units"]
    rows = table(units, [*LONG, *(f"{name}-long" for name in LONG)], ("ratio", "score", "frechet", "mse"))
    pairs = [
        ("dynamic-0.5-long", "static-long"),
        ("dynamic-0.5-long", "uniform-long"),
        ("dynamic-0.5-long", "dynamic-0.5"),
    ]
    said = [f"* {VARIANTS[one].title}, against {VARIANTS[two].title}: {_all(units, one, two)}." for one, two in pairs]
    return f"{rows}\n\n" + "\n".join(said)


def _emoji(claim: Found, place: Place, folder: Path) -> str:
    units = claim["units"]
    plots.pictures(place, "emoji", EMOJI, real_emoji(place.trial("emoji"), 32), folder / "emoji.png")
    shown = "![emoji kept from training, and what was drawn for their captions](evidence/emoji.png)"
    rows = table(units, EMOJI, ("ratio", "frechet", "mse"))
    return "\n\n".join([answer(units), rows, _comparisons(units), shown])


def _td_lora(claim: Found, place: Place, folder: Path) -> str:
    units = claim["units"]
    plots.td_lora(units, folder / "td-lora.svg")
    rows = table(units, ["base", "static", "dynamic-0.5", *LORA], ("learns", "ratio", "score", "frechet", "mse"))
    compared = {"lora": "plain LoRA", "td-lora-1": "one expert", "td-lora-8": "8 experts", "dynamic-0.5": "all weights"}
    lines = [f"* 4 experts against {name}: {_all(units, 'td-lora-4', other)}." for other, name in compared.items()]
    return f"{rows.replace(VARIANTS['dynamic-0.5'].title, 'dynamic, all weights')}\n\n" + "\n".join(lines)


def _calibration(claim: Found, place: Place, folder: Path) -> str:
    units, rows = claim["units"], claim["rows"]
    plots.calibration(units, folder / "calibration.svg")
    lines = [
        "| temperature | ratio in training | by threshold, held-out pictures | at sampling, tokens chosen by | ratio "
        "| judge's score | Fréchet distance |",
        "|---" * 7 + "|",
    ]
    for variant, tau in zip(TEMPERATURES, (1, 2, 5), strict=True):
        head = f"{tau} | {_mean(of(units, variant, 'ratio_training'))} | {_mean(of(units, variant, 'ratio'))}"
        for rule, title in RULES.items():
            own = [row for row in rows if (row["variant"], row["rule"]) == (variant, rule)]
            ratio, score, distance = ([row[m] for row in own] for m in ("ratio", "score", "frechet"))
            lines.append(f"| {head} | {title} | {_mean(ratio)} | {_mean(score)} | {_mean(distance, 2)} |")
            head = " | | "
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int = 3) -> str:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _gates(claim: Found, place: Place, folder: Path) -> str:
    plots.gates(place, folder / "gates.svg")
    return "![shares over timesteps and layers, and token maps](evidence/gates.svg)"


def _tempo(claim: Found, place: Place, folder: Path) -> str:
    rows = claim["rows"]
    plots.tempo(rows, folder / "tempo.svg")
    lines = ["| | steps | FirstBlockCache | ms a picture | judge's score | Fréchet distance |", "|---" * 6 + "|"]
    for row in rows:
        cache = "" if row["cache"] is None else f"threshold {row['cache']}"
        numbers = f"{1000 * row['seconds']:.0f} | {row['score']:.3f} | {row['frechet']:.2f}"
        lines.append(f"| {VARIANTS[row['variant']].title} | {row['steps']} | {cache} | {numbers} |")
    return "![quality against time](evidence/tempo.svg)\n\n" + "\n".join(lines)


def _colophon(claims: Found) -> str:
    lines = ["| claim | minutes of one core | machine | torch | date |", "|---" * 5 + "|"]
    for name, claim in claims.items():
        minutes = (claim["seconds"]["units"] + sum(claim["seconds"]["prepared"].values())) / 60
        lines.append(
            f"| `{name}` | {minutes:.0f} | {claim['machine']} | {claim['versions']['torch']} | {claim['date']} |"
        )
    return "\n".join(lines) + (
        "\n\nMinutes are those of its data, bases and units, each on one core beside others; claims share units, which "
        "are made once. `--size gpu` does the same on one GPU with longer trainings; it has not run yet."
    )
