"""What every engine is put through, in this process or as one of several ranks: python -m tests.parallel.cases OUT."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit_scale.adapters.state import save_td_lora
from dydit_scale.adapters.td_layer import NETWORK_GATES
from dydit_scale.adapters.td_lora import add_td_lora, is_dynamic_name
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import Engine, ParamGroup, make_engine
from dydit_scale.parallel.fsdp import FsdpEngine
from dydit_scale.parallel.reduce import global_mean, max_flag, mean_values, sum_tensor
from dydit_scale.parallel.world import World, barrier, broadcast_object, close, init_world
from dydit_scale.parallel.zero import Zero3Engine
from tests.adapters.tiny import flux_config
from tests.models.tiny import inputs, tiny_dynamic
from tests.parallel.toy import as_lists, config_of, losses_of, make_toy, one_step, toy_engine

SHARDED = ("zero1", "zero2", "zero3", "fsdp")
MORE = ("ddp", "zero1-offload", "zero2-offload", "zero3-offload", "zero3-offloaded", "fsdp-offloaded", "fsdp-kept",
        "fsdp-hybrid")  # fmt: skip
STEPS = 6
DECAY = 0.15
PROBE = torch.linspace(-1, 1, 15).reshape(3, 5)


def parity(world: World, name: str, accumulation: int, *, named: bool = True) -> dict[str, Any]:
    """Losses and norms of some steps, and where they lead."""
    toy = make_toy(seed=world.rank, named=named)
    engine = toy_engine(config_of(name), world, accumulation=accumulation, toy=toy)
    assert engine.network is toy and toy.config == {"name": "toy"}
    steps = [one_step(engine, step, accumulation=accumulation) for step in range(STEPS)]
    return {
        "losses": [loss for loss, _ in steps],
        "norms": [result.grad_norm for _, result in steps],
        "applied": [result.applied for _, result in steps],
        "weights": as_lists(engine.trainable_state()),
        "optimizer": as_lists(engine.optimizer_state()),
    }


def guard(world: World, name: str, spoil: float) -> dict[str, Any]:
    """A step whose gradient is not finite on one rank, between good ones."""
    engine = toy_engine(config_of(name), world, accumulation=2)
    losses = losses_of(engine, range(3), accumulation=2)
    before = _snapshot(engine)
    _, result = one_step(engine, 3, accumulation=2, spoil=spoil)
    same = all(torch.equal(a, b) for a, b in zip(before, _snapshot(engine), strict=True))
    losses += losses_of(engine, range(3, STEPS), accumulation=2)
    return {"losses": losses, "applied": result.applied, "norm": result.grad_norm, "same": same, "kept": len(before)}


def _snapshot(engine: Engine) -> list[Tensor]:
    moments = [tensor for kind in engine.local_moments().values() for tensor in kind.values()]
    live = [*engine.local_parameters().values(), *moments]
    if not isinstance(engine, (FsdpEngine, Zero3Engine)):  # whose weights may be gathered or not
        live += engine.network.parameters()
    return [tensor.detach().clone() for tensor in live] + [torch.tensor(engine.updates)]


def average(world: World, name: str) -> dict[str, Any]:
    """The moving average, a forward with it, and training on afterwards."""
    engine = toy_engine(config_of(name), world)
    ema = Ema(engine, DECAY)
    losses = []
    for step in range(3):
        losses += losses_of(engine, range(step, step + 1))
        ema.update()
    before, kept = _predict(engine), _snapshot(engine)
    with ema.swapped():
        inside = _predict(engine)
    same = all(torch.equal(a, b) for a, b in zip(kept, _snapshot(engine), strict=True))
    return {
        "inside": inside.tolist(),
        "before": before.tolist(),
        "same": same and torch.equal(before, _predict(engine)),
        "state": as_lists(ema.state()),
        "losses": losses + losses_of(engine, range(3, STEPS)),
    }


@torch.no_grad()
def _predict(engine: Engine) -> Tensor:
    return engine.module(PROBE.to(engine.world.device)).prediction.float().cpu()


def half(world: World, name: str) -> dict[str, Any]:
    """bf16 autocast over a frozen bf16 base."""
    toy = make_toy(seed=world.rank, frozen_dtype=torch.bfloat16)
    engine = toy_engine(config_of(name, precision="bf16"), world, accumulation=2, toy=toy)
    losses = losses_of(engine, range(4), accumulation=2)
    frozen = {str(param.dtype) for param in toy.parameters() if not param.requires_grad}
    live = [engine.local_parameters(), *engine.local_moments().values()]
    return {
        "losses": losses,
        "frozen": sorted(frozen),
        "kept": sorted({str(tensor.dtype) for tensors in live for tensor in tensors.values()}),
    }


def adapter(world: World, name: str, gate_scope: str) -> dict[str, Any]:
    """Digests of the files of a TD-LoRA with routers, gathered from wherever its pieces are."""
    model = tiny_dynamic()
    add_td_lora(model, flux_config(gate_scope=gate_scope))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or is_dynamic_name(parameter_name))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [ParamGroup(name="all", params=trainable, lr=1e-3)]
    engine = make_engine(config_of(name), model, groups, world, shard_units=model.dynamic_blocks())
    shapes, generator = engine.shapes, torch.Generator().manual_seed(1)
    engine.load({n: torch.randn(shapes[n], generator=generator) for n in sorted(shapes)}, None)
    routers = [n for n in shapes if is_dynamic_name(n)]
    some = engine.gather(engine.local_parameters(), routers)
    full = engine.trainable_state()
    if not world.is_main:
        return {"some": sorted(some), "files": {}}
    assert all(torch.equal(some[n], full[n]) for n in routers)
    with tempfile.TemporaryDirectory() as folder:
        save_td_lora(model, folder, full_state=full)
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    return {"some": sorted(some), "files": digests}


def network_gate(world: World, name: str) -> dict[str, Any]:
    """Losses of some steps of a TD-LoRA whose blocks share a gate of the root and are recomputed, and that gate."""
    model: Any = add_td_lora(tiny_dynamic().requires_grad_(False), flux_config(gate_scope="network"))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [ParamGroup(name="all", params=trainable, lr=1e-2)]
    engine = make_engine(config_of(name), model, groups, world, shard_units=model.dynamic_blocks())
    model.enable_gradient_checkpointing()
    engine.network.train()
    rows = torch.arange(2).chunk(world.world_size)[world.rank]
    losses = []
    for _ in range(3):
        batch = {k: v[rows] if len(v) == 2 else v for k, v in inputs([0.2, 0.8]).items()}
        out = engine.module(gates="open", return_dict=False, **batch)[0]
        loss = out.square().mean()
        engine.backward(loss, last=True)
        engine.step(1.0)
        losses.append(mean_values({"loss": float(loss.detach())})["loss"])
    gate = {n: t for n, t in engine.trainable_state().items() if n.startswith(NETWORK_GATES)}
    return {"losses": losses, "gate": as_lists(gate)}


def reductions(world: World) -> dict[str, Any]:
    """The small reductions; ``gradient`` is of (mean over all rows of w x - 1)^2, from this rank's rows."""
    rows = torch.arange(1.0, 7.0).chunk(world.world_size)[world.rank]
    weight = torch.tensor(0.3, requires_grad=True)
    mean = global_mean((weight * rows).mean())
    (mean - 1).square().backward()
    assert weight.grad is not None
    barrier(world)
    return {
        "mean": float(mean.detach()),
        "gradient": mean_values({"gradient": float(weight.grad)})["gradient"],
        "flags": [max_flag(False), max_flag(world.rank == world.world_size - 1), max_flag(True)],
        "values": mean_values({"a": float(world.rank), "b": 2.0}),
        "object": broadcast_object(world, {"from": world.rank}),
    }


