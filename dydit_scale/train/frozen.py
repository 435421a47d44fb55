"""The phase of frozen routers: width is settled, so each micro-batch runs one sub-network, forward and backward.

A router's answer depends on the noise level alone. With routers (and the timestep embedder that they read) held still,
the masks of all levels are a table, and the levels with equal masks form a bucket. Levels are then 1,000, each as
likely as the next under the process's density: all there are for DDPM, the middles of 1,000 equal slices for a flow.
Nothing is rounded to a bucket: two levels share one only if every mask of every layer is equal. A micro-batch draws a
bucket with the probability of its levels, and its samples draw among these; so each sample's level is distributed as
ever, and over a step's micro-batches the levels are spread evenly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dydit_scale.diffusion.process import Process
from dydit_scale.diffusion.randomness import keyed_seed
from dydit_scale.diffusion.timesteps import stratified_uniform
from dydit_scale.dynamic.masks import SharedUnits, SubNetwork, WidthMasks
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import Engine
from dydit_scale.parallel.world import broadcast_object

LEVELS = 1000
_ROUTING = re.compile(r"dy_width\..+|(.+\.)?timestep_embedder\.linear_[12]\.(base_layer\.)?(weight|bias)")


def decides_width(name: str) -> bool:
    """Whether a parameter of a dynamic model has a say in its width masks."""
    return _ROUTING.fullmatch(name) is not None


@dataclass(frozen=True, eq=False)
class WidthTable:
    """The sub-network of each noise level."""

    networks: tuple[SubNetwork, ...]
    """The distinct ones."""
    of_level: Int64[Tensor, " levels"]

    @classmethod
    def build(cls, masks: WidthMasks) -> WidthTable:
        """Levels with equal masks [layers, levels, units], grouped."""
        found = [None if m is None else m.bool().cpu().transpose(0, 1) for m in masks]  # levels layers units
        flat = torch.cat([m.flatten(1) for m in found if m is not None], dim=1)
        _, of_level = flat.unique(dim=0, return_inverse=True)
        layers = next(m.shape[1] for m in found if m is not None)
        known: dict[tuple[int, bytes], SharedUnits] = {}  # a layer's equal masks find their members once

        def units(level: int, layer: int) -> SharedUnits:
            heads, groups = (None if m is None else m[level, layer].clone() for m in found)
            key = (layer, b"".join(m.numpy().tobytes() for m in (heads, groups) if m is not None))
            return known.setdefault(key, SharedUnits(heads, groups))

        firsts = [int((of_level == network).nonzero()[0]) for network in range(int(of_level.max()) + 1)]
        return cls(
            tuple(SubNetwork(tuple(units(level, layer) for layer in range(layers))) for level in firsts), of_level
        )

    def draw(self, seed: int, step: int, places: Int64[Tensor, " batch"]) -> tuple[SubNetwork, Float[Tensor, " batch"]]:
        """The sub-network of the micro-batch at ``places`` of the global batch, and each sample's number in (0, 1) for
        the process to make a level of; they depend on (seed, step, places) alone."""
        micro = places[:1] // len(places)
        level = int(stratified_uniform(seed, step, micro) * LEVELS)
        network = int(self.of_level[level])
        members = (self.of_level == network).nonzero().squeeze(1)
        within = stratified_uniform(keyed_seed(seed, "within", int(micro)), step, torch.arange(len(places)))
        return self.networks[network], even_numbers()[members[(within * len(members)).long()]]


def even_numbers() -> Float[Tensor, " levels"]:
    """The middles of equal slices of (0, 1)."""
    return (torch.arange(LEVELS) + 0.5) / LEVELS


class FrozenRouters:
    """The phase in a run: when it begins, and its table, which is a function of the frozen weights.

    Make it before the network is sharded: it keeps what never learns of the routing.
    """

    def __init__(self, network: Any, process: Process, from_step: int) -> None:
        self.from_step, self.process = from_step, process
        self.table: WidthTable | None = None
        with init_empty_weights():
            self._routing: nn.Module = type(network).from_config(network.config)
        routing = {name: p for name, p in network.named_parameters() if decides_width(name)}
        self._learned = [name for name, p in routing.items() if p.requires_grad]
        self._fixed = {n: p.detach().cpu().clone() for n, p in routing.items() if not p.requires_grad}

    def at(self, step: int, engine: Engine, ema: Ema | None) -> WidthTable | None:
        """The table where the phase has begun, made when it is first asked for. Collective.

        The averaged weights take the routers as they are when the phase begins: they will be sampled with these masks.
        """
        if step < self.from_step:
            self.table = None
        elif self.table is None:
            self.table = self._make_table(engine)
        if step == self.from_step and ema is not None:
            ema.adopt(name for group in engine.groups if group.freezes for name in group.params)
        return self.table

    @torch.no_grad()
    def _make_table(self, engine: Engine) -> WidthTable:
        learned, width = engine.gather(engine.local_parameters(), self._learned), None
        if engine.world.is_main:  # the others have no parameters, and must not differ by a rounding error
            state = {name.replace(".base_layer", ""): tensor for name, tensor in (learned | self._fixed).items()}
            network: Any = self._routing
            network.load_state_dict(state, strict=False, assign=True)
            timesteps = self.process.timestep(self.process.training_levels(even_numbers()))
            width = network.width_masks(network.routing_embedding(timesteps.float()), "threshold")
        return WidthTable.build(broadcast_object(engine.world, width))
