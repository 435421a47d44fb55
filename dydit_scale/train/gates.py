"""How a TD-LoRA's experts share the timesteps, logged while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dydit_scale.adapters.export import timestep_embeddings
from dydit_scale.adapters.td_layer import TDLoraLayer, mixtures
from dydit_scale.adapters.td_lora import td_layers
from dydit_scale.diffusion.process import Process

FOLDER = "gates"
_POINTS = 25
_ALIVE = 0.5
"""Share of an equal share that an expert's gate must reach at some timestep, or it counts as dead."""


class GateLog:
    """The gates of a run over a grid of timesteps, a file for each evaluation.

    Make it before the network is sharded: it computes the embeddings of the grid, which training leaves alone.
    """

    def __init__(self, network: nn.Module, process: Process, folder: Path) -> None:
        self.folder = folder / FOLDER
        levels = process.even_levels((torch.arange(_POINTS) + 0.5) / _POINTS)
        timesteps = process.timestep(levels)
        self.embeddings = timestep_embeddings(network, timesteps.float()).cpu()
        self.noise = (levels * (1000 if levels.is_floating_point() else 1)).float().numpy()
        self.layers = list(td_layers(network))
        gates = {name: layer.gate("default") for name, layer in td_layers(network, "default").items()}
        self.kinds = {layer: gate.kind for layer, gate in gates.items()}
        names = {module: name for name, module in network.named_modules()}
        self.names = {layer: names[gate] for layer, gate in gates.items()}
        self.parameters = [name for name, _ in network.named_parameters() if ".td_router." in name]

    def evaluate(self, parameters: Mapping[str, Tensor], step: int) -> dict[str, float]:
        """Write the gates of the whole ``parameters`` (of those in ``self.parameters``) and return what sums them up.

        ``gate_entropy``: mean over layers and timesteps, 1 where all experts are equal, 0 where one does everything.
        ``dead_experts``: share of experts, over all layers, that no timestep uses.
        """
        usage = torch.stack([self._gates(parameters, layer) for layer in self.layers])
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            self.folder / f"step-{step:07d}.npz",
            timesteps=self.noise,
            gates=usage.numpy().astype(np.float16),
            names=np.array(self.layers),
        )
        return {"gate_entropy": entropy(usage), "dead_experts": dead_share(usage)}

    def _gates(self, parameters: Mapping[str, Tensor], layer: str) -> Float[Tensor, "timesteps experts"]:
        weight, bias = (parameters[f"{self.names[layer]}.{part}"] for part in ("weight", "bias"))
        gates = mixtures(self.embeddings, weight, bias, self.kinds[layer])
        return gates / gates.sum(dim=-1, keepdim=True)


def make_gate_log(network: Any, process: Process, folder: Path) -> GateLog | None:
    """None for a network without TD-LoRA."""
    adapted = any(isinstance(module, TDLoraLayer) for module in network.modules())
    return GateLog(network, process, folder) if adapted else None


def entropy(gates: Float[Tensor, "layers timesteps experts"]) -> float:
    """Mean entropy of the mixtures, in units of the entropy of equal gates; 0 for a single expert."""
    experts = gates.shape[-1]
    return 0.0 if experts == 1 else float(torch.special.entr(gates).sum(-1).mean() / np.log(experts))


def dead_share(gates: Float[Tensor, "layers timesteps experts"]) -> float:
    """Share of experts whose gate stays below half of an equal share at all timesteps."""
    return float((gates.amax(dim=1) < _ALIVE / gates.shape[-1]).float().mean())
