"""What a rank holds at most, from what a step allocates and what the engine keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dydit_scale.parallel.deepspeed_config import deepspeed_config
from dydit_scale.parallel.world import World
from dydit_scale.planning.network import Planned
from dydit_scale.planning.trace import Segment
from dydit_scale.train.build import frozen_dtype, shard_units
from dydit_scale.train.recipe import Recipe

_DDP_BUCKET = (1 << 24) * 4
"""Bytes of gradients that DdpEngine averages at a time."""
GIB = 2**30


class Weights(NamedTuple):
    """Bytes of parameters."""

    trainable: int
    frozen: int

    @property
    def all(self) -> int:
        """Both."""
        return self.trainable + self.frozen


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """The parameters of a run."""

    whole: Weights
    units: tuple[Weights, ...]
    """Of each block."""
    small: int
    """Elements threshold of ZeRO-3's persistent parameters, in bytes held."""
    numel: int
    """Elements of all parameters."""
    largest: int
    """Bytes of the largest gradient."""
    buffers: int
    teacher: int
    """Bytes of the network that is distilled from."""
    encoders: int
    """Bytes of autoencoder and text encoders; 0 where they are not on the device."""

    @property
    def root(self) -> Weights:
        """Of what is in no block."""
        return Weights(
            self.whole.trainable - sum(u.trainable for u in self.units),
            self.whole.frozen - sum(u.frozen for u in self.units),
        )


def holdings(recipe: Recipe, planned: Planned, *, encoded: bool) -> Holdings:
    """Of the whole network; ``encoded`` data need no autoencoder and text encoders, if no samples are drawn."""
    network, base = planned.network, planned.base
    parameters = list(network.parameters())
    threshold = _zero_settings(recipe)["stage3_param_persistence_threshold"]
    around = base.vae_parameters + sum(base.text_encoders.values())
    return Holdings(
        whole=_weights(parameters),
        units=tuple(_weights(unit.parameters()) for unit in shard_units(network)),
        small=sum(p.nbytes for p in parameters if p.numel() < threshold),
        numel=sum(p.numel() for p in parameters),
        largest=max(p.nbytes for p in parameters if p.requires_grad),
        buffers=sum(b.nbytes for b in network.buffers()),
        teacher=0 if planned.teacher is None else sum(p.nbytes for p in planned.teacher.parameters()),
        encoders=around * frozen_dtype(recipe).itemsize if uses_encoders(recipe, encoded=encoded) else 0,
    )


def uses_encoders(recipe: Recipe, *, encoded: bool) -> bool:
    """Whether autoencoder and text encoders are on the device: for pixels and captions, or to draw samples."""
    return not encoded or (bool(recipe.train.sample_prompts) and recipe.train.sample_every > 0)


def _weights(parameters: Any) -> Weights:
    trainable = frozen = 0
    for parameter in parameters:
        if parameter.requires_grad:
            trainable += parameter.nbytes
        else:
            frozen += parameter.nbytes
    return Weights(trainable, frozen)


