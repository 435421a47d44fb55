"""A small model with the shapes of trouble: frozen and trainable parts, root parameters, two learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dydit_scale.parallel.engine import Engine, EngineConfig, ParamGroup, StepResult, make_engine
from dydit_scale.parallel.reduce import global_mean, mean_values
from dydit_scale.parallel.world import World

BATCH, WIDTH, OUT = 8, 7, 3
CLIP = 1.0
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "offload": {"offload": "optimizer"},
    "offloaded": {"offload": "parameters"},
    "kept": {"reshard": False},
    "hybrid": {"shard_ranks": 1},
}


@dataclass(frozen=True)
class Output:
    """A named result, as the dynamic models return it; not a pytree."""

    prediction: Tensor
    costs: tuple[Tensor, ...]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)
        self.router = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.router(x))
        return x + torch.tanh(self.base(x) + gate * self.up(self.down(x))), gate.float().mean()


class Toy(nn.Module):
    def __init__(self, *, named: bool = True) -> None:
        super().__init__()
        self.named = named
        self.config = {"name": "toy"}
        self.state = object()
        self.enter = nn.Linear(5, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(WIDTH, OUT)
        self.register_buffer("shift", torch.arange(WIDTH) / 10)

    def forward(self, x: Tensor) -> Output | tuple[Tensor, tuple[Tensor, ...]]:
        x, costs = self.enter(x), []
        for block in self.blocks:
            x, cost = block(x)
            costs.append(cost)
        prediction = self.head(x * self.scale + self.shift)
        return Output(prediction, tuple(costs)) if self.named else (prediction, tuple(costs))


def make_toy(seed: int = 0, *, frozen_dtype: torch.dtype = torch.float32, named: bool = True) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        toy = Toy(named=named)
    for param in toy.parameters():
        if not param.requires_grad:
            param.data = param.data.to(frozen_dtype)
    return toy


def groups_of(toy: Toy) -> list[ParamGroup]:
    routers = {n: p for n, p in toy.named_parameters() if p.requires_grad and "router" in n}
    others = {n: p for n, p in toy.named_parameters() if p.requires_grad and n not in routers}
    return [
        ParamGroup(name="others", params=others, lr=3e-3, weight_decay=0.1),
        ParamGroup(name="routers", params=routers, lr=3e-2),
    ]


def config_of(name: str, *, precision: Literal["fp32", "bf16"] = "fp32") -> EngineConfig:
    """An engine by its short name, with a limit that clips some steps of the toy and not others."""
    kind, _, option = name.partition("-")
    settings: dict[str, Any] = {"name": kind}
    if kind.startswith("zero"):
        settings = {"name": "zero", "zero_stage": int(kind[-1])}
    return EngineConfig(**settings, **OPTIONS[option], clip_norm=CLIP, precision=precision)


def toy_engine(config: EngineConfig, world: World, *, accumulation: int = 1, toy: Toy | None = None) -> Engine:
    toy = toy or make_toy(seed=world.rank)  # seeds differ: the engine has to make the ranks alike
    return make_engine(config, toy, groups_of(toy), world, shard_units=list(toy.blocks), accumulation=accumulation)


def micro_batches(world: World, step: int, accumulation: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of the global batch of ``step``, in pieces."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, OUT, generator=generator)
    own = BATCH // world.world_size
    rows = slice(world.rank * own, (world.rank + 1) * own)
    yield from zip(x[rows].chunk(accumulation), y[rows].chunk(accumulation), strict=True)


def objective(engine: Engine, x: Tensor, y: Tensor, *, cost: bool) -> Tensor:
    """Two forwards and one loss, as with a complete-model term; the cost term is nonlinear in the batch mean."""
    out, complete = engine.module(x), engine.module(0.5 * x)
    prediction, costs = (out.prediction, out.costs) if isinstance(out, Output) else out
    complete = complete.prediction if isinstance(complete, Output) else complete[0]
    loss = (prediction.float() - y).square().mean() + 0.1 * (complete.float() - y).square().mean()
    if cost:
        loss = loss + (global_mean(torch.stack(costs).mean()) - 0.3).square()
    return loss


def one_step(engine: Engine, step: int, *, accumulation: int = 1, spoil: float = 1.0) -> tuple[float, StepResult]:
    """The loss over the global batch; ``spoil`` multiplies the first loss of the last rank alone."""
    total = 0.0
    for n, (x, y) in enumerate(micro_batches(engine.world, step, accumulation)):
        with engine.forward_context():
            # the statistic of a micro-batch depends on how the batch is cut, so only uncut batches compare
            loss = objective(engine, x, y, cost=accumulation == 1) / accumulation
        if n == 0 and engine.world.rank == engine.world.world_size - 1:
            loss = loss * spoil
        total += float(loss.detach())
        engine.backward(loss, last=n == accumulation - 1)
    result = engine.step(0.9**step)
    return mean_values({"loss": total})["loss"], result


def losses_of(engine: Engine, steps: range, *, accumulation: int = 1) -> list[float]:
    losses = []
    for step in steps:
        loss, result = one_step(engine, step, accumulation=accumulation)
        assert result.applied, result
        losses.append(loss)
    return losses


def as_lists(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
