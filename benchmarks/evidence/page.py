"""docs/evidence.md, its plots and pictures, made of the results; its prose is page.md."""

from __future__ import annotations

import re
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
from benchmarks.evidence.tables import (
    HIGHER_IS_BETTER,
    MEASURES,
    Row,
    best_of,
    comparisons,
    is_worse,
    of,
    spread,
    table,
)
from benchmarks.evidence.units import LONGER, VARIANTS, Place

Found = dict[str, Any]
PROSE = Path(__file__).with_name("page.md")
ABSENT = "Not measured yet."
QUALITY = ("score", "frechet", "mse")
TARGET, NEAR = 0.5, 0.03
"""The ratio that the first claim is about, and how near to it a run must come."""
ALL_TOKENS = 0.98
"""A share of tokens above which next to none is skipped."""
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
    (docs / f"{name}.md").write_text(Template(prose(found["size"])).substitute(values))


def prose(size: str) -> str:
    """page.md as of a size: parts between ``<!-- NAME -->`` and ``<!-- end -->`` are of the size of that name alone."""
    return re.sub(
        r" ?<!-- (\w+) -->(.*?)<!-- end -->",
        lambda part: part[2] if part[1] == size else "",
        PROSE.read_text(),
        flags=re.DOTALL,
    )


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
        found = answer(units, own, ("static", "static-long"))
        return f"{found}\n\n{rows}\n\n{comparisons(units, pairs, QUALITY)}"

    def emoji(self) -> str:
        units = self.units("emoji")
        if "emoji" in self.drawn:
            real = real_emoji(self.place.trial("emoji"), 32)
            plots.pictures(self.place, "emoji", EMOJI, real, self.folder / "emoji.png")
        shown = self.link("emoji kept from training, and what was drawn for their captions", "emoji.png")
        rows = table(units, EMOJI, ("ratio", "frechet", "mse"))
        compared = comparisons(units, COMPARED, QUALITY[1:])
        counted = self._counted("emoji", "emoji") + _missed(units)
        return "\n\n".join([answer(units), rows, counted, compared, shown])

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
        return "\n\n".join([_of_experts(units), shown, named, comparisons(units, pairs, QUALITY)])

    def calibration(self) -> str:
        units, rows = self.units("calibration"), self.claims["calibration"]["rows"]
        plots.calibration(units, self.folder / "calibration.svg")
        lines = [
            "| temperature | ratio in training | by threshold, held-out pictures | tokens, when sampling | tokens kept "
            "| its ratio | judge's score | Fréchet distance |",
            "|---" * 8 + "|",
        ]
        off: dict[int, float] = {}
        for variant, tau in zip(TEMPERATURES, (1, 2, 5), strict=True):
            off[tau] = float(np.mean(of(units, variant, "ratio")) - np.mean(of(units, variant, "ratio_training")))
            ratios = (spread(of(units, variant, measure), "{:.3f}") for measure in ("ratio_training", "ratio"))
            head = " | ".join([str(tau), *ratios])
            for rule, title in RULES.items():
                own = [row for row in rows if (row["variant"], row["rule"]) == (variant, rule)]
                styles = {"tokens": "{:.3f}", "ratio": "{:.3f}", "score": "{:.3f}", "frechet": "{:.2f}"}
                cells = [spread([row[measure] for row in own], style) for measure, style in styles.items()]
                lines.append(f"| {head} | {title} | {' | '.join(cells)} |")
                head = " | | "
        shown = self.link("ratio in training and by threshold", "calibration.svg")
        return "\n\n".join([_of_temperatures(off, rows), shown, "\n".join(lines)])

    def gates(self) -> str:
        if "gates" in self.drawn:
            plots.gates(self.place, self.folder / "gates.svg")
        shown = self.link("shares over timesteps and layers, and token maps", "gates.svg")
        rows = self.claims["gates"]["rows"]
        lines = ["| | heads | MLP channels | tokens |", "|---" * 4 + "|"]
        for row in rows:
            shares = (f"{row[name]:.2f}" for name in ("heads", "groups", "tokens"))
            lines.append(f"| {self.place.size.trials[row['trial']].title} | {' | '.join(shares)} |")
        titles = [self.place.size.trials[row["trial"]].title for row in rows if row["tokens"] > ALL_TOKENS]
        found = (
            f"**{_listed(titles)} skip{'s' if len(titles) == 1 else ''} next to no token here: what is called "
            "dynamic in width and tokens saves by width alone there.**"
            if titles
            else "**Every family skips tokens and narrows its layers.**"
        )
        return "\n\n".join([found, shown, "\n".join(lines)])

    def tempo(self) -> str:
        rows = self.claims["tempo"]["rows"]
        plots.tempo(rows, self.folder / "tempo.svg")
        lines = ["| | steps | FirstBlockCache | ms a picture | judge's score | Fréchet distance |", "|---" * 6 + "|"]
        for row in rows:
            cache = "" if row["cache"] is None else f"threshold {row['cache']}"
            numbers = f"{1000 * row['seconds']:.0f} | {row['score']:.3f} | {row['frechet']:.2f}"
            lines.append(f"| {VARIANTS[row['variant']].title} | {row['steps']} | {cache} | {numbers} |")
        return "\n\n".join([_of_time(rows), self.link("quality against time", "tempo.svg"), "\n".join(lines)])

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


