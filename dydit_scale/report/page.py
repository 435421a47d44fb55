"""One self-contained HTML page for a training run."""

from __future__ import annotations

import datetime
from pathlib import Path

from dydit_scale.report import gallery, sections
from dydit_scale.report.inputs import EVALUATE, EXPORT, ExportFile, Missing, RunData, read_run
from dydit_scale.report.layout import document, masthead, tile, write_page
from dydit_scale.report.markup import Html, el
from dydit_scale.report.units import DASH, count, duration, fixed, percent, with_prefix

_PARTS = (
    sections.training,
    sections.width,
    sections.experts,
    gallery.tokens,
    gallery.samples,
    sections.scores,
    sections.speed,
    sections.export,
    sections.settings,
)
_LINKS = ("training", "width", "experts", "tokens", "samples", "scores", "speed", "export", "settings")
_ADAPTERS = ("td-lora", "td_lora", "lora-experts", "lora-ranges", "diffusers", "peft", "kohya", "comfyui")
"""From the most faithful on."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder as one HTML file that loads nothing from elsewhere, and return its path.

    ``out`` is the file to write, ``run/report.html`` if None. Inputs that are missing or broken leave a section that
    names the command that makes them.
    Errors: ValueError when the folder has no recipe.yaml or metrics.jsonl, or recipe.yaml is not a mapping.
    """
    written = render(read_run(run), datetime.date.today())
    return write_page(written, run / "report.html" if out is None else out)


def render(run: RunData, date: datetime.date) -> Html:
    """The page as text."""
    parts = (part(run) for part in _PARTS)
    return document(f"{run.recipe_name} · dydit_scale report", _masthead(run, date), _tiles(run), _notices(run), *parts)


def _masthead(run: RunData, date: datetime.date) -> Html:
    steps = [curve.steps[-1] for curve in run.metrics.curves.values() if curve.steps.size]
    seconds = float(run.metrics.curve("seconds").values.sum())  # each record holds its own step's
    facts = [
        f"run {run.name}",
        f"{count(max(steps) + 1)} steps" if steps else "no step yet",
        *([f"trained {duration(seconds)}"] if seconds else []),
        f"report of {date.isoformat()}",
    ]
    links = [name for name in _LINKS if name != "experts" or run.experts is not None]
    return masthead("training report", run.recipe_name, facts, links)


def _tiles(run: RunData) -> Html:
    return el("div", _ratio(run), _saved(run), _speed_up(run), _score(run), _adapter(run), class_="tiles")


def _ratio(run: RunData) -> Html:
    target = run.metrics.curve("target").last
    aim = "no target logged" if target is None else f"target {fixed(target, 3)}"
    evaluated, trained = run.metrics.curve("ratio_eval"), run.metrics.curve("ratio")
    if evaluated.last is not None:
        return tile("Cost ratio at evaluation", fixed(evaluated.last, 3), aim)
    if trained.last is not None:
        return tile("Cost ratio in training", fixed(trained.last, 3), aim)
    return tile("Cost ratio", DASH, aim)


def _saved(run: RunData) -> Html:
    if isinstance(run.speed, Missing):
        return tile("MACs saved", DASH, EVALUATE)
    per_picture = f"{with_prefix(run.speed.macs_dynamic, '')} instead of {with_prefix(run.speed.macs_static, '')}"
    return tile("MACs saved", percent(1 - run.speed.macs_dynamic / run.speed.macs_static), per_picture)


def _speed_up(run: RunData) -> Html:
    if isinstance(run.speed, Missing):
        return tile("Speed-up, realised", DASH, EVALUATE)
    below = f"ideal {fixed(run.speed.ideal, 2)}×, {percent(run.speed.share)} of it"
    return tile("Speed-up, realised", f"{fixed(run.speed.realised, 2)}×", below)


def _score(run: RunData) -> Html:
    if isinstance(run.scores, Missing):
        return tile("Prompts right, dynamic", DASH, EVALUATE)
    dynamic, control = (run.scores.models.get(name) for name in ("dynamic", "control"))
    if dynamic is None:
        return tile("Prompts right, dynamic", DASH, "dynamic not scored")
    error = 100 * sections.standard_error(dynamic.overall, run.scores.prompts)
    below = f"control {percent(control.overall, 1)}" if control else "control not scored"
    return tile("Prompts right, dynamic", percent(dynamic.overall, 1), f"{below}, ± {fixed(error, 1)}")


def _adapter(run: RunData) -> Html:
    if isinstance(run.exports, Missing) or not run.exports:
        return tile("Adapter size", DASH, EXPORT)
    chosen = _adapter_file(run.exports)
    return tile(
        "Adapter size" if chosen.format in _ADAPTERS else "Export size", with_prefix(chosen.bytes, "B"), chosen.format
    )


def _adapter_file(files: tuple[ExportFile, ...]) -> ExportFile:
    """The adapter in the most faithful format there is, else the smallest file."""
    order = {name: place for place, name in enumerate(_ADAPTERS)}
    return min(files, key=lambda one: (order.get(one.format, len(order)), one.bytes))


def _notices(run: RunData) -> Html:
    """What of metrics.jsonl could not be shown, said openly."""
    said = []
    skipped, not_finite = run.metrics.skipped, run.metrics.not_finite
    if skipped:
        numbers = ", ".join(count(number) for number in skipped[:5]) + (" …" if len(skipped) > 5 else "")
        said.append(f"{_left_out(len(skipped), 'line')} of metrics.jsonl: not readable (line {numbers}).")
    if not_finite:
        said.append(f"{_left_out(not_finite, 'value')} in metrics.jsonl: not finite.")
    return el("p", " ".join(said), class_="notice") if said else Html("")


def _left_out(found: int, what: str) -> str:
    return f"Left out {count(found)} {what}{'' if found == 1 else 's'}"
