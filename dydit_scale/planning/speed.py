"""How long a step takes and what it sends, from counts of operations and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dydit_scale.dynamic.cost import ModelCost
from dydit_scale.models.encoders import posterior_of
from dydit_scale.planning.bases import Base
from dydit_scale.planning.memory import Holdings
from dydit_scale.planning.network import Planned, stand_in
from dydit_scale.train.objective import sample_size
from dydit_scale.train.recipe import Recipe

BUSY = (0.3, 0.5)
"""Shares of a GPU's dense peak that training of large transformers reaches with flash attention, at least and at
most."""
_PCIE = 20e9
"""Bytes a second between a GPU and the machine's memory, in one direction: PCIe 4.0 x16 has 32e9 at best."""
_HOST_MEMORY = 10e9
"""Bytes a second that AdamW reads and writes in the machine's memory for each rank, when all ranks step at once."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """From the maker's data sheet."""

    memory: float
    """GiB that a program sees, about."""
    tflops: float
    """Dense bf16, without sparsity."""
    watts: float
    """Limit of the whole board."""
    link: float
    """GB/s to the other GPUs of the node, in one direction."""


GPUS = {
    "a100": Gpu(memory=80, tflops=312, watts=400, link=300),
    "h100": Gpu(memory=80, tflops=989, watts=700, link=450),
    "h200": Gpu(memory=140, tflops=989, watts=700, link=450),
    "b200": Gpu(memory=178, tflops=2250, watts=1000, link=900),
    "l40s": Gpu(memory=45, tflops=362, watts=350, link=32),
    "rtx4090": Gpu(memory=24, tflops=165, watts=450, link=32),
    "mi300x": Gpu(memory=192, tflops=1307, watts=750, link=448),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run would be given."""

    gpus: int
    """Over all nodes."""
    nodes: int = 1
    memory: int
    """Bytes of one GPU."""
    tflops: float
    """Dense bf16 of one GPU."""
    watts: float
    """Of one GPU."""
    link: float
    """GB/s between GPUs of a node, in one direction."""
    bandwidth: float = 50.0
    """GB/s of a node to the others, in one direction (50 is 400 Gbit/s)."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(
                f"--gpus {self.gpus}, --nodes {self.nodes}: expected the GPUs of all nodes together, a multiple of the "
                f"nodes; take {max(1, self.gpus // max(1, self.nodes)) * max(1, self.nodes)}"
            )
        for name in ("memory", "tflops", "watts", "link", "bandwidth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number; got {getattr(self, name)}")

    @property
    def slowest_link(self) -> float:
        """Bytes a second at which a ring over all GPUs moves."""
        return 1e9 * (self.link if self.nodes == 1 else min(self.link, self.bandwidth))


