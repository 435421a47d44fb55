"""Which heads, channels and tokens work in benchmarks/inference.py: drawn at a ratio, or those of a trained run.

Random weights have no opinion on what to leave out, so the routers are set: width routers by solving for the weights
that give the wanted logits at the sampler's timesteps, token routers by the threshold that lets the wanted share of
their (random) logits pass. What then runs is the method itself; the masks that really came out are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dydit_scale.dynamic.cost import KeepRates, ModelCost
from dydit_scale.report.inputs import Missing, read_run

LAYER_SPREAD, STEP_SPREAD = 0.25, 0.2
"""Shares differ between layers by up to so much of their mean, and from the noisiest to the last step: narrow at
first, as trained models are."""


class Shares(NamedTuple):
    """Shares that work."""

    heads: Tensor  # [layers, steps]
    groups: Tensor  # [layers, steps]
    tokens: Tensor  # [layers, steps]

    def rounded(self, heads: int, groups: int) -> Shares:
        """To whole units, at least one."""
        return Shares(_whole(self.heads, heads), _whole(self.groups, groups), self.tokens)


def _whole(share: Tensor, units: int) -> Tensor:
    return (share * units).round().clamp(min=1) / units


def equal_keep(cost: ModelCost, target: float) -> float:
    """The one share of heads, groups and tokens that costs ``target`` of the static MACs."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        kept = torch.full((len(cost.blocks), 1), middle)
        low, high = (middle, high) if mean_ratio(cost, Shares(kept, kept, kept)) < target else (low, middle)
    return high


def mean_ratio(cost: ModelCost, shares: Shares) -> float:
    """MACs dynamic / static over all steps."""
    return float((cost.dynamic(KeepRates(*shares)) / cost.static).mean())


