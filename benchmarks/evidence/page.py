"""docs/evidence.md, its plots and pictures, made of the results; its prose is page.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from benchmarks.evidence import plots, tempo
from benchmarks.evidence.calibration import RULES
from benchmarks.evidence.claims import BUILT_IN, EMOJI, HALF, LONG, LORA, TEMPERATURES
from benchmarks.evidence.distance import REFERENCE
from benchmarks.evidence.emoji import real_emoji
from benchmarks.evidence.tables import MEASURES, Row, comparisons, is_worse, of, spread, table
from benchmarks.evidence.units import LONGER, VARIANTS, Place

Found = dict[str, Any]
PROSE = Path(__file__).with_name("page.md")
ABSENT = "Not measured yet."
QUALITY = ("score", "frechet", "mse")
TARGET, NEAR = 0.5, 0.03
"""The ratio that the first claim is about, and how near to it a run must come."""
COMPARED = (
    ("dynamic-0.7", "static", "lambda 0.7 against the fine-tuned static model"),
    ("dynamic-0.5", "static", "lambda 0.5 against the same"),
    ("dynamic-0.3", "static", "lambda 0.3 against the same"),
    ("dynamic-0.5", "base", "lambda 0.5 against the base, which was not trained on"),
    ("dynamic-0.5", "narrow", "lambda 0.5 against the narrow model"),
    ("dynamic-0.5", "uniform", "lambda 0.5 against uniform width"),
    ("width", "uniform", "learned width only against uniform width"),
    ("dynamic-0.5", "random", "lambda 0.5 against random routers"),
    ("dynamic-0.5", "width", "width and tokens against width only"),
    ("dynamic-0.5", "tokens", "width and tokens against tokens only"),
    ("dynamic-0.5", "complete", "the frozen teacher against the complete model"),
    ("dynamic-0.5", "alone", "the frozen teacher against neither"),
)
"""What the first claim asks for."""


def write_page(found: Found, place: Place, docs: Path, drawn: Sequence[str]) -> None:
    """The page of a size and its pictures in ``docs``; a claim that was not measured says so.

    Args:
        drawn: claims whose runs and pictures are at hand; of others the pictures that are in ``docs`` stay.
    """
    size, claims = place.size, found["claims"]
    name = "evidence" if found["size"] != "gpu" else "evidence-gpu"
    page = _Page(claims, place, docs / name, name, frozenset(drawn))
    steps = sorted({trial.steps for trial in size.trials.values()})
    values = {
        "size": found["size"], "folder": name, "steps": " or ".join(map(str, steps)), "seeds": len(size.seeds),
        "held_out": size.held_out, "emoji_steps": size.trials["emoji"].base_steps, "batch": tempo.BATCH,
        "timed": size.timed, "times": LONGER, "reference": REFERENCE, "half": page.half(), "colophon": page.colophon(),
    }  # fmt: skip
    sections = {
        "longer": page.longer, "emoji": page.emoji, "td-lora": page.td_lora, "calibration": page.calibration,
        "gates": page.gates, "tempo": page.tempo,
    }  # fmt: skip
    for claim, section in sections.items():
        values[claim.replace("-", "_")] = section() if claim in claims else ABSENT
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.md").write_text(Template(PROSE.read_text()).substitute(values))


@dataclass(frozen=True)
class _Page:
    """The sections that are made of results."""

    claims: Found
    place: Place
    folder: Path
    """Of the pictures."""
    name: str
    """Of that folder, for links."""
    drawn: frozenset[str]

    def units(self, claim: str) -> list[Row]:
        return self.claims[claim]["units"]

    def link(self, title: str, file: str) -> str:
        return f"![{title}]({self.name}/{file})"

    def half(self) -> str:
        found = {trial: self.units(f"half-{trial}") for trial in BUILT_IN if f"half-{trial}" in self.claims}
        if not found:
            return ABSENT
        plots.half(found, self.place.size.trials, self.folder / "half.svg")
        parts = []
        for trial, units in found.items():
            if f"half-{trial}" in self.drawn:
                shown = ("static", "dynamic-0.5", "uniform", "random")
                plots.pictures(self.place, trial, shown, None, self.folder / f"{trial}.png")
            parts += [
                f"### {self.place.size.trials[trial].title}",
                answer(units),
                table(units, [v for v in HALF if of(units, v, "mse")], ("ratio", *QUALITY)),
                self._counted(f"half-{trial}", trial) + _missed(units),
                comparisons(units, COMPARED, QUALITY),
                self.link("drawn from the same noise", f"{trial}.png"),
            ]
        return "\n\n".join(parts)

    def _counted(self, claim: str, trial: str) -> str:
        units, real = self.units(claim), self.claims[claim]["real"][trial]
        return (
            f"{units[0]['pictures']} pictures of each model and seed; as many real ones have a Fréchet distance of "
            f"{real:.2f}."
        )

    def longer(self) -> str:
        units = self.units("longer")
        rows = table(units, [*LONG, *(f"{name}-long" for name in LONG)], ("ratio", *QUALITY))
        own = "dynamic-0.5-long"
        pairs = [
            (own, "static-long", "lambda 0.5 against the static model, both longer"),
            (own, "uniform-long", "lambda 0.5 against uniform width, both longer"),
            (own, "dynamic-0.5", "lambda 0.5, longer against shorter"),
        ]
        return f"{rows}\n\n{comparisons(units, pairs, QUALITY)}"

    def emoji(self) -> str:
        units = self.units("emoji")
        if "emoji" in self.drawn:
            real = real_emoji(self.place.trial("emoji"), 32)
            plots.pictures(self.place, "emoji", EMOJI, real, self.folder / "emoji.png")
        shown = self.link("emoji kept from training, and what was drawn for their captions", "emoji.png")
        rows = table(units, EMOJI, ("ratio", "frechet", "mse"))
        compared = comparisons(units, COMPARED, QUALITY[1:])
        return "\n\n".join([answer(units), rows, self._counted("emoji", "emoji"), compared, shown])

    def td_lora(self) -> str:
        units = self.units("td-lora")
        plots.td_lora(units, self.folder / "td-lora.svg")
        rows = table(units, ["base", "static", "dynamic-0.5", *LORA], ("learns", "ratio", *QUALITY))
        others = {
            "lora": "plain LoRA",
            "td-lora-1": "one expert",
            "td-lora-8": "8 experts",
            "dynamic-0.5": "all weights",
        }
        pairs = [("td-lora-4", other, f"4 experts against {title}") for other, title in others.items()]
        named = rows.replace(VARIANTS["dynamic-0.5"].title, "dynamic, all weights")
        shown = self.link("quality of each adapter", "td-lora.svg")
        return "\n\n".join([shown, named, comparisons(units, pairs, QUALITY)])

    def calibration(self) -> str:
        units, rows = self.units("calibration"), self.claims["calibration"]["rows"]
        plots.calibration(units, self.folder / "calibration.svg")
        lines = [
            "| temperature | ratio in training | by threshold, held-out pictures | tokens, when sampling | its ratio "
            "| judge's score | Fréchet distance |",
            "|---" * 7 + "|",
        ]
        for variant, tau in zip(TEMPERATURES, (1, 2, 5), strict=True):
            ratios = (spread(of(units, variant, measure), "{:.3f}") for measure in ("ratio_training", "ratio"))
            head = " | ".join([str(tau), *ratios])
            for rule, title in RULES.items():
                own = [row for row in rows if (row["variant"], row["rule"]) == (variant, rule)]
                styles = {"ratio": "{:.3f}", "score": "{:.3f}", "frechet": "{:.2f}"}
                cells = [spread([row[measure] for row in own], style) for measure, style in styles.items()]
                lines.append(f"| {head} | {title} | {' | '.join(cells)} |")
                head = " | | "
        return self.link("ratio in training and by threshold", "calibration.svg") + "\n\n" + "\n".join(lines)

    def gates(self) -> str:
        if "gates" in self.drawn:
            plots.gates(self.place, self.folder / "gates.svg")
        return self.link("shares over timesteps and layers, and token maps", "gates.svg")

    def tempo(self) -> str:
        rows = self.claims["tempo"]["rows"]
        plots.tempo(rows, self.folder / "tempo.svg")
        lines = ["| | steps | FirstBlockCache | ms a picture | judge's score | Fréchet distance |", "|---" * 6 + "|"]
        for row in rows:
            cache = "" if row["cache"] is None else f"threshold {row['cache']}"
            numbers = f"{1000 * row['seconds']:.0f} | {row['score']:.3f} | {row['frechet']:.2f}"
            lines.append(f"| {VARIANTS[row['variant']].title} | {row['steps']} | {cache} | {numbers} |")
        return self.link("quality against time", "tempo.svg") + "\n\n" + "\n".join(lines)

    def colophon(self) -> str:
        lines = ["| claim | minutes | machine | torch | date |", "|---" * 5 + "|"]
        prepared: dict[str, float] = {}
        made: dict[tuple[str, str, int], float] = {}
        more = 0.0
        for name, claim in self.claims.items():
            seconds = claim["seconds"]
            whole = sum(seconds["prepared"].values()) + seconds["units"] + seconds["more"]
            where = [(w["machine"], w["versions"]["torch"], w["date"]) for w in claim["measured"]]
            machines, versions, dates = (", ".join(dict.fromkeys(column)) for column in zip(*where, strict=True))
            lines.append(f"| `{name}` | {whole / 60:.0f} | {machines} | {versions} | {dates} |")
            prepared |= seconds["prepared"]
            made |= {(unit["trial"], unit["variant"], unit["seed"]): unit["seconds"] for unit in claim["units"]}
            more += seconds["more"]
        total = (sum(prepared.values()) + sum(made.values()) + more) / 60
        return "\n".join(lines) + (
            f"\n\nMinutes are those of its data, bases, trainings and measurements, one after the other. Claims share "
            f"them; together they took {total:.0f} minutes of one worker, of {self.place.size.workers} side by side."
        )


def _missed(units: Sequence[Row]) -> str:
    """Names the models whose ratio is not the one that was asked for."""
    asked = {variant: TARGET for variant in HALF} | {"base": 1.0, "static": 1.0, "dynamic-0.7": 0.7, "dynamic-0.3": 0.3}
    ratios = {variant: float(np.mean(of(units, variant, "ratio"))) for variant in HALF if of(units, variant, "ratio")}
    missed = [f"{VARIANTS[v].title} ({ratio:.2f})" for v, ratio in ratios.items() if abs(ratio - asked[v]) > NEAR]
    return f" Not at the ratio that was asked for: {', '.join(missed)}." if missed else ""


def answer(units: Sequence[Row]) -> str:
    """Whether half the MACs did as well as the static model here."""
    ratio = float(np.mean(of(units, "dynamic-0.5", "ratio")))
    if abs(ratio - TARGET) > NEAR:
        return f"**Not tested: the dynamic model came to {ratio:.2f} of the MACs.**"
    measures = [m for m in QUALITY if of(units, "static", m)]
    worse = [m for m in measures if is_worse(units, "dynamic-0.5", "static", m)]
    kept = ""
    if "score" in measures:
        share = np.mean(of(units, "dynamic-0.5", "score")) / max(1e-9, np.mean(of(units, "static", "score")))
        kept = f" It keeps {share:.0%} of the judge's score."
    if not worse:
        return f"**At {ratio:.2f} of the MACs no loss is told from the spread of the seeds.**{kept}"
    said = " and ".join(f"the {MEASURES[m][0]}" for m in worse)
    verb = "is" if len(worse) == 1 else "are"
    return (
        f"**It fails here: at {ratio:.2f} of the MACs {said} {verb} worse than the fine-tuned static model's.**{kept}"
    )
