from __future__ import annotations

from pathlib import Path

import pytest

from dydit_scale.monitoring.config import MonitorConfig
from dydit_scale.monitoring.registry import METRICS, markdown_table, samples, scalars

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "step": 3,
    "loss": 0.5,
    "loss_timestep": [0.1, None, 0.3, 0.4],
    "routers": {"heads": [[1.0, 0.5], [0.0, 0.5]], "tokens": [[0.2, 0.2], [0.4, 0.4]]},
    "mfu": {"activated": 0.2, "dense": 0.4},
    "event": "rollback",
    "unknown": 7,
}


def test_names_are_unique_and_as_prometheus_wants_them() -> None:
    assert len(METRICS) >= 40
    assert len({m.name for m in METRICS}) == len({m.key for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric
        assert metric.help and not metric.help.endswith("."), metric


def test_numbers_of_a_record_come_with_their_labels() -> None:
    found = {(s.metric.name, s.labels): s.value for s in samples(RECORD)}
    assert found["train_step", ()] == 3
    assert [k[1] for k in found if k[0] == "loss_timestep"] == [("0",), ("500",), ("750",)]
    assert found["router_activation_ratio", ("heads", "1", "500")] == 0.5
    assert found["router_activation_ratio", ("tokens", "1", "0")] == 0.4
    assert found["mfu", ("dense",)] == 0.4
    assert len(found) == 1 + 1 + 3 + 8 + 2


def test_curves_are_flat_numbers() -> None:
    assert scalars(RECORD) == pytest.approx(
        {
            "step": 3,
            "loss": 0.5,
            "unknown": 7,
            "loss_timestep/0": 0.1,
            "loss_timestep/500": 0.3,
            "loss_timestep/750": 0.4,
            "routers/heads": 0.5,
            "routers/tokens": 0.3,
            "mfu/activated": 0.2,
            "mfu/dense": 0.4,
        }
    )


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert markdown_table() in page, "put the output of registry.markdown_table() into docs/monitoring.md"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("sinks", ("tensorbord",), "expected some of tensorboard, wandb, mlflow; got 'tensorbord'"),
        ("prometheus_port", 70000, r"expected 0 \(off\) to 65535; got 70000"),
        ("peak_tflops", 0.0, "monitor.peak_tflops: expected a positive number"),
        ("timestep_buckets", 0, "monitor.timestep_buckets: expected 1 or more; got 0"),
        ("routers_every", 0, "monitor.routers_every: expected 1 or more; got 0"),
    ],
)
def test_bad_settings_are_told(field: str, value: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MonitorConfig(**{field: value})  # type: ignore[arg-type]