def drawn_shares(
    cost: ModelCost,
    target: float,
    sigmas: Tensor,
    *,
    units: int,
    token_keep: float | None,
    seed: int = 0,
) -> Shares:
    """Shares that vary over layers and steps, and cost ``target`` of the static MACs.

    Heads, groups and tokens have the same mean. With ``token_keep`` tokens have that one, and the width the rest to do,
    unless that would already cost less than the target.

    Raises:
        ValueError: no shares have this ratio.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = len(cost.blocks)
    over_steps = 1 + STEP_SPREAD * (1 - 2 * sigmas)
    spread = [1 + LAYER_SPREAD * (2 * torch.rand(layers, 1, generator=generator) - 1) for _ in range(3)]
    factors = [over_layers * over_steps / (over_layers * over_steps).mean() for over_layers in spread]

    def shares(width: float, tokens: float) -> Shares:
        means = (width, width, tokens)
        kept = (mean * factor for mean, factor in zip(means, factors, strict=True))
        return Shares(*(k.clamp(0, 1) for k in kept)).rounded(units, units)

    def fitted(of: Callable[[float], Shares]) -> float:
        """The argument with which shares come nearest to the target; more of it is more MACs."""
        low, high = 0.0, 2.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if mean_ratio(cost, of(middle)) < target else (low, middle)
        return high

    if token_keep is not None and mean_ratio(cost, shares(2.0, token_keep)) >= target:
        width = fitted(lambda mean: shares(mean, token_keep))
    else:
        width = fitted(lambda mean: shares(mean, mean))
    found = shares(width, fitted(lambda mean: shares(width, mean)))  # tokens make up for the rounding to whole units
    if abs(mean_ratio(cost, found) - target) > 0.01:
        raise ValueError(
            f"ratio {target}: {layers} layers of {units} units come to {mean_ratio(cost, found):.3f} at best; choose a "
            f"ratio between {cost.floor(units, units):.2f} and 1, or more layers"
        )
    return found


def shares_of_run(run: Path, layers: int, sigmas: Tensor, *, units: int) -> Shares:
    """The shares of a trained run, at the same relative depths and the nearest noise levels.

    Raises:
        ValueError: the run was not evaluated.
    """
    widths = read_run(run).widths
    if isinstance(widths, Missing):
        raise ValueError(f"{run}: no {widths.file}; {widths.command} writes it")
    levels = widths.timesteps / max(1.0, float(widths.timesteps.max()))  # 0..999 or 0..1
    steps = [int(np.abs(levels - sigma).argmin()) for sigma in sigmas.tolist()]
    depths = np.linspace(0, len(widths.names) - 1, layers).round().astype(int)
    tables = (widths.heads, widths.groups, np.nan_to_num(widths.tokens, nan=1.0))
    return Shares(*(torch.from_numpy(t[np.ix_(steps, depths)].T.copy()) for t in tables)).rounded(units, units)


@torch.no_grad()
def set_width(model: Any, shares: Shares, timesteps: Tensor, *, seed: int = 0) -> None:
    """Let so many heads and groups of each layer work at each timestep: of an order drawn for the layer the first, so
    that a narrow step's are among a wide one's."""
    generator = torch.Generator().manual_seed(seed)
    t_emb = model.routing_embedding(timesteps.to(model.device).float()).double().cpu()
    solve = torch.linalg.pinv(t_emb)  # [dim, steps]
    for router, share in ((model.dy_width.heads, shares.heads), (model.dy_width.groups, shares.groups)):
        if router is None:
            continue
        layers, routed, _ = router.weight.shape
        on = (share * (routed + 1)).round().long() - 1  # unit 0 has no logit
        rank = torch.rand(layers, 1, routed, generator=generator).argsort(-1)
        wanted = torch.where(rank < on[..., None], 1.0, -1.0).double()  # [layers, steps, routed]
        router.weight.copy_(torch.einsum("ds,lsu->lud", solve, wanted))
        nn.init.zeros_(router.bias)
        got = torch.einsum("sd,lud->lsu", t_emb.float(), router.weight.float().cpu())
        assert bool(((got - wanted).abs() < 0.5).all()), "timesteps too near each other to have widths of their own"


class TokenThresholds:
    """The last biases of a model's token routers for each step, in one tensor.

    A trained router draws the differences between steps from what it reads; here a copy of as many numbers as there
    are layers does it before each forward, inside what is timed.
    """

    def __init__(self, model: Any, steps: int) -> None:
        self.routers = [block.dy_token for block in model.dynamic_blocks()]
        layers, device = len(self.routers), model.device
        self.table = torch.zeros(steps, layers, device=device)
        self.now = torch.zeros(layers, device=device)
        for i, router in enumerate(self.routers):
            for linear in (m for m in router.modules() if isinstance(m, nn.Linear)):
                nn.init.normal_(linear.weight, std=0.1, generator=torch.Generator(device).manual_seed(i))
            router.up.bias = nn.Parameter(self.now[i : i + 1], requires_grad=False)

    def set(self, step: int) -> None:
        """To be called before the forward of a step."""
        self.now.copy_(self.table[step])

    @torch.no_grad()
    def fit(self, forward: Callable[[int], Any], tokens: Tensor) -> None:
        """Find the thresholds that keep the shares ``tokens`` [layers, steps]; one forward for each step."""
        for step in range(len(self.table)):
            self.now.zero_()
            with shifted(self.routers, tokens[:, step].tolist()) as shifts:
                forward(step)
            self.table[step] = torch.stack(shifts)


@contextmanager
def shifted(routers: Sequence[nn.Module], shares: Sequence[float]) -> Iterator[list[Tensor]]:
    """Inside the ``with`` a forward finds what to add to each token router's logits for its share to be positive. It
    goes on with them shifted, so that later layers see what earlier ones leave out; what was added is yielded."""
    shifts = [torch.zeros(()) for _ in routers]

    def shifting(layer: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
            shifts[layer] = _shift(logits, shares[layer])
            return logits + shifts[layer]

        return hook

    hooks = [router.register_forward_hook(shifting(i)) for i, router in enumerate(routers)]
    try:
        yield shifts
    finally:
        for hook in hooks:
            hook.remove()


def _shift(logits: Tensor, share: float) -> Tensor:
    """What to add to let ``share`` of the logits be positive: 0 falls between two of them."""
    ordered = logits.flatten().sort(descending=True).values
    count = round(share * len(ordered))
    above = ordered[count - 1] if count else ordered[0] + 1
    below = ordered[count] if count < len(ordered) else ordered[-1] - 1
    return -(above + below) / 2
