"""The dashboard and the alert rules ask for what there is."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from dydit_scale.monitoring.dashboard import dashboard, expression
from dydit_scale.monitoring.registry import METRICS, PREFIX, Metric

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
COUNTER_FUNCTIONS = {"rate", "irate", "increase"}
SUFFIXES = ("_bucket", "_sum", "_count")
KNOWN = {metric.full_name: metric for metric in METRICS}
KNOWN |= {m.full_name + suffix: m for m in METRICS if m.kind == "histogram" for suffix in SUFFIXES}


def board_expressions() -> dict[str, str]:
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    return {
        f"{panel['title']}, {target['legendFormat']}": target["expr"].replace("$run", "a")
        for panel in panels
        for target in panel["targets"]
    }


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]


EXPRESSIONS = board_expressions() | {rule["alert"]: rule["expr"] for rule in alert_rules()}


def selected(expression: str) -> Iterator[tuple[Metric, str, list[str]]]:
    """Metrics, the function around them and the labels that are asked for."""
    yield from _selected(promql.parse(expression), "", [])


def _selected(node: Any, function: str, labels: list[str]) -> Iterator[tuple[Metric, str, list[str]]]:
    if isinstance(node, promql.VectorSelector):
        assert node.name in KNOWN, f"{node.name} is no metric"
        asked = [matcher.name for matcher in node.matchers.matchers]
        yield KNOWN[node.name], function, [*labels, *asked]
    elif isinstance(node, promql.MatrixSelector):
        yield from _selected(node.vector_selector, function, labels)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _selected(argument, node.func.name, labels)
    elif isinstance(node, promql.AggregateExpr):
        by = list(node.modifier.labels) if node.modifier else []
        yield from _selected(node.expr, function, [*labels, *by])
    elif isinstance(node, promql.BinaryExpr):
        for side in (node.lhs, node.rhs):
            yield from _selected(side, "", labels)
    elif isinstance(node, (promql.ParenExpr, promql.UnaryExpr)):
        yield from _selected(node.expr, function, labels)
    else:
        assert isinstance(node, promql.NumberLiteral), node


def problems(expression: str) -> list[str]:
    found = []
    for metric, function, labels in selected(expression):
        total = metric.kind in ("counter", "histogram")
        if function in COUNTER_FUNCTIONS and not total:
            found.append(f"{function} of the {metric.kind} {metric.full_name}")
        if unknown := set(labels) - set(metric.all_labels) - ({"le"} if metric.kind == "histogram" else set()):
            found.append(f"{metric.full_name} has no label {sorted(unknown)}")
    return found


def test_there_are_panels_and_rules() -> None:
    assert len(board_expressions()) >= 35 and len(alert_rules()) >= 10


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_name_metrics_with_their_labels_and_types(name: str) -> None:
    assert list(selected(EXPRESSIONS[name])), "an expression without a metric"
    assert problems(EXPRESSIONS[name]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "dydit_los",
        "rate(dydit_loss[5m])",
        'dydit_mfu{kind="dense"}',
        "sum by (rank) (dydit_loss)",
        "abs(1 - avg_over_time(dydit_losss[5m]))",
    ],
)
def test_wrong_expressions_are_found(wrong: str) -> None:
    try:
        assert problems(wrong) != []
    except AssertionError as error:
        assert "is no metric" in str(error)


def test_legends_name_labels_that_are_there() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            (metric, *_), *_ = selected(target["expr"].replace("$run", "a"))
            for label in target["legendFormat"].split("{{")[1:]:
                assert label.partition("}}")[0] in metric.all_labels, target


def test_every_metric_is_shown_or_has_a_reason_not_to_be() -> None:
    shown = {metric.name for expression in EXPRESSIONS.values() for metric, *_ in selected(expression)}
    left_out = {metric.name for metric in METRICS} - shown
    assert left_out == {
        "consumed_samples_total", "loss", "loss_cost", "expert_entropy_ratio", "model_tflops", "peak_tflops",
        "slowest_rank", "checkpoint_bytes", "sink_failures_total", "rank_step_seconds", "rank_data_seconds",
    }  # fmt: skip


def test_the_file_is_what_the_code_makes() -> None:
    text = (FOLDER / "dashboard.json").read_text()
    assert json.loads(text) == dashboard(), "write it anew: python -m dydit_scale.monitoring.dashboard > FILE"
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells), "panels overlap"


def test_names_in_a_panel_become_selectors_of_the_run() -> None:
    assert expression('~a - ~b{kind="x"}[5m]') == f'{PREFIX}a{{run="$run"}} - {PREFIX}b{{run="$run", kind="x"}}[5m]'


def test_alerts_say_which_run_and_how_bad() -> None:
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, e.g. of Debian's package prometheus")
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
