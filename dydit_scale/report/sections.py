"""The sections that show numbers: training, width, scores, speed, export, settings."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from dydit_scale.report.charts import HALF, Series, grouped_bars, heat_map, line_chart, lying_bars
from dydit_scale.report.checks import FloatArray
from dydit_scale.report.inputs import EVALUATE, Experts, Missing, RunData, Scores, Speed, Widths
from dydit_scale.report.layout import (
    Column,
    Figure,
    bar_legend,
    figures,
    missing,
    ramp_legend,
    section,
    series_legend,
    table,
    verdict,
    wide_chart,
)
from dydit_scale.report.markup import Html, el, join
from dydit_scale.report.metrics import Curve, Metrics, extremes, smooth
from dydit_scale.report.units import DASH, count, digits, fixed, percent, with_prefix

_TIMESTEP = "timestep of the sampling step: 1000 is noise, 0 the picture"
_EXPERT_COLOURS = ("c-dynamic", "c-control", "c-supervision", "c-evaluation", "c-base")
_NOISE = "timestep: 1000 is noise, 0 the picture"


def training(run: RunData) -> Html:
    """Losses and cost ratio over steps."""
    metrics = run.metrics
    parts: list[Figure] = []
    flow = [*_raw_and_smooth(metrics.curve("loss_flow"), "training", "c-dynamic")]
    flow.append(_evaluated(metrics.curve("mse_eval")))
    supervision = _raw_and_smooth(metrics.curve("loss_supervision"), "training", "c-supervision")
    if _has_points(flow):
        parts.append(_over_steps("Flow loss", flow, "mean squared error"))
    if supervision and np.any(supervision[0].y != 0):
        parts.append(_over_steps("Supervision loss", supervision, "mean squared error"))
    ratio = _ratio_series(metrics)
    if _has_points(ratio):
        evaluated = metrics.curve("ratio_eval").last is not None
        note = "" if evaluated else f"No evaluation was logged while training; {EVALUATE} measures the result."
        parts.append(_over_steps("Cost ratio", ratio, "MACs dynamic / static", _ratio_range(ratio), note))
    lead = (
        "The thin line is each logged step, cut off at the frame; the strong line is its smoothed course. "
        "The cost ratio is what training steers to its target."
    )
    body = figures(parts) if parts else el("p", "metrics.jsonl holds no step that can be drawn yet.", class_="missing")
    return section("training", "Training", lead if parts else "", body)


def _raw_and_smooth(curve: Curve, name: str, colour: str) -> list[Series]:
    if not curve.steps.size:
        return []
    spiky, calm = extremes(curve), smooth(curve)
    return [
        Series("", spiky.steps, spiky.values, colour, "raw"),
        Series(name, calm.steps, calm.values, colour, "line", digits(calm.last)),
    ]


def _evaluated(curve: Curve) -> Series:
    return Series("evaluation", curve.steps, curve.values, "c-evaluation", "points", digits(curve.last))


def _has_points(series: list[Series]) -> bool:
    return any(one.x.size for one in series)


def _ratio_series(metrics: Metrics) -> list[Series]:
    target = metrics.curve("target")
    aim = Series("target", target.steps, target.values, "c-ink", "dashed", digits(target.last))
    return [
        *_raw_and_smooth(metrics.curve("ratio"), "training", "c-dynamic"),
        aim,
        _evaluated(metrics.curve("ratio_eval")),
    ]


def _ratio_range(series: list[Series]) -> tuple[float, float]:
    values = np.concatenate([one.y for one in series])
    return max(0.0, math.floor(10 * (values.min() - 0.04)) / 10), max(1.02, float(values.max()) + 0.02)


def _over_steps(
    title: str, series: list[Series], y_label: str, y_range: tuple[float, float] | None = None, note: str = ""
) -> Figure:
    shown = [one for one in series if one.x.size]
    x_range = (0.0, max(1.0, *(float(one.x[-1]) for one in shown)))

    def draw(width: int) -> Html:
        label = f"{title} over optimiser steps"
        return line_chart(
            shown, label=label, x_label="optimiser step", y_label=y_label, width=width, x_range=x_range, y_range=y_range
        )  # fmt: skip

    return Figure(title, draw, series_legend([one for one in shown if one.name]), note)


def width(run: RunData) -> Html:
    """Heads, MLP groups and tokens over timestep and layer."""
    if isinstance(run.widths, Missing):
        return section("width", "Work over timesteps and layers", "", missing(run.widths))
    widths = run.widths
    parts = [
        _map("Attention heads", "share active", widths, widths.heads),
        _map("MLP channel groups", "share active", widths, widths.groups),
    ]
    routed = bool(np.isfinite(widths.tokens).any())
    if routed:
        parts.append(_map("Image tokens", "share computed", widths, widths.tokens))
    parts.append(_mean_figure(widths))
    lead = (
        "Sampling runs from left to right. Every column is a sampling step, every row a layer; more ink is more work."
    )
    note = (
        "" if routed else el("p", "No layer of this model has a token router: every token is computed.", class_="note")
    )
    return section("width", "Work over timesteps and layers", lead, figures(parts), note)


def _map(title: str, what: str, widths: Widths, values: FloatArray) -> Figure:
    columns = [f"{timestep:.0f}" for timestep in widths.timesteps]
    rows = tuple(name.replace("transformer_blocks", "blocks") for name in widths.names)
    draw = partial(_draw_map, values, columns, rows, f"{title}: {what} over timestep and layer")
    empty = "Empty cells: layers without a token router." if not np.isfinite(values).all() else ""
    return Figure(title, draw, ramp_legend(what), empty)


def _draw_map(values: FloatArray, columns: list[str], rows: tuple[str, ...], label: str, wide: int) -> Html:
    return heat_map(values, columns, rows, label=label, x_label=_TIMESTEP, width=wide)


def _mean_figure(widths: Widths) -> Figure:
    kinds = (
        ("heads", widths.heads, "c-dynamic"),
        ("groups", widths.groups, "c-control"),
        ("tokens", widths.tokens, "c-supervision"),
    )
    series = []
    for name, values, colour in kinds:
        known = np.isfinite(values).any(axis=1)
        if known.any():
            mean = 100 * np.nanmean(values[known], axis=1)
            series.append(
                Series(name, widths.timesteps[known], mean, colour, "line", percent(float(np.nanmean(values))))
            )

    def draw(wide: int) -> Html:
        label = "Mean share over all layers for each timestep"
        return line_chart(
            series, label=label, x_label=_NOISE, y_label="share, %",
            width=wide, y_range=(0.0, 102.0), x_range=(1000.0, 0.0),
        )  # fmt: skip

    return Figure("Mean over layers", draw, series_legend(series))


def experts(run: RunData) -> Html:
    """How a TD-LoRA's experts share timesteps and layers; nothing for a run without."""
    if run.experts is None:
        return Html("")
    if isinstance(run.experts, Missing):
        return section("experts", "Experts over timesteps", "", missing(run.experts))
    found, metrics = run.experts, run.metrics
    mixed, dead = metrics.curve("gate_entropy"), metrics.curve("dead_experts")
    over_steps = [
        Series("entropy of the gates", mixed.steps, mixed.values, "c-dynamic", "line", digits(mixed.last)),
        Series("dead experts", dead.steps, dead.values, "c-evaluation", "line", percent(dead.last or 0.0)),
    ]
    parts = [_mean_gates(found), _turning(found)]
    if _has_points(over_steps):
        parts.append(_over_steps("Over training", over_steps, "share of the most possible", (0.0, 1.02)))
    lead = (
        "A TD-LoRA mixes its experts anew at every timestep. Entropy is 1 where all gates of a layer are equal and 0 "
        "where one expert does everything; an expert is dead if no timestep gives it half of an equal share."
    )
    return section("experts", "Experts over timesteps", lead, figures(parts))


