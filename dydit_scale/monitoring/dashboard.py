"""The Grafana dashboard, made from a short list of panels: ``python -m dydit_scale.monitoring.dashboard > FILE``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dydit_scale.monitoring.registry import PREFIX

_WIDE, _HIGH = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """One chart or number. In its expressions ``~NAME`` is the metric dydit_NAME of the run that was chosen."""

    title: str
    queries: dict[str, str]
    """Expressions by their legend."""
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    note: str = ""


# fmt: off
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Is it well?": (
        Panel("Step", {"step": "~train_step"}, width=3, kind="stat"),
        Panel("Progress", {"done": "(~train_step + 1) / ~train_steps"}, "percentunit", 3, "stat"),
        Panel("Since progress", {"rank {{rank}}": "time() - ~heartbeat_timestamp_seconds"}, "s", 3, "stat"),
        Panel("Since commit", {"commit": "time() - ~checkpoint_timestamp_seconds"}, "s", 3, "stat"),
        Panel("Goodput", {"goodput": "~goodput_ratio"}, "percentunit", 3, "stat", "Share of time in steps that count"),
        Panel("Trouble", {
            "left out": "~nonfinite_steps_total", "rollbacks": "~rollbacks_total", "bad samples": "~bad_samples_total",
            "failed saves": "~checkpoint_failures_total", "restarts": "sum(~restarts_total)",
        }, width=9, kind="stat"),
    ),
    "Learning": (
        Panel("Loss", {"flow": "~loss_flow", "supervision": "~loss_supervision", "evaluation": "~error_evaluation"}),
        Panel("Loss by timestep", {"from {{timestep}}": "~loss_timestep"}, note="1000 is noise"),
        Panel("Gradient and learning rate", {"gradient": "~grad_norm", "learning rate": "~learning_rate"}),
    ),
    "Budget": (
        Panel("Cost ratio", {
            "training": "~cost_ratio", "target": "~cost_ratio_target", "evaluation": "~cost_ratio_evaluation",
        }, "percentunit", note="MACs dynamic / static"),
        Panel("Routers by kind", {"{{kind}}": "avg by (kind) (~router_activation_ratio)"}, "percentunit"),
        Panel("Dead", {"heads": "~dead_heads_ratio", "experts": "~dead_experts_ratio"}, "percentunit"),
        Panel("Heads by block", {"{{layer}}": 'avg by (layer) (~router_activation_ratio{kind="heads"})'},
              "percentunit", kind="heatmap"),
        Panel("MLP groups by block", {"{{layer}}": 'avg by (layer) (~router_activation_ratio{kind="groups"})'},
              "percentunit", kind="heatmap"),
        Panel("Tokens by timestep", {"{{timestep}}": 'avg by (timestep) (~router_activation_ratio{kind="tokens"})'},
              "percentunit", kind="heatmap"),
    ),
    "Machine": (
        Panel("Samples per second", {"samples": "~samples_per_second"}),
        Panel("Step", {
            "median": "histogram_quantile(0.5, sum by (le) (rate(~step_seconds_bucket[5m])))",
            "99 %": "histogram_quantile(0.99, sum by (le) (rate(~step_seconds_bucket[5m])))",
        }, "s"),
        Panel("Utilisation", {"{{work}}": "~mfu"}, "percentunit", note="Of what the gates left, and as if dense"),
        Panel("Wait for data", {"slowest reader": "avg_over_time(~data_wait_ratio[5m])"}, "percentunit"),
        Panel("First forward, over ranks", {"{{stat}}": "~rank_seconds"}, "s", note="Apart: stragglers"),
        Panel("GPU memory", {"rank {{rank}}": "~gpu_memory_bytes"}, "bytes"),
    ),
    "Checkpoints, data, sinks": (
        Panel("Saves", {"until committed": "~checkpoint_seconds", "blocked": "~checkpoint_blocked_seconds"}, "s"),
        Panel("Steps since the commit", {
            "steps": "~train_step + 1 - ~checkpoint_step", "interval": "~checkpoint_interval_steps",
        }),
        Panel("Shards and records", {
            "from the cache": "rate(~shard_cache_hits_total[5m])",
            "downloaded": "rate(~shard_cache_misses_total[5m])",
            "{{sink}} dropped": "rate(~sink_dropped_total[5m])",
        }, "ops"),
    ),
}
# fmt: on


def expression(text: str) -> str:
    """A panel's expression in PromQL."""
    names = text.split("~")
    done = [names[0]]
    for part in names[1:]:
        length = next((i for i, letter in enumerate(part) if not (letter.isalnum() or letter == "_")), len(part))
        name, rest = part[:length], part[length:]
        chosen = 'run="$run"'
        done.append(
            f"{PREFIX}{name}{{{chosen}, {rest[1:]}" if rest.startswith("{") else f"{PREFIX}{name}{{{chosen}}}{rest}"
        )
    return "".join(done)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in SECTIONS.items():
        panels.append(_placed({"type": "row", "title": title, "collapsed": False}, len(panels), 0, top, _WIDE, 1))
        top, left = top + 1, 0
        for panel in row:
            height = _HIGH // 2 if panel.kind == "stat" else _HIGH
            if left + panel.width > _WIDE:
                top, left = top + height, 0
            panels.append(_placed(_panel(panel), len(panels), left, top, panel.width, height))
            left += panel.width
        top += height
    runs = f"label_values({PREFIX}train_step, run)"
    return {
        "title": "dydit_scale training",
        "uid": "dydit-scale-training",
        "tags": ["dydit_scale"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run", "label": "Run", "type": "query", "datasource": _SOURCE, "refresh": 2,
                    "query": {"query": runs, "refId": "runs"}, "definition": runs,
                },
            ]
        },
        "panels": panels,
    }  # fmt: skip


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": expression(text), "legendFormat": legend,
            "instant": panel.kind == "stat",
        }
        for i, (legend, text) in enumerate(panel.queries.items())
    ]  # fmt: skip
    options: dict[str, dict[str, Any]] = {
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "textMode": "auto"},
        "heatmap": {"calculate": False, "color": {"mode": "scheme", "scheme": "Blues", "min": 0, "max": 1}},
    }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": options[panel.kind],
    }


def _placed(panel: dict[str, Any], number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"id": number + 1, **panel, "gridPos": {"x": x, "y": y, "w": width, "h": height}}


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