def even_nodes(gpus: int) -> int:
    """The fewest nodes of at most eight GPUs that share them out evenly."""
    return next((n for n in range(-(-gpus // 8), gpus) if gpus % n == 0), max(1, gpus))


class Work(NamedTuple):
    """MACs for one sample."""

    static: float
    """One forward of the static network, the sample's second one without its prompt not counted."""
    dynamic: float
    """One forward at the target ratio, as the packed model runs."""
    trained: float
    """Forward and backward of the network that learns, as if nothing was skipped: masks do not save work in
    training."""
    done: float
    """All that a training step computes: the second target and what is recomputed, and the encoders included."""
    encoding: float
    """Autoencoder and text encoders; 0 where the data hold what they make."""


def work(recipe: Recipe, planned: Planned, encoding: float) -> Work:
    """Of the recipe's network at the recipe's size, and the MACs of ``encoding`` a sample."""
    network, family = planned.network, planned.base.family
    pipeline: Any = stand_in(planned.base, network)
    cost: ModelCost = family.cost(network, pipeline, sample_size(recipe), recipe.model.text_tokens)
    forward = float(cost.static)
    backward = 2.0 if recipe.adapter.kind == "none" else 1.0  # frozen weights have no gradient
    train, kind = recipe.train, recipe.supervision.kind if recipe.dynamic is not None else "none"
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[train.gradient_checkpointing] / train.checkpointed_blocks
    passes = 1 + backward + again
    extra = {"none": 0.0, "distill": 1.0, "complete": passes}[kind]
    rows = 2 if recipe.supervision.guidance > 1 else 1
    done = rows * forward * (passes + extra) + encoding
    return Work(forward, forward * recipe.cost.target, forward * (1 + backward), done, encoding)


def picture_macs(base: Base, side: int) -> float:
    """Of the autoencoder for a picture of ``side`` pixels, counted on tensors without contents."""
    pixels = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        posterior_of(base.make_vae(), pixels)
    return counter.get_total_flops() / 2


def encoding_macs(recipe: Recipe, planned: Planned, picture: float) -> float:
    """Of a sample: ``picture`` for each of its pictures, and for each caption all parameters of the text encoders at
    every token.

    Tables of words, which multiply nothing, make up for attention, which is not counted: for T5 XXL at 512 tokens they
    are 3 %, and attention 2 %.
    """
    images = recipe.data.images_per_clip
    base, config = planned.base, planned.network.config
    text = base.family.text_shapes(config, recipe.model.text_tokens).get("text", (0,))
    captions = (1 + images) * (2 if recipe.supervision.guidance > 1 else 1)
    return (recipe.data.frames + images) * picture + captions * text[0] * sum(base.text_encoders.values())


def traffic(recipe: Recipe, own: Holdings, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, by what they are; rings send (n - 1) / n of a tensor, and all-reduce twice
    that."""
    engine, micro = recipe.engine, recipe.train.accumulation
    share = (ranks - 1) / ranks
    trainable, whole = own.whole.trainable, own.whole.all
    if ranks == 1:
        return {}
    if engine.name == "ddp":
        return {"all-reduce of gradients": 2 * share * trainable}
    if engine.name == "zero" and engine.zero_stage < 3:
        times = micro if engine.zero_stage == 2 else 1
        return {
            "all-reduce of gradients": 2 * share * trainable * times,
            "all-gather of updated weights": share * trainable,
        }
    forwards, backwards = _passes(recipe, own)
    if engine.name == "zero":
        return {
            "all-gather of weights": share * (whole - own.small) * (forwards + backwards) * micro,
            "all-reduce of gradients": 2 * share * trainable * micro,
        }
    shards = engine.shard_ranks or ranks
    share = (shards - 1) / shards
    copies = ranks // shards
    sent = {
        "all-gather of weights": share * whole * (forwards + backwards * engine.reshard) * micro,
        "reduce-scatter of gradients": share * trainable * micro,
    }
    if copies > 1:
        sent["all-reduce between copies"] = 2 * (copies - 1) / copies * trainable / shards * micro
    return sent


def _passes(recipe: Recipe, own: Holdings) -> tuple[int, int]:
    """Forwards and backwards of the network that learns, in a micro-batch."""
    kind = recipe.supervision.kind if recipe.dynamic is not None else "none"
    own_teacher = kind == "distill" and not own.teacher
    return 2 if kind == "complete" or own_teacher else 1, 2 if kind == "complete" else 1


def offload_seconds(recipe: Recipe, own: Holdings, ranks: int) -> tuple[float, float]:
    """Of a step: what moves between a GPU and the machine's memory, and AdamW there; 0 where nothing is offloaded.

    Gradients go down after each micro-batch and new weights come up; offloaded weights come up for every pass. AdamW
    reads weight, gradient and two moments, and writes all but the gradient.
    """
    engine, micro = recipe.engine, recipe.train.accumulation
    if engine.offload == "none":
        return 0.0, 0.0
    shards = engine.shard_ranks or ranks
    part = own.whole.trainable / shards
    moved = part * (micro + 1)
    if engine.offload == "parameters":
        moved += own.whole.all / shards * sum(_passes(recipe, own)) * micro
    return moved / _PCIE, 7 * part / _HOST_MEMORY


class Speed(NamedTuple):
    """Of a step, at best and at worst."""

    seconds: tuple[float, float]
    mfu: tuple[float, float]
    """Share of the GPUs' peak that forward and backward of the dense network would need in that time."""
    samples_per_second: tuple[float, float]


def speed(recipe: Recipe, of_sample: Work, own: Holdings, cluster: Cluster) -> Speed:
    """At best the GPUs are half busy and all traffic hides behind them; at worst they are 30 % busy and wait for it. An
    offloaded optimiser is waited for in any case."""
    batch = recipe.train.batch_size
    peak = cluster.gpus * cluster.tflops * 1e12 * (1 if recipe.engine.precision == "bf16" else 0.5)
    sending = sum(traffic(recipe, own, cluster.gpus).values()) / cluster.slowest_link
    moving, stepping = offload_seconds(recipe, own, cluster.gpus)
    slow, fast = (2 * batch * of_sample.done / (peak * busy) for busy in BUSY)
    seconds = (max(fast, sending, moving) + stepping, slow + sending + moving + stepping)
    useful = 2 * batch * of_sample.trained / peak
    return Speed(seconds, (useful / seconds[0], useful / seconds[1]), (batch / seconds[0], batch / seconds[1]))