def _mean_gates(found: Experts) -> Figure:
    means = 100 * found.gates.mean(axis=0)  # [timesteps, experts]
    order = found.timesteps.argsort()
    series = [
        Series(f"expert {i}", found.timesteps[order], means[order, i], _EXPERT_COLOURS[i % len(_EXPERT_COLOURS)])
        for i in range(means.shape[1])
    ]

    def draw(wide: int) -> Html:
        label = "Mean gate of each expert over all layers for each timestep"
        return line_chart(
            series, label=label, x_label=_NOISE, y_label="share of the mixture, %", width=wide, x_range=(1000.0, 0.0)
        )  # fmt: skip

    return Figure("Mean over layers", draw, series_legend(series))


def _turning(found: Experts) -> Figure:
    """How far each block's mixtures are from their own mean over timesteps: what a plain LoRA could not do."""
    order = found.timesteps.argsort()[::-1]
    away = np.abs(found.gates - found.gates.mean(axis=1, keepdims=True)).sum(axis=2) / 2  # [layers, timesteps]
    blocks: dict[str, list[int]] = {}
    for layer, name in enumerate(found.names):
        blocks.setdefault(_block_of(name), []).append(layer)
    values = np.stack([away[layers].mean(axis=0) for layers in blocks.values()], axis=1)  # [timesteps, blocks]
    columns = [f"{timestep:.0f}" for timestep in found.timesteps[order]]

    def draw(wide: int) -> Html:
        label = "Share of the mixture that differs from its mean over timesteps, by timestep and block"
        return heat_map(values[order], columns, list(blocks), label=label, x_label=_NOISE, width=wide)

    return Figure("Away from the mean mixture", draw, ramp_legend("share of the mixture"))


