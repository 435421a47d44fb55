"""What a recipe would need on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from dydit_scale.adapters.td_lora import is_dynamic_name
from dydit_scale.data.buckets import bucket_counts
from dydit_scale.data.index import INDEX_FILE, ShardIndex, load_index
from dydit_scale.parallel.world import World
from dydit_scale.planning.bases import Base, find_base
from dydit_scale.planning.memory import GIB, Holdings, Peak, find_peak, holdings, layout, slack, uses_encoders
from dydit_scale.planning.network import Planned
from dydit_scale.planning.speed import Cluster, Speed, Work, encoding_macs, picture_macs, speed, traffic, work
from dydit_scale.planning.trace import Segment, trace_encoding, trace_step
from dydit_scale.train.build import frozen_dtype
from dydit_scale.train.checks import check_batch
from dydit_scale.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known before anything is rented."""

    recipe: Recipe
    cluster: Cluster
    parameters: dict[str, int]
    """Their numbers: total, trainable, frozen, routers, adapters; and those around the network."""
    peak: Peak
    """Tensors of one rank."""
    slack: int
    """Bytes that a GPU gives to no tensor."""
    host: dict[str, int]
    """Bytes of the machine's memory for one rank, by name."""
    loading: int
    """Bytes of the machine's memory that one rank takes while it builds the network, before anything is sharded."""
    work: Work
    traffic: dict[str, float]
    """Bytes that a rank sends in a step."""
    speed: Speed
    checkpoint: int
    """Bytes of one."""
    buckets: dict[str, int] | None
    """Samples of each pixel size; None without an index at hand."""

    @property
    def needed(self) -> int:
        """Bytes of one GPU."""
        return self.peak.total + self.slack

    @property
    def fits(self) -> bool:
        """Whether one GPU has them."""
        return self.needed <= self.cluster.memory

    @property
    def micro_batch(self) -> int:
        """Samples of a rank at a time."""
        return self.recipe.train.batch_size // self.cluster.gpus // self.recipe.train.accumulation

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints while another one is written."""
        train = self.recipe.train
        kept = train.keep + (train.steps // train.keep_every if train.keep_every else 0)
        return self.checkpoint * (kept + 1)

    @property
    def hours(self) -> tuple[float, float]:
        """Of the whole run."""
        fast, slow = (self.recipe.train.steps * seconds / 3600 for seconds in self.speed.seconds)
        return fast, slow

    @property
    def energy(self) -> tuple[float, float]:
        """kWh of the GPUs of the whole run, at their limit."""
        fast, slow = (hours * self.cluster.gpus * self.cluster.watts / 1000 for hours in self.hours)
        return fast, slow

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "fits": self.fits,
            "needed_bytes": self.needed,
            "memory_bytes": self.peak.items | {"slack": self.slack},
            "peak_during": self.peak.when,
            "host_bytes": self.host,
            "host_bytes_while_loading": self.loading,
            "parameters": self.parameters,
            "macs_per_sample": self.work._asdict(),
            "sent_bytes_per_step": self.traffic,
            "step_seconds": self.speed.seconds,
            "mfu": self.speed.mfu,
            "hours": self.hours,
            "energy_kwh": self.energy,
            "checkpoint_bytes": self.checkpoint,
            "checkpoints_bytes": self.disk,
            "buckets": self.buckets,
            "micro_batch": self.micro_batch,
            "cluster": asdict(self.cluster),
        }


class Planner:
    """Plans recipes of one base and remembers what it traced.

    Args:
        encoded: The data hold latents and embeddings; None looks into their index, and without one counts with pixels.
    """

    def __init__(self, base: Base, *, encoded: bool | None = None) -> None:
        self.base, self._encoded = base, encoded
        self._traced: dict[Any, tuple[list[Segment], int]] = {}
        self._picture_macs = cache(partial(picture_macs, base))  # of a side

    def plan(self, recipe: Recipe, cluster: Cluster) -> Plan:
        """Raises ValueError where a run would refuse to start: a batch that does not divide, an engine for one
        process on several."""
        check_batch(recipe, World(world_size=cluster.gpus))
        if recipe.engine.name == "single" and cluster.gpus > 1:
            raise ValueError(f"engine.name: single is for one GPU, got {cluster.gpus}; set engine.name to zero or fsdp")
        index = _index(recipe)
        encoded = self._encoded if self._encoded is not None else index is not None and index.encoding is not None
        planned = Planned.build(recipe, self.base)
        own = holdings(recipe, planned, encoded=encoded)
        how = layout(recipe, own, cluster.gpus)
        micro = recipe.train.batch_size // cluster.gpus // recipe.train.accumulation
        segments, encoding = self._trace(recipe, micro, encoded)
        peak = find_peak(segments, how, encoding=encoding, batches=_batch_bytes(recipe, self.base, micro, encoded))
        average = recipe.train.ema is not None
        stored = own.whole.trainable * (3 + average)
        host = dict(how.host)
        if recipe.train.async_save:
            host["staged checkpoint"] = stored // (1 if recipe.engine.name in ("single", "ddp") else cluster.gpus)
        encoders = 0.0 if encoded else encoding_macs(recipe, planned, self._picture_macs(recipe.data.image_size))
        of_sample = work(recipe, planned, encoders)
        return Plan(
            recipe=recipe,
            cluster=cluster,
            parameters=_parameters(planned),
            peak=peak,
            slack=slack(peak.total, cluster.gpus),
            host=host,
            loading=_loading(recipe, planned, own, encoded=encoded),
            work=of_sample,
            traffic=traffic(recipe, own, cluster.gpus),
            speed=speed(recipe, of_sample, own, cluster),
            checkpoint=stored,
            buckets=_buckets(recipe, index),
        )

    def _trace(self, recipe: Recipe, micro: int, encoded: bool) -> tuple[list[Segment], int]:
        train = recipe.train
        key = (recipe.engine.precision, train.gradient_checkpointing, train.checkpointed_blocks, micro, encoded)
        if key not in self._traced:
            encoding = 0 if encoded else trace_encoding(recipe, self.base, micro, gpu=True)
            self._traced[key] = (trace_step(recipe, self.base, micro, gpu=True), encoding)
        return self._traced[key]


def make_plan(recipe: Recipe, cluster: Cluster, *, encoded: bool | None = None) -> Plan:
    """What the recipe needs on the cluster; no weight is read and no GPU asked.

    Raises ValueError where a run would refuse to start, or if the base is not known.
    """
    return Planner(find_base(recipe.model.base), encoded=encoded).plan(recipe, cluster)


def _loading(recipe: Recipe, planned: Planned, own: Holdings, *, encoded: bool) -> int:
    """The network comes in fp32, and the teacher after it, whatever they are cast to then; files are mapped."""
    base, around = planned.base, planned.base.vae_parameters
    if uses_encoders(recipe, encoded=encoded):
        around += sum(base.text_encoders.values())
    teacher = 0 if planned.teacher is None else sum(p.numel() for p in planned.teacher.parameters())
    return around * frozen_dtype(recipe).itemsize + max(4 * own.numel, own.whole.all + 4 * teacher)


def _parameters(planned: Planned) -> dict[str, int]:
    named = list(planned.network.named_parameters())
    adapters = ("lora_", "td_down", "td_up", "td_router")
    found = {
        "total": sum(p.numel() for _, p in named),
        "trainable": sum(p.numel() for _, p in named if p.requires_grad),
        "routers": sum(p.numel() for name, p in named if is_dynamic_name(name)),
        "adapters": sum(p.numel() for name, p in named if any(word in name for word in adapters)),
        "autoencoder": planned.base.vae_parameters,
    } | dict(planned.base.text_encoders)
    found["frozen"] = found["total"] - found["trainable"]
    return found


def _index(recipe: Recipe) -> ShardIndex | None:
    """Of the data, if there is one source and it lies in a folder of this machine."""
    folder = Path(recipe.data.path)
    if not recipe.data.path or recipe.data.mode == "stream" or not (folder / INDEX_FILE).is_file():
        return None
    return load_index(folder)


def _buckets(recipe: Recipe, index: ShardIndex | None) -> dict[str, int] | None:
    if index is None:
        return None
    return {f"{b.height}x{b.width}": n for b, n in bucket_counts(index, recipe.data).items()}


def _batch_bytes(recipe: Recipe, base: Base, micro: int, encoded: bool) -> int:
    """fp32 pictures of a micro-batch, or moments of latents."""
    data = recipe.data
    frames = data.frames + data.images_per_clip
    pixels = 3 * data.image_size**2
    if encoded:
        pixels = 2 * base.vae.get("latent_channels", 4) * (data.image_size // base.vae_scale_factor) ** 2
    return 4 * micro * frames * pixels


def parse_memory(text: str) -> int:
    """Bytes of ``80GiB``, ``80GB`` or ``80`` (GiB).

    Raises ValueError for anything else.
    """
    units: Sequence[tuple[str, int]] = (("GiB", GIB), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("", GIB))
    for unit, size in units:
        number = text.strip().removesuffix(unit).strip()
        try:
            if text.strip().endswith(unit) and float(number) > 0:
                return int(float(number) * size)
        except ValueError:
            continue
    raise ValueError(f"--gpu-memory {text}: expected a size such as 80GiB or 80GB")


def with_changes(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values, by dotted name with ``__`` for the dot; those of a part are checked together."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        parts.setdefault(part, {})[key] = value
    return replace(recipe, **{part: replace(getattr(recipe, part), **values) for part, values in parts.items()})
