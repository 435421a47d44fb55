"""One process, plain torch. Its steps are the reference that the other engines are tested against."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from dydit_scale.parallel.engine import MOMENTS, AdamWConfig, Engine, EngineConfig, ParamGroup, Piece, StepResult
from dydit_scale.parallel.world import World


class SingleEngine(Engine):
    """Everything in one process; ``local`` and full tensors are the same."""

    def __init__(
        self,
        config: EngineConfig,
        network: nn.Module,
        groups: Sequence[ParamGroup],
        world: World,
        adamw: AdamWConfig,
    ) -> None:
        if config.name == "single" and world.world_size > 1:
            raise ValueError(f"engine.name: single is for one process, got {world.world_size}; use ddp, zero or fsdp")
        super().__init__(config, network, groups, world)
        self.params = {name: param for group in groups for name, param in group.params.items()}
        self.optimizer = build_adamw(groups, adamw)
        for param in self.params.values():
            start_moments(self.optimizer, param)
        self._ready = False

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        self._ready = last

    @torch.no_grad()
    def step(self, lr_scale: float, *, frozen: bool = False) -> StepResult:
        assert self._ready, "step() before backward(last=True)"
        self._ready = False
        grads = [local_part(_grad(param)) for param in self.params.values()]
        self._complete(grads)
        norm = math.sqrt(float(self._sum(_square_sum(grads))))
        if applied := math.isfinite(norm):
            clip_(grads, norm, self.config.clip_norm)
            self._set_lr(lr_scale, frozen)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, applied)

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: local_part(param.detach()) for name, param in self.params.items()}

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        state = self.optimizer.state
        return {kind: {name: local_part(state[param][kind]) for name, param in self.params.items()} for kind in MOMENTS}

    @property
    def pieces(self) -> dict[str, Piece]:
        return {name: Piece(0, param.numel()) for name, param in self.params.items()}

    def refresh(self) -> None:
        """The forward reads the parameters themselves."""

    def gather(self, local: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, Tensor]:
        return {name: local[name].detach().to("cpu", copy=True) for name in (local if names is None else names)}

    @property
    def updates(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])

    @updates.setter
    def updates(self, value: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(value)

    def _complete(self, grads: Sequence[Tensor]) -> None:
        """Average this rank's gradients, if the backward has not."""

    def _sum(self, x: Tensor) -> Tensor:
        """``x`` summed over the owners of distinct pieces."""
        return x


def build_adamw(groups: Sequence[ParamGroup], adamw: AdamWConfig) -> torch.optim.AdamW:
    """AdamW over ``groups``, without moments: see ``start_moments``."""
    return torch.optim.AdamW(
        [{"params": list(g.params.values()), "lr": g.lr, "weight_decay": g.weight_decay} for g in groups],
        betas=adamw.betas,
        eps=adamw.eps,
        fused=True,
    )


def start_moments(optimizer: torch.optim.AdamW, param: Tensor) -> None:
    """Give ``param`` the state that AdamW itself would make in its first step, so that it can be read and loaded at
    any time."""
    zeros = {kind: torch.zeros_like(param, requires_grad=False) for kind in MOMENTS}
    optimizer.state[param] = {"step": torch.zeros((), device=param.device), **zeros}


def clip_(grads: Sequence[Tensor], norm: float, limit: float) -> None:
    """Scale ``grads``, of L2 norm ``norm`` together, down to ``limit`` in place, as torch does; 0 is no limit."""
    if limit and (factor := limit / (norm + 1e-6)) < 1:
        torch._foreach_mul_(list(grads), factor)


def _square_sum(grads: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    return torch.stack(norms).square().sum()


def _grad(param: nn.Parameter) -> Tensor:
    # a parameter left out would keep its moments while ZeRO, which steps flat buffers, decays them
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def local_part(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