def _block_of(layer: str) -> str:
    """The name of the block that a layer is in, or its own outside of all blocks."""
    parts = layer.replace("transformer_blocks", "blocks").split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def scores(run: RunData) -> Html:
    """Prompt scores as bars and as a table."""
    if isinstance(run.scores, Missing):
        return section("scores", "Prompt scores", "", missing(run.scores))
    found = run.scores
    names = list(found.models)
    categories = list(dict.fromkeys(key for score in found.models.values() for key in score.categories))
    groups = {"overall": [found.models[name].overall for name in names]} | {
        _words(key): [found.models[name].categories.get(key) for name in names] for key in categories
    }
    colours = [_model_colour(name) for name in names]
    label = "Share of prompts judged right, by category and model"
    chart = wide_chart(lambda wide: grouped_bars(groups, colours, label=label, width=wide))
    control = "Control is the static model, fine-tuned equally long. " if "control" in found.models else ""
    lead = (
        f"Share of {count(found.prompts)} prompts whose picture the judge found right, {found.steps} sampling steps. "
        f"{control}The ± is one standard error.{_distance_words(found)}"
    )
    legend = el("figcaption", el("h3", "By category"), bar_legend([*zip(names, colours, strict=True)]))
    return section("scores", "Prompt scores", lead, el("figure", legend, chart), _score_table(found, categories))


def _score_table(found: Scores, categories: list[str]) -> Html:
    columns = [
        Column("model", list(found.models), "left"),
        Column("overall, %", [_with_error(found, name) for name in found.models]),
    ]
    if _has_distances(found):
        columns.append(Column("Fréchet distance", [fixed(score.frechet, 2) for score in found.models.values()]))
    for key in categories:
        shares = [score.categories.get(key) for score in found.models.values()]
        columns.append(Column(_words(key), [DASH if share is None else fixed(100 * share, 1) for share in shares]))
    return table(columns)


def _has_distances(found: Scores) -> bool:
    return any(score.frechet is not None for score in found.models.values())


def _distance_words(found: Scores) -> str:
    if not _has_distances(found):
        return ""
    real = "" if found.frechet_real is None else f"; as many real scenes have {fixed(found.frechet_real, 2)}"
    return f" The Fréchet distance is that from real scenes, on a small classifier's features; less is better{real}."


def standard_error(share: float, prompts: int) -> float:
    """One standard error of a share over that many independent prompts."""
    return math.sqrt(share * (1 - share) / prompts)


