"""One protocol for the ways to train on one or many devices; the trainer never asks which one it has.

Every engine keeps the trainable parameters, their moments and the gradient reduction in fp32 and takes bf16 from
autocast alone, so that all of them compute the same thing and a checkpoint of one continues under another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dydit_scale.parallel.lazy import flat_of, shape_of
from dydit_scale.parallel.reduce import broadcast_module
from dydit_scale.parallel.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a run is spread over devices."""

    name: Literal["single", "ddp", "zero", "fsdp"] = "single"
    """single: one process. ddp: every rank holds everything; for adapters. zero: DeepSpeed ZeRO. fsdp: torch FSDP2."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the forward runs under autocast; parameters and moments stay fp32."""
    zero_stage: int = 2
    """1 shards the moments, 2 the gradients too, 3 the weights as well. Only for zero."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in the machine's memory while it is not used. optimizer: fp32 weights and moments, which are stepped
    there (zero). parameters: all weights too (zero in stage 3, fsdp)."""
    shard_ranks: int | None = None
    """Hybrid sharding: this many ranks share one copy, other such groups hold the same; null for all. Only for fsdp."""
    reshard: bool = True
    """Let go of a block's weights after its forward and gather them anew in the backward; false saves that traffic and
    costs the memory. Only for fsdp."""
    deepspeed: str | None = None
    """JSON file laid over the generated DeepSpeed configuration. Only for zero."""
    clip_norm: float = 1.0
    """Largest L2 norm of the gradient over all trainable parameters; 0 clips nothing."""
    compile: bool = False
    """Compile the shard units (the whole module, if there are none) with torch.compile."""

    def __post_init__(self) -> None:
        for field, allowed in (
            ("name", ("single", "ddp", "zero", "fsdp")),
            ("precision", ("fp32", "bf16")),
            ("offload", ("none", "optimizer", "parameters")),
            ("zero_stage", (1, 2, 3)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"engine.{field}: expected one of {allowed}, got {getattr(self, field)!r}")
        if not 0 <= self.clip_norm < float("inf"):
            raise ValueError(f"engine.clip_norm: expected a finite number >= 0, got {self.clip_norm}")
        whole = self.name == "zero" and self.zero_stage < 3
        if (self.offload == "optimizer" and self.name != "zero") or (
            self.offload == "parameters" and (whole or self.name not in ("zero", "fsdp"))
        ):
            raise ValueError(
                f"engine.offload: {self.offload} is not for {self.name}{f' in stage {self.zero_stage}' * whole}; "
                "zero offloads its optimizer, zero in stage 3 and fsdp their parameters"
            )
        if self.shard_ranks is not None and (self.name != "fsdp" or self.shard_ranks < 1):
            raise ValueError(f"engine.shard_ranks: expected 1 or more, with fsdp; got {self.shard_ranks}, {self.name}")
        if self.deepspeed is not None and self.name != "zero":
            raise ValueError(f"engine.deepspeed: {self.deepspeed} is of no use to {self.name}; set engine.name: zero")


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Trainable parameters that share a learning rate."""

    name: str
    """For messages and logs."""
    params: dict[str, nn.Parameter]
    """Parameters under their names in the unwrapped module."""
    lr: float
    """Learning rate at lr_scale 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    freezes: bool = False
    """Stands still in steps that say ``frozen``."""

    def __post_init__(self) -> None:
        if not self.params:
            raise ValueError(f"group {self.name}: expected parameters, got none; leave the group out")
        if not (self.lr > 0 and self.weight_decay >= 0):
            got = f"{self.lr} and {self.weight_decay}"
            raise ValueError(f"group {self.name}: expected lr > 0 and weight_decay >= 0, got {got}")


class AdamWConfig(NamedTuple):
    """The constants of AdamW that all groups share."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


ADAMW = AdamWConfig()


class Piece(NamedTuple):
    """Where a rank's part of a parameter lies in the flattened parameter."""

    start: int
    numel: int


class StepResult(NamedTuple):
    """What one optimiser step did."""

    grad_norm: float  # before clipping; not finite if the step was refused
    applied: bool  # False: the gradients were not finite; weights and moments are untouched, on every rank alike


class Engine(ABC):
    """A module made trainable over the ranks of ``world``.

    One step is ``backward`` for each micro-batch and one ``step``:

        for n, batch in enumerate(batches):
            with engine.forward_context():
                loss = objective(engine.module, batch) / len(batches)
            engine.backward(loss, last=n == len(batches) - 1)
        result = engine.step(lr_scale)

    The gradient is the average over ranks and micro-batches; a parameter that took no part counts with a zero
    gradient. A parameter must take part on all ranks or on none. ``local`` dictionaries hold, under canonical names,
    what this rank owns: a shard, a flat piece, or everything; a name without a piece here is absent.
    """

    world: World
    module: nn.Module
    """What the trainer calls for the forward; never ask it for attributes."""
    network: nn.Module
    """The module that was given to ``make_engine``: attributes, config, train() and eval()."""
    optimizer: torch.optim.Optimizer
    """Its groups are ``groups``, in their order."""
    parameters: int
    """Number of its elements, whole and frozen ones included."""

    def __init__(self, config: EngineConfig, network: nn.Module, groups: Sequence[ParamGroup], world: World) -> None:
        self.config, self.network, self.module, self.world = config, network, network, world
        self.groups = tuple(groups)
        self.parameters = sum(param.numel() for param in network.parameters())
        self.shapes = {name: param.shape for group in groups for name, param in group.params.items()}

    def forward_context(self) -> AbstractContextManager[None]:
        """Autocast to bf16 if the precision says so; forward and loss belong inside."""
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch; ``loss`` is already divided by the number of micro-batches. Collective.

        ``last``: the gradients of the step are complete and ``step`` follows.
        """

    @abstractmethod
    def step(self, lr_scale: float, *, frozen: bool = False) -> StepResult:
        """One guarded, clipped AdamW step with lr = group.lr * lr_scale; then the gradients are cleared. Collective.

        ``frozen``: the groups that freeze keep their values, bit for bit; their gradients may count in the norm.
        """

    def _set_lr(self, lr_scale: float, frozen: bool) -> None:
        for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = 0.0 if frozen and group.freezes else group.lr * lr_scale

    @abstractmethod
    def local_parameters(self) -> dict[str, Tensor]:
        """This rank's live fp32 pieces of the trainable parameters; ``step`` changes them in place."""

    @abstractmethod
    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        """This rank's live pieces of exp_avg and exp_avg_sq, in the layout of ``local_parameters``."""

    @property
    @abstractmethod
    def pieces(self) -> dict[str, Piece]:
        """Of each of ``local_parameters``, which elements of the flattened parameter it holds, in order. The pieces of
        all ranks for which ``owns_pieces`` holds cover every parameter exactly once."""

    @property
    def owns_pieces(self) -> bool:
        """False where another rank holds the same pieces: whoever saves them leaves out such a rank."""
        return True

    @abstractmethod
    def refresh(self) -> None:
        """Make the forward see values that were written into ``local_parameters``. Collective."""

    @abstractmethod
    def gather(self, local: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Full fp32 CPU tensors from pieces in the layout of ``local_parameters``, of all or the given names.
        Collective; other ranks than the first get {}."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Number of steps applied, as AdamW's bias correction counts them."""

    @updates.setter
    @abstractmethod
    def updates(self, value: int) -> None: ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Full fp32 CPU copies of the trainable parameters on rank 0, {} elsewhere. Collective."""
        return self.gather(self.local_parameters())

    def optimizer_state(self) -> dict[str, Tensor]:
        """exp_avg.<name>, exp_avg_sq.<name> (full, fp32, CPU) and the 0-d "step"; {} but on rank 0. Collective."""
        moments = self.local_moments()
        state = {f"{kind}.{name}": full for kind in MOMENTS for name, full in self.gather(moments[kind]).items()}
        return state | {"step": torch.tensor(self.updates)} if self.world.is_main else {}

    @torch.no_grad()
    def load(self, trainable: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None) -> None:
        """Continue from states of any engine and any number of ranks; every rank passes the full tensors. Collective.

        They may be lazy: then each rank reads its own pieces, one at a time. ``optimizer`` None starts AdamW afresh.
        Raises ValueError on the first name or shape that differs, before anything is changed.
        """
        check_state("trainable state", trainable, self.shapes)
        if optimizer is not None:
            shapes = {f"{kind}.{name}": shape for kind in MOMENTS for name, shape in self.shapes.items()}
            check_state("optimizer state", optimizer, shapes | {"step": torch.Size([])})
        copy_pieces(trainable, self.local_parameters(), self.pieces)
        for kind, local in self.local_moments().items():
            if optimizer is None:
                for tensor in local.values():
                    tensor.zero_()
            else:
                copy_pieces(optimizer, local, self.pieces, prefix=f"{kind}.")
        self.updates = 0 if optimizer is None else int(optimizer["step"])
        self.refresh()


def copy_pieces(
    full: Mapping[str, Tensor], local: Mapping[str, Tensor], pieces: Mapping[str, Piece], *, prefix: str = ""
) -> None:
    """Write the elements that a rank holds of ``full[prefix + name]`` into ``local[name]``, one tensor at a time.

    Of lazy tensors no more is read than these elements.
    """
    for name, tensor in local.items():
        tensor.copy_(flat_of(full, prefix + name, *pieces[name]).view_as(tensor))


def check_state(where: str, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError naming the first tensor of ``state`` that is missing, misshapen or unknown."""
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"{where}: {name} is missing ({len(shapes)} tensors expected, {len(state)} came)")
        if (found := shape_of(state, name)) != shape:
            raise ValueError(f"{where}: {name}: expected shape {tuple(shape)}, got {tuple(found)}")
    for name in state:
        if name not in shapes:
            raise ValueError(f"{where}: {name} is not trainable here; load it into the model it was saved from")


def make_engine(
    config: EngineConfig,
    module: nn.Module,
    groups: Sequence[ParamGroup],
    world: World,
    *,
    shard_units: Sequence[nn.Module] = (),
    accumulation: int = 1,
    adamw: AdamWConfig = ADAMW,
) -> Engine:
    """Move ``module`` to the device of ``world`` and make it trainable there; collective.

    ``groups`` hold every parameter that requires a gradient, in fp32; the others stay frozen in any dtype.
    ``shard_units`` are the blocks that FSDP2 gathers one at a time. ``accumulation`` is the number of micro-batches
    of a step. Every rank starts from rank 0's parameters and buffers.

    Raises ValueError if groups and module do not fit, or if the engine cannot run in ``world``.
    """
    check_groups(module, groups)
    if accumulation < 1:
        raise ValueError(f"make_engine: accumulation: expected >= 1, got {accumulation}")
    module.to(world.device)
    broadcast_module(module)
    if config.compile:
        for unit in shard_units or (module,):
            unit.compile()
    if config.name == "single":
        from dydit_scale.parallel.single import SingleEngine

        return SingleEngine(config, module, groups, world, adamw)
    if config.name == "ddp":
        from dydit_scale.parallel.ddp import DdpEngine

        return DdpEngine(config, module, groups, world, adamw)
    if config.name == "zero":
        from dydit_scale.parallel.zero import Zero3Engine, ZeroEngine  # here, for deepspeed takes seconds to import

        engine = Zero3Engine if config.zero_stage == 3 else ZeroEngine
        return engine(config, module, groups, world, adamw, accumulation)
    if config.name == "fsdp":
        from dydit_scale.parallel.fsdp import FsdpEngine

        return FsdpEngine(config, module, groups, world, adamw, shard_units)
    raise ValueError(f"make_engine: {config}")


def check_groups(module: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """Raise ValueError unless ``groups`` hold exactly the trainable parameters of ``module``, each once and in fp32."""
    trainable = {name: param for name, param in module.named_parameters() if param.requires_grad}
    owner: dict[str, str] = {}
    for group in groups:
        for name, param in group.params.items():
            if name in owner:
                raise ValueError(f"group {group.name}: {name} is already in group {owner[name]}")
            if trainable.get(name) is not param:
                raise ValueError(f"group {group.name}: {name} is not a trainable parameter of the module")
            if param.dtype != torch.float32:
                raise ValueError(f"group {group.name}: {name}: expected torch.float32, got {param.dtype}; cast it")
            owner[name] = group.name
    if left := [name for name in trainable if name not in owner]:
        raise ValueError(f"groups: {left[0]} and {len(left) - 1} more are trainable but in no group; freeze them")