def _zero_settings(recipe: Recipe) -> dict[str, Any]:
    if recipe.engine.name != "zero":
        return {"stage3_param_persistence_threshold": 0}
    return deepspeed_config(recipe.engine, World(), recipe.train.accumulation)["zero_optimization"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an engine holds things on one rank, in bytes."""

    kept: dict[str, int]
    """What is there all the time, by name."""
    host: dict[str, int] = field(default_factory=dict)
    """What waits in the machine's memory instead."""
    gradients: Callable[[int, int], int]
    """Held for gradients when so many bytes of them were complete before a segment, and so many more within it."""
    gathered: Callable[[Segment], int] = lambda segment: 0
    """Weights that are whole during a segment, beyond the rank's own part."""
    reducing: Callable[[Segment], int] = lambda segment: 0
    """Held beyond that for a moment at the end of a segment."""
    step: int
    """Held for gradients at most while the optimiser steps."""


def layout(recipe: Recipe, own: Holdings, ranks: int) -> Layout:
    """That of the recipe's engine on one of ``ranks`` devices."""
    engine = recipe.engine
    if engine.name in ("single", "ddp"):
        return _replicated(recipe, own, ranks)
    if engine.name == "fsdp":
        return _fsdp(recipe, own, ranks)
    if engine.name == "zero":
        return _zero3(recipe, own, ranks) if engine.zero_stage == 3 else _zero(recipe, own, ranks)
    raise ValueError(f"engine.name: {engine.name!r}")


def _common(recipe: Recipe, own: Holdings, ranks: int) -> dict[str, int]:
    trainable = -(-own.whole.trainable // ranks)
    return {
        "optimiser": 2 * trainable,
        "EMA": trainable if recipe.train.ema is not None else 0,
        "teacher": own.teacher,
        "encoders": own.encoders,
    }


def _replicated(recipe: Recipe, own: Holdings, ranks: int) -> Layout:
    trainable = own.whole.trainable
    again = recipe.train.accumulation > 1
    bucket = min(trainable, max(_DDP_BUCKET, own.largest)) if recipe.engine.name == "ddp" else 0
    return Layout(
        kept={"weights": own.whole.all + own.buffers, **_common(recipe, own, 1)},
        gradients=lambda before, within: trainable if again else before + within,
        step=trainable + bucket,
    )


def _zero(recipe: Recipe, own: Holdings, ranks: int) -> Layout:
    """Stages 1 and 2, of the rank that owns the last parameters: its gradients come first, while activations are there.

    Stage 2 copies the gradients of a full bucket into the rank's own part and lets go of the others; stage 1 keeps all
    until the backward is over. The step flattens the own part once more.
    """
    settings, trainable = _zero_settings(recipe), own.whole.trainable
    part = -(-trainable // ranks)
    bucket = 4 * settings["reduce_bucket_size"]
    kept = {"weights": own.whole.all + own.buffers, "fp32 weights": part, **_common(recipe, own, ranks)}
    host: dict[str, int] = {}
    if recipe.engine.offload != "none":
        host = {name: kept.pop(name) for name in ("fp32 weights", "optimiser", "EMA")} | {"gradients": part}
        part = 0
    again = recipe.train.accumulation > 1

    def stage_2(before: int, within: int) -> int:
        complete = before + within
        if again:
            return bucket + 2 * part
        return (bucket if complete else 0) + (part if complete > bucket else 0)

    def stage_1(before: int, within: int) -> int:
        return bucket + (trainable if again else before + within)

    if recipe.engine.zero_stage == 2:
        return Layout(kept=kept, host=host, gradients=stage_2, step=max(bucket + part, 2 * part))
    return Layout(kept=kept, host=host, gradients=stage_1, step=trainable + bucket + part)


def _zero3(recipe: Recipe, own: Holdings, ranks: int) -> Layout:
    """Weights, gradients, moments and a second copy of the weights in fp32 are sharded; small parameters stay whole.

    What is gathered is let go of when more than a number of elements would live.
    """
    settings, whole = _zero_settings(recipe), own.whole
    part = -(-whole.trainable // ranks)
    bucket = 4 * settings["reduce_bucket_size"]
    kept = {
        "weights": part + -(-whole.frozen // ranks) + own.small + own.buffers,
        "fp32 weights": part,
        **_common(recipe, own, ranks),
        "gradients": part,
        "buckets": bucket,
    }
    host: dict[str, int] = {}
    if recipe.engine.offload != "none":
        host = {name: kept.pop(name) for name in ("fp32 weights", "optimiser", "EMA", "gradients")}
    if recipe.engine.offload == "parameters":
        host["weights"], kept["weights"] = kept["weights"] - own.small - own.buffers, own.small + own.buffers
    size = whole.all / own.numel
    most = settings["stage3_max_live_parameters"] + settings["stage3_prefetch_bucket_size"]
    gathered = min(whole.all - own.small, int(size * most))
    return Layout(kept=kept, host=host, gradients=lambda before, within: 0, gathered=lambda segment: gathered, step=0)


def _fsdp(recipe: Recipe, own: Holdings, world: int) -> Layout:
    """Each block is gathered into a flat buffer and copied out of it.

    In the forward the flat buffer of the last block stays; in the backward the next block is gathered beforehand. A
    block's gradients are whole until its backward is over, and then for a moment in the buffer that is reduced, too.
    """
    ranks = recipe.engine.shard_ranks or world
    whole, part = own.whole, -(-own.whole.trainable // ranks)
    sharded = part + -(-whole.frozen // ranks)
    kept = {"weights": sharded + own.buffers, **_common(recipe, own, ranks)}
    host: dict[str, int] = {}
    offloaded = recipe.engine.offload == "parameters"
    if offloaded:
        host = {"weights": sharded, "gradients": part, **{n: kept.pop(n) for n in ("optimiser", "EMA")}}
        kept["weights"], part = own.buffers, 0
    flat = ranks > 1

    def gathered(segment: Segment) -> int:
        number = segment.unit if segment.unit is not None else len(own.units) - 1 if segment.backward else None
        unit = 0 if number is None else own.units[number].all
        if not recipe.engine.reshard:
            return whole.all + flat * unit
        if not segment.backward or number is None:
            return own.root.all + unit + flat * unit
        ahead = own.units[max(0, number - 1)].all
        return own.root.all + unit + flat * (ahead + own.units[-1].all)

    def gradients(before: int, within: int) -> int:
        shard = part if recipe.train.accumulation > 1 else before // ranks * (not offloaded)
        return shard + within + (own.root.trainable if before else 0)

    def reducing(segment: Segment) -> int:
        return segment.gradients if segment.unit is not None else 0

    return Layout(kept=kept, host=host, gradients=gradients, gathered=gathered, reducing=reducing, step=part)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which a rank holds most."""

    items: dict[str, int]
    """Bytes by name."""
    when: str
    """What the rank is doing."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.items.values())


def find_peak(segments: Sequence[Segment], how: Layout, *, encoding: int = 0, batches: int = 0) -> Peak:
    """Of a step.

    Args:
        encoding: bytes that the autoencoder needs for a micro-batch while it runs.
        batches: bytes of pictures or latents that wait.
    """
    best = _Moment("optimiser step", 0, how.step, 0)
    for moment in (*_moments(segments, how), _Moment("encoding", 0, how.gradients(0, 0), encoding)):
        best = max(best, moment, key=lambda m: m.gathered + m.gradients + m.activations)
    items = dict(how.kept)
    items["gradients"] = items.get("gradients", 0) + best.gradients
    items |= {"activations": best.activations, "gathered blocks": best.gathered, "batches": batches}
    return Peak(items={name: size for name, size in items.items() if size}, when=best.when)


class _Moment(NamedTuple):
    when: str
    gathered: int
    gradients: int
    activations: int


def _moments(segments: Sequence[Segment], how: Layout) -> Iterator[_Moment]:
    """The high-water marks of forward and backward."""
    level = complete = 0
    for segment in segments:
        gathered, when = how.gathered(segment), "backward" if segment.backward else "forward"
        for point in segment.points:
            yield _Moment(when, gathered, how.gradients(complete, point.gradients), level + point.activations)
        level += segment.net
        held = how.gradients(complete, segment.gradients) + how.reducing(segment)
        yield _Moment(when, gathered, held, level)
        complete += segment.gradients


def slack(tensors: int, ranks: int) -> int:
    """Bytes that a GPU gives to no tensor: 0.7 GiB for the context and the libraries' workspaces, 0.8 GiB for NCCL's
    buffers, and 4 % of the tensors between the allocator's blocks."""
    return math.ceil(0.7 * GIB + (0.8 * GIB if ranks > 1 else 0) + 0.04 * tensors)
