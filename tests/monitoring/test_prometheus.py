from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from dydit_scale.monitoring.prometheus import Endpoint
from dydit_scale.monitoring.registry import METRICS, PREFIX

RECORD = {
    "step": 3,
    "consumed": 64,
    "seconds": 0.2,
    "loss_timestep": [0.1, None, 0.3, 0.4],
    "routers": {"heads": [[1.0, 0.5]]},
    "restarts": {"killed": 2},
    "time": 1e9,
}


@contextmanager
def endpoint(rank: int = 0) -> Iterator[Endpoint]:
    made = Endpoint("a", rank, 0, print)
    yield made
    made.close()


def scraped(port: int | None) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def test_what_prometheus_reads_is_the_newest_of_everything_with_type_and_labels() -> None:
    with endpoint() as made:
        made.write({**RECORD, "step": 2, "seconds": 7.0})
        made.write(RECORD)
        families = scraped(made.port)
    known = {(PREFIX + m.name).removesuffix("_total"): m for m in METRICS}
    assert len(families) == len(RECORD)
    for name, family in families.items():
        assert family.type == known[name].kind and family.documentation == known[name].help
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(known[name].all_labels)
    values = {(s.name, *sorted(s.labels.items())): s.value for f in families.values() for s in f.samples}
    run = ("run", "a")
    assert values["dydit_train_step", run] == 3 and values["dydit_consumed_samples_total", run] == 64
    assert values["dydit_loss_timestep", run, ("timestep", "750")] == 0.4
    assert ("dydit_loss_timestep", run, ("timestep", "250")) not in values
    labels = (("kind", "heads"), ("layer", "0"), run, ("timestep", "500"))
    assert values[("dydit_router_activation_ratio", *labels)] == 0.5
    assert values["dydit_restarts_total", ("reason", "killed"), run] == 2
    assert values["dydit_heartbeat_timestamp_seconds", ("rank", "0"), run] == 1e9
    assert values["dydit_step_seconds_count", run] == 2 and values["dydit_step_seconds_sum", run] == 7.2
    assert values["dydit_step_seconds_bucket", ("le", "0.25"), run] == 1


def test_another_machine_tells_of_its_own_process_alone() -> None:
    with endpoint(rank=8) as made:
        made.write({"step": 3, "time": 1e9, "rank_step_seconds": 0.5})
        families = scraped(made.port)
    assert sorted(families) == ["dydit_heartbeat_timestamp_seconds", "dydit_rank_step_seconds"]
    labels = [sample.labels for family in families.values() for sample in family.samples]
    assert labels == [{"run": "a", "rank": "8"}] * 2


def test_a_port_that_is_taken_is_told_and_survived() -> None:
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = Endpoint("a", 0, port, said.append)
        made.write(RECORD)
        made.close()
    assert made.port is None and len(said) == 1
    assert f"port {port} (monitor.prometheus_port) cannot be had" in said[0] and "training goes on" in said[0]
