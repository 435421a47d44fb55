"""A plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from dydit_scale.planning.memory import GIB
from dydit_scale.planning.plan import Plan

_WIDTH = 24


def describe(plan: Plan) -> list[str]:
    """Lines; the first says whether it fits."""
    return [verdict(plan), "", *(line for part in _PARTS for line in (*part(plan), ""))][:-1]


def verdict(plan: Plan) -> str:
    """In one line."""
    word = "fits" if plan.fits else "does not fit"
    cluster = plan.cluster
    nodes = f" on {cluster.nodes} nodes" * (cluster.nodes > 1)
    return (
        f"{plan.recipe.name}: {word} in {_gib(cluster.memory)}: {_gib(plan.needed)} needed on each of "
        f"{cluster.gpus} GPU{'s' * (cluster.gpus > 1)}{nodes} ({setting(plan)})"
    )


def setting(plan: Plan) -> str:
    """What decides: engine, batch, recomputation."""
    engine, train = plan.recipe.engine, plan.recipe.train
    name = {"zero": f"ZeRO-{engine.zero_stage}", "fsdp": "FSDP2"}.get(engine.name, engine.name)
    offload = "" if engine.offload == "none" else f", {engine.offload} offloaded"
    recompute = {"none": "nothing", "full": "blocks", "selective": "blocks in part"}[train.gradient_checkpointing]
    return f"{name}{offload}, micro-batches of {plan.micro_batch}, {train.accumulation} a step, {recompute} recomputed"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"Memory of a GPU at the peak ({plan.peak.when})"
    for name, size in plan.peak.items.items():
        yield _row(name, _gib(size))
    yield _row(
        "context, NCCL, allocator", f"{_gib(plan.slack)}   0.7 GiB, 0.8 GiB with more than one GPU, 4 % of tensors"
    )
    yield _row("all", f"{_gib(plan.needed)} of {_gib(plan.cluster.memory)}")
    if plan.host:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in plan.host.items())
        yield _row("host memory, each rank", f"{_gib(sum(plan.host.values()))}   {parts}")
    ranks = plan.cluster.gpus // plan.cluster.nodes
    of_ranks = f"{ranks} ranks of {_gib(plan.loading)}, each with the whole network in fp32" if ranks > 1 else ""
    yield _row("host memory at start", f"{_gib(ranks * plan.loading)} a machine, while loading   {of_ranks}".rstrip())


def _parameters(plan: Plan) -> Iterator[str]:
    yield "Parameters"
    for name in ("total", "trainable", "frozen", "routers", "adapters"):
        yield _row(name, _millions(plan.parameters[name]))
    around = {k: n for k, n in plan.parameters.items() if k.startswith(("autoencoder", "text_encoder"))}
    yield _row("around the network", ", ".join(f"{name} {_millions(n).strip()}" for name, n in around.items()))


def _compute(plan: Plan) -> Iterator[str]:
    work = plan.work
    yield "Work for one sample"
    yield _row("forward, static", f"{work.static / 1e12:9.2f} TMACs")
    yield _row("forward, at the target", f"{work.dynamic / 1e12:9.2f} TMACs   ratio {plan.recipe.cost.target:g}")
    yield _row("training step", f"{work.done / 1e12:9.2f} TMACs   masks save nothing in training")
    within = "of it, for each picture and caption" if work.encoding else "the data are encoded"
    yield _row("autoencoder, text", f"{work.encoding / 1e12:9.2f} TMACs   {within}")


def _speed(plan: Plan) -> Iterator[str]:
    speed, recipe = plan.speed, plan.recipe
    sent = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in plan.traffic.items())
    yield "A step, and the run (estimates: GPUs 50 % busy and traffic hidden, to 30 % and not)"
    yield _row("sent by a rank", f"{sum(plan.traffic.values()) / 1e9:9.2f} GB      {sent}" if sent else "  nothing")
    yield _row("seconds a step", f"{_span(speed.seconds)}")
    yield _row("samples a second", f"{_span((speed.samples_per_second[1], speed.samples_per_second[0]))}")
    yield _row("MFU", f"{100 * speed.mfu[1]:9.0f} to {100 * speed.mfu[0]:.0f} %")
    yield _row("hours", f"{_span(plan.hours)}   {recipe.train.steps:,} steps")
    yield _row("energy of the GPUs", f"{_span(plan.energy)} kWh   at {plan.cluster.watts:g} W each")


def _disk(plan: Plan) -> Iterator[str]:
    yield "Disk"
    yield _row("a checkpoint", f"{plan.checkpoint / 1e9:9.2f} GB")
    yield _row("at most", f"{plan.disk / 1e9:9.2f} GB      {round(plan.disk / max(1, plan.checkpoint))} of them")


def _data(plan: Plan) -> Iterator[str]:
    yield "Data"
    yield _row("samples lost to buckets", "        0         remainders carry over to the next epoch")
    if plan.buckets is None:
        yield _row("samples", f"  no index at {plan.recipe.data.path or 'data.sources'}: not counted")
    else:
        counts = ", ".join(f"{size} {n}" for size, n in plan.buckets.items() if n)
        yield _row("samples", f"{sum(plan.buckets.values()):9d}         {counts}")


_PARTS = (_memory, _parameters, _compute, _speed, _disk, _data)


def _row(name: str, text: str) -> str:
    return f"  {name:{_WIDTH}} {text}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _millions(number: float) -> str:
    return f"{number / 1e6:9.2f} M"


def _span(pair: tuple[float, float]) -> str:
    low, high = pair
    digits = 0 if low >= 100 else 1 if low >= 10 else 2
    return f"{low:9,.{digits}f} to {high:,.{digits}f}"