def covered(world: World, name: str) -> dict[str, Any]:
    """How often each element of each parameter is among the pieces that are saved, summed over the ranks."""
    engine = toy_engine(config_of(name), world)
    counts = {}
    for parameter, shape in engine.shapes.items():
        count = torch.zeros(shape.numel())
        if engine.owns_pieces and parameter in engine.pieces:
            count.narrow(0, *engine.pieces[parameter]).add_(1)
        counts[parameter] = sum_tensor(count).tolist()
    local = engine.local_parameters()
    return {"counts": counts, "fits": {n: t.numel() for n, t in local.items()} == _sizes(engine)}


def _sizes(engine: Engine) -> dict[str, int]:
    return {name: piece.numel for name, piece in engine.pieces.items()}


def run_all(world: World, names: tuple[str, ...]) -> dict[str, Any]:
    results: dict[str, Any] = {"reductions": reductions(world)}
    for name in MORE:
        results[f"parity/{name}/2"] = parity(world, name, 2)
        results[f"average/{name}"] = average(world, name)
        results[f"covered/{name}"] = covered(world, name)
    for name in names:
        for accumulation in (1, 2):
            results[f"parity/{name}/{accumulation}"] = parity(world, name, accumulation)
        results[f"parity/{name}/tuple"] = parity(world, name, 2, named=False)
        for spoil in (float("nan"), float("inf")):
            results[f"guard/{name}/{spoil}"] = guard(world, name, spoil)
        results[f"average/{name}"] = average(world, name)
        results[f"half/{name}"] = half(world, name)
        for gate_scope in ("layer", "network"):
            results[f"adapter/{name}/{gate_scope}"] = adapter(world, name, gate_scope)
        results[f"network_gate/{name}"] = network_gate(world, name)
        results[f"covered/{name}"] = covered(world, name)
    return results


def main(out: Path, only: str = "") -> None:
    world = init_world(timedelta(minutes=3), device="cpu")
    results = {only: parity(world, only, 1)} if only else run_all(world, SHARDED)
    (out / f"rank{world.rank}.json").write_text(json.dumps(results))
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
