"""Every measurement by name: the one table from which the endpoint, the sinks, the docs and the tests take it.

A record is a dict of JSON values, as in ``RUN/metrics.jsonl``. A measurement with labels is a list or a dict in it,
nested once for each label; a list stands for its indices, a list over timestep buckets for their lower edges, of 1000.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PREFIX = "dydit_"
TIMESTEP = "timestep"
COMMON = ("run",)
"""Labels of every series; those of a process have ``rank`` too."""
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0)
"""Upper edges of the histogram of steps."""


@dataclass(frozen=True)
class Metric:
    """One measurement."""

    name: str
    """For Prometheus, without the prefix."""
    key: str
    """In a record."""
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    of: Literal["run", "process"] = "run"
    """``run``: one value, from rank 0. ``process``: from the first process of each machine."""
    clock: bool = False
    """Whether it tells of time or of the machine, and differs between two runs that train alike."""

    @property
    def full_name(self) -> str:
        """As Prometheus knows it."""
        return PREFIX + self.name

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Those that every series of it has."""
        return (*COMMON, *(("rank",) if self.of == "process" else ()), *self.labels)


# fmt: off
METRICS = (
    Metric("train_step", "step", "gauge", "Steps from 0: the newest that was trained"),
    Metric("train_steps", "steps", "gauge", "Steps that the recipe asks for"),
    Metric("consumed_samples_total", "consumed", "counter", "Samples read from the training stream"),
    Metric("loss", "loss", "gauge", "The loss, all terms weighted"),
    Metric("loss_flow", "loss_flow", "gauge", "Error of the prediction (velocity or noise)"),
    Metric("loss_timestep", "loss_timestep", "gauge", "The same by timestep, where the step had samples", (TIMESTEP,)),
    Metric("loss_supervision", "loss_supervision", "gauge", "Distillation, or the loss of the complete model"),
    Metric("loss_cost", "loss_cost", "gauge", "Squared distance of the cost ratio from its target"),
    Metric("learning_rate", "lr", "gauge", "Of weights; routers may have another"),
    Metric("grad_norm", "grad_norm", "gauge", "Norm of the gradient before it is clipped"),
    Metric("cost_ratio", "ratio", "gauge", "MACs dynamic / static, in training"),
    Metric("cost_ratio_target", "target", "gauge", "The target of this step"),
    Metric("cost_ratio_evaluation", "ratio_eval", "gauge", "MACs dynamic / static with thresholded gates"),
    Metric("error_evaluation", "mse_eval", "gauge", "Error of the prediction on fixed noise"),
    Metric(
        "router_activation_ratio",
        "routers",
        "gauge",
        "Share of heads, MLP groups or tokens that work",
        ("kind", "layer", TIMESTEP),
    ),
    Metric("dead_heads_ratio", "dead_heads", "gauge", "Share of heads that no sample used since the last record"),
    Metric("dead_experts_ratio", "dead_experts", "gauge", "Share of TD-LoRA experts that no timestep uses"),
    Metric("expert_entropy_ratio", "gate_entropy", "gauge", "Entropy of the experts' mixtures; 1 where all are equal"),
    Metric("nonfinite_steps_total", "nonfinite", "counter", "Steps left out since the start of the process"),
    Metric("rollbacks_total", "rollbacks", "counter", "Returns to a checkpoint"),
    Metric("restarts_total", "restarts", "counter", "Starts after an attempt that ended so", ("reason",)),
    Metric("step_seconds", "seconds", "histogram", "Wall clock of a step, its data included", clock=True),
    Metric(
        "rank_seconds",
        "rank_seconds",
        "gauge",
        "Wait for data, encoders and forward of a step's first micro-batch: min, mean, max over ranks",
        ("stat",),
        clock=True,
    ),
    Metric("slowest_rank", "slowest_rank", "gauge", "The rank with the longest of these", clock=True),
    Metric("data_wait_ratio", "data_wait", "gauge", "Share of a step that its slowest reader waited", clock=True),
    Metric("samples_per_second", "samples_per_second", "gauge", "Samples trained per second, all ranks", clock=True),
    Metric(
        "model_tflops",
        "tflops",
        "gauge",
        "Operations per second and device, 10^12: of what the gates left (activated), and as if nothing were skipped "
        "(dense)",
        ("work",),
        clock=True,
    ),
    Metric("mfu", "mfu", "gauge", "The same as a share of the device's peak", ("work",), clock=True),
    Metric("peak_tflops", "peak_tflops", "gauge", "Peak of one device, 10^12 operations per second", clock=True),
    Metric(
        "goodput_ratio", "goodput", "gauge", "Seconds of steps that count / wall clock since the run began", clock=True
    ),
    Metric("checkpoint_seconds", "checkpoint_seconds", "gauge", "From the call to the commit", clock=True),
    Metric("checkpoint_blocked_seconds", "checkpoint_blocked_seconds", "gauge", "Training stood still", clock=True),
    Metric("checkpoint_bytes", "checkpoint_bytes", "gauge", "Of the newest save, all ranks"),
    Metric("checkpoint_failures", "checkpoint_failures", "gauge", "Failed saves in a row"),
    Metric("checkpoint_failures_total", "checkpoint_failures_total", "counter", "Failed saves"),
    Metric("checkpoint_step", "checkpoint_step", "gauge", "Steps in the newest commit", clock=True),
    Metric(
        "checkpoint_timestamp_seconds", "checkpoint_time", "gauge", "When it was committed (since 1970)", clock=True
    ),
    Metric("checkpoint_interval_steps", "save_every", "gauge", "Steps between checkpoints, by the recipe"),
    Metric("bad_samples_total", "bad_samples", "counter", "Unusable samples met, all ranks"),
    Metric("shard_cache_hits_total", "cache_hits", "counter", "Shards opened that the node had", clock=True),
    Metric("shard_cache_misses_total", "cache_misses", "counter", "Shards that had to be downloaded", clock=True),
    Metric("sink_dropped_total", "dropped", "counter", "Records that a sink did not take", ("sink",), clock=True),
    Metric("sink_failures_total", "sink_failures", "counter", "Errors of a sink", ("sink",), clock=True),
    Metric("heartbeat_timestamp_seconds", "time", "gauge", "Newest progress (since 1970)", of="process", clock=True),
    Metric("rank_step_seconds", "rank_step_seconds", "gauge", "Wall clock of a step", of="process", clock=True),
    Metric("rank_data_seconds", "rank_data_seconds", "gauge", "Wait for its data", of="process", clock=True),
    Metric("gpu_memory_bytes", "gpu_memory", "gauge", "Most that was allocated", of="process", clock=True),
)
# fmt: on
BY_KEY = {metric.key: metric for metric in METRICS}
CLOCK_KEYS = frozenset({"data_seconds"} | {metric.key for metric in METRICS if metric.clock})
"""Keys of a record that differ between two runs that train alike."""


