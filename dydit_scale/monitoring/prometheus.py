"""The endpoint that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family

from dydit_scale.monitoring.registry import METRICS, PREFIX, SECONDS, Metric, samples


class Endpoint:
    """The newest value of every measurement, over HTTP from a thread of its own.

    Args:
        run: its name.
        rank: of this process.
        port: 0 takes any that is free.
        say: tells people that the port cannot be had; then there is no endpoint, and ``port`` is None.
    """

    def __init__(self, run: str, rank: int, port: int, say: Callable[[str], object]) -> None:
        self._constant = {"run": run, "rank": str(rank)}
        self._values: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._lock = Lock()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._histograms = {
            metric: Histogram(PREFIX + metric.name, metric.help, metric.all_labels, buckets=SECONDS, registry=None)
            for metric in METRICS
            if metric.kind == "histogram" and rank == 0
        }
        self.port: int | None = None
        try:
            self._server, _ = start_http_server(port, registry=self.registry)
            self.port = self._server.server_port
        except OSError as error:
            say(f"warning: port {port} (monitor.prometheus_port) cannot be had: {error}; training goes on without")

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the numbers of a record."""
        with self._lock:
            for metric, labels, value in samples(record):
                if metric.of == "run" and self._constant["rank"] != "0":
                    continue
                if metric.kind == "histogram":
                    self._histograms[metric].labels(*self._labels(metric, labels)).observe(value)
                else:
                    self._values[metric, labels] = value

    def close(self) -> None:
        """Give the port back."""
        if self.port is not None:
            self._server.shutdown()
            self._server.server_close()

    def describe(self) -> Iterable[Family]:
        """Nothing: what is there is known only when it is asked for."""
        return []

    def collect(self) -> Iterable[Family]:
        """What Prometheus is told."""
        families: dict[Metric, GaugeMetricFamily | CounterMetricFamily] = {}
        with self._lock:
            for (metric, labels), value in self._values.items():
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                if metric not in families:
                    families[metric] = kind(metric.full_name, metric.help, labels=metric.all_labels)
                families[metric].add_metric(self._labels(metric, labels), value)
            histograms = [family for one in self._histograms.values() for family in one.collect()]
        for family in histograms:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        return [*families.values(), *histograms]

    def _labels(self, metric: Metric, labels: tuple[str, ...]) -> list[str]:
        own = len(metric.all_labels) - len(metric.labels)
        return [*(self._constant[label] for label in metric.all_labels[:own]), *labels]
