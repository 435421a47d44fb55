"""What a run tells, and to whom."""

from __future__ import annotations

from dataclasses import dataclass

SINKS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Where measurements go besides ``RUN/metrics.jsonl``, and how finely some are taken."""

    sinks: tuple[str, ...] = ("tensorboard",)
    """Of tensorboard (``RUN/tensorboard``), wandb and mlflow, which are set up by their own environment variables
    (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ...)."""
    prometheus_port: int = 0
    """Port of an endpoint for Prometheus in the first process of each machine; 0 for none."""
    peak_tflops: float | None = None
    """What one device can compute in a second (10^12 operations), for the utilisation; null: measured at the start, by
    products of matrices in the run's precision."""
    timestep_buckets: int = 8
    """Equal parts of the noise levels, for losses and routers over timesteps."""
    routers_every: int = 20
    """Steps between two records of what the routers do."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.sinks) - set(SINKS)):
            raise ValueError(f"monitor.sinks: expected some of {', '.join(SINKS)}; got {unknown[0]!r}")
        if not 0 <= self.prometheus_port < 65536:
            raise ValueError(f"monitor.prometheus_port: expected 0 (off) to 65535; got {self.prometheus_port}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"monitor.peak_tflops: expected a positive number, or null; got {self.peak_tflops}")
        for name in ("timestep_buckets", "routers_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"monitor.{name}: expected 1 or more; got {getattr(self, name)}")