class Sample(NamedTuple):
    """One number of one series."""

    metric: Metric
    labels: tuple[str, ...]
    """Values of ``metric.labels``."""
    value: float


def samples(record: Mapping[str, Any]) -> Iterator[Sample]:
    """All numbers of a record that the table knows; None is left out."""
    for key, value in record.items():
        if key in BY_KEY:
            yield from _samples(BY_KEY[key], value, ())


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record as flat numbers, for those who draw curves: nested values by ``key/label``, deeper ones as their mean
    over all but the first label."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, (int, float)):
            flat[key] = float(value)
        elif key in BY_KEY:
            grouped: dict[str, list[float]] = {}
            for sample in _samples(BY_KEY[key], value, ()):
                grouped.setdefault(f"{key}/{sample.labels[0]}", []).append(sample.value)
            flat |= {name: sum(found) / len(found) for name, found in grouped.items()}
    return flat


def markdown_table() -> str:
    """The table of the docs."""
    rows = ["| metric | type | labels | what it is |", "|---|---|---|---|"]
    rows += [f"| `{m.full_name}` | {m.kind} | {', '.join(m.all_labels)} | {m.help} |" for m in METRICS]
    return "\n".join(rows) + "\n"


def _samples(metric: Metric, value: Any, labels: tuple[str, ...]) -> Iterator[Sample]:
    if value is None:
        return
    if len(labels) == len(metric.labels):
        yield Sample(metric, labels, float(value))
        return
    if isinstance(value, list):
        edges = metric.labels[len(labels)] == TIMESTEP
        value = {str(round(1000 * i / len(value)) if edges else i): part for i, part in enumerate(value)}
    for label, part in value.items():
        yield from _samples(metric, part, (*labels, label))