def answer(units: Sequence[Row], own: str = "dynamic-0.5", statics: Sequence[str] = ("base", "static")) -> str:
    """Whether half the MACs did as well as the better one of the static models here, measure by measure."""
    ratio = float(np.mean(of(units, own, "ratio")))
    if abs(ratio - TARGET) > NEAR:
        return f"**Not tested: the dynamic model came to {ratio:.2f} of the MACs.**"
    measures = [m for m in QUALITY if of(units, own, m)]
    best = {m: best_of(units, statics, m) for m in measures}
    worse = [m for m in measures if is_worse(units, own, best[m], m)]
    kept = ""
    if "score" in measures:
        share = np.mean(of(units, own, "score")) / max(1e-9, np.mean(of(units, best["score"], "score")))
        kept = f" It keeps {share:.0%} of the judge's score."
    if not worse:
        return f"**At {ratio:.2f} of the MACs no loss is told from the spread of the seeds.**{kept}"
    return f"**It fails here: at {ratio:.2f} of the MACs {_named(worse)} worse than the better static model's.**{kept}"


def _named(measures: Sequence[str]) -> str:
    """ "the denoising error is", "the judge's score and the Fréchet distance are"."""
    return _listed([f"the {MEASURES[m][0]}" for m in measures]) + (" is" if len(measures) == 1 else " are")


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _of_experts(units: Sequence[Row]) -> str:
    """Whether experts did better than plain LoRA, and as well as all weights."""
    mixed, plain, full = "td-lora-4", "lora", "dynamic-0.5"
    better = [m for m in QUALITY if is_worse(units, plain, mixed, m)]
    worse = [m for m in QUALITY if is_worse(units, mixed, plain, m)]
    if better and not worse:
        told = f"**It holds here: with four experts {_named(better)} better than plain LoRA's"
    elif worse:
        but = f", though {_named(better)} better" if better else ""
        told = f"**It fails here: with four experts {_named(worse)} worse than plain LoRA's{but}"
    else:
        told = "**It is not shown here: four experts differ from plain LoRA by no more than the spread of the seeds"
    lost = [m for m in QUALITY if is_worse(units, mixed, full, m)]
    return told + (
        f"; {_named(lost)} worse than with all weights.**" if lost else "; from all weights they are not told apart.**"
    )


def _of_temperatures(off: dict[int, float], rows: Sequence[Row]) -> str:
    """How far off the ratio by threshold is, and whether the ways to choose tokens had any choice."""
    said = ", ".join(f"{gap:+.3f} at {tau}" for tau, gap in off.items())
    kept = {tau: [row["tokens"] for row in rows if row["variant"] == variant and row["rule"] == "threshold"]
            for tau, variant in zip(off, TEMPERATURES, strict=True)}  # fmt: skip
    idle = [str(tau) for tau, shares in kept.items() if min(shares) > ALL_TOKENS]
    told = f"**Trained and sampled ratio differ by {said}.**"
    if not idle:
        return told
    return (
        f"{told} At temperature {_listed(idle)} the threshold keeps next to all tokens, so that there is nothing "
        "to choose between the first two ways; the savings are of width."
    )


def _of_time(rows: Sequence[Row]) -> str:
    """How often the static model in fewer steps, without a cache, is at least as good in no more time."""
    plain = [row for row in rows if row["cache"] is None]
    static = [row for row in plain if row["variant"] == "static"]
    ours = [row for row in plain if row["variant"] != "static"]

    def beaten(row: Row, measure: str) -> bool:
        sign = 1 if measure in HIGHER_IS_BETTER else -1
        return any(s["seconds"] <= row["seconds"] and sign * (s[measure] - row[measure]) >= 0 for s in static)

    counts = {m: sum(beaten(row, m) for row in ours) for m in ("score", "frechet")}
    return (
        f"**Fewer steps of the static model do at least as well in no more time as {counts['score']} of {len(ours)} "
        f"dynamic samplers by the judge's score, and as {counts['frechet']} by the Fréchet distance.**"
    )