def _with_error(found: Scores, name: str) -> str:
    share = found.models[name].overall
    return f"{fixed(100 * share, 1)} ± {fixed(100 * standard_error(share, found.prompts), 1)}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _model_colour(name: str) -> str:
    return f"c-{name}" if name in ("base", "control", "dynamic") else "c-supervision"


def speed(run: RunData) -> Html:
    """Static against dynamic, ideal against realised."""
    if isinstance(run.speed, Missing):
        return section("speed", "Speed", "", missing(run.speed))
    found = run.speed
    ideal_seconds = found.seconds_static / found.ideal
    bars = [
        ("static", found.seconds_static, f"{digits(found.seconds_static)} s", "c-control"),
        ("dynamic, realised", found.seconds_dynamic, f"{digits(found.seconds_dynamic)} s", "c-dynamic"),
        ("dynamic, ideal", ideal_seconds, f"{digits(ideal_seconds)} s", "c-outline"),
    ]
    chart = lying_bars(bars, label="Seconds for one sampling of a batch", width=HALF)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    measured = " · ".join(part for part in (found.machine, versions, found.date) if part)
    head = el("figcaption", el("h3", f"Seconds for a batch of {found.batch}"))
    lead = (
        f"One whole sampling of {found.steps} steps, static and dynamic measured in one run on one machine. "
        "Ideal is the speed-up if time fell as the MACs (multiply-accumulates) do."
    )
    body = el(
        "div", el("figure", head, chart, class_="half"), el("div", _speed_table(found), class_="half"), class_="figures"
    )
    if found.fallback is not None:
        lead += f" Some forwards of the dynamic model ran masked, at the static one's cost: {found.fallback}."
    return section("speed", "Speed", lead, body, el("p", f"Measured on {measured}.", class_="note") if measured else "")


def _speed_table(found: Speed) -> Html:
    rate = [found.batch / found.seconds_static, found.batch / found.seconds_dynamic]
    rows = [
        (
            "MACs per picture",
            with_prefix(found.macs_static, ""),
            with_prefix(found.macs_dynamic, ""),
            f"{fixed(found.ideal, 2)}× ideal",
        ),
        (
            "seconds per batch",
            digits(found.seconds_static),
            digits(found.seconds_dynamic),
            f"{fixed(found.realised, 2)}× realised",
        ),
        ("pictures per second", digits(rate[0]), digits(rate[1]), ""),
        ("share of ideal", "", "", percent(found.share)),
    ]
    cells = [list(column) for column in zip(*rows, strict=True)]
    heads = ("", "static", "dynamic", "speed-up")
    return table([Column(head, cell, "right" if head else "left") for head, cell in zip(heads, cells, strict=True)])


def export(run: RunData) -> Html:
    """Exported files and the check that loaded them back."""
    if isinstance(run.exports, Missing):
        return section("export", "Export", "", missing(run.exports))
    if not run.exports:
        return section("export", "Export", "", el("p", "The export wrote no file.", class_="missing"))
    files = run.exports
    checks = [
        join([verdict(one.verified, "verified", "not verified"), " verified" if one.verified else " not verified"])
        for one in files
    ]
    lead = (
        "Every file next to the model it stands for. "
        "A format that cannot vary with the timestep differs from that model by its nature; one without the routers is "
        "for the complete model, at full cost."
    )
    columns = [
        Column("format", [one.format for one in files], "left"),
        Column("file", [one.path for one in files], "left"),
        Column("size", [with_prefix(one.bytes, "B") for one in files]),
        Column("routers", [{True: "kept", False: "dropped", None: DASH}[one.routers] for one in files], "left"),
        Column("weight error, mean", [digits(one.error_mean, 2) for one in files]),
        Column("weight error, max", [digits(one.error_max, 2) for one in files]),
        Column("output error", [digits(one.output_error, 2) for one in files]),
        Column("loaded back", checks, "left"),
    ]
    return section("export", "Export", lead, table(columns))


def settings(run: RunData) -> Html:
    """The resolved recipe, folded."""
    folded = el("details", el("summary", "Resolved recipe (recipe.yaml)"), el("pre", run.recipe_text))
    return section("settings", "Settings", "", folded)
