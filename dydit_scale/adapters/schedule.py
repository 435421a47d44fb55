"""TD-LoRA as several plain LoRAs that take turns while a diffusers pipeline samples.

Either one file for each range of timesteps, each the mean over its range, or one file for each expert and a table of
gates, which loses nothing. ``load_lora_schedule`` reads both.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dydit_scale.adapters.export import (
    PREFIX,
    MeanError,
    ModelSpec,
    mean_error,
    mean_lora,
    timestep_embeddings,
    write_lora,
)
from dydit_scale.adapters.td_lora import td_layers
from dydit_scale.adapters.tensor_file import read_tensors, write_tensors

GATES_FILE = "gates.safetensors"
TIMESTEPS = "timesteps"
"""In the file of gates: the rows' timesteps, rising, 0 to 1000; every other tensor is a layer's [rows, experts]."""
_FILES = "lora_*.safetensors"


@dataclass(frozen=True, kw_only=True)
class RangeFile:
    """One file of ``export_range_loras``."""

    path: Path
    timestep_range: tuple[int, int]
    """Above the first and up to the second, of 1000."""
    error: MeanError
    """Over the timesteps of the range."""


def export_range_loras(
    model: Any,
    timesteps: Float[Tensor, " steps"],
    folder: str | Path,
    spec: ModelSpec,
    *,
    ranges: int,
    adapter_name: str = "default",
    max_error: float = 0.2,
    force: bool = False,
) -> list[RangeFile]:
    """Write ``ranges`` plain LoRAs to ``folder``, each the mean over one part of a sampler's ``timesteps``.

    Args:
        timesteps: As the model's forward takes them, 0 to 1, in any order; each part gets equally many.
        max_error: Largest error of a range in the weights (``MeanError.total``), above which nothing is written unless
            ``force`` is set.

    With as many ranges as steps nothing is lost. Raises ValueError for more, or for an error above ``max_error``.
    """
    if not 1 <= ranges <= len(timesteps):
        raise ValueError(f"ranges: expected 1 to {len(timesteps)}, one for each timestep at most, got {ranges}")
    parts = timesteps.sort().values.tensor_split(ranges)
    bounds = [0, *(round(500 * float(a[-1] + b[0])) for a, b in pairwise(parts)), 1000]
    embeddings = [timestep_embeddings(model, part) for part in parts]
    errors = [mean_error(model, e, adapter_name=adapter_name) for e in embeddings]
    worst = max(error.total for error in errors)
    if worst > max_error and not force:
        raise ValueError(
            f"{folder}: the mean over a range of timesteps misses the adapter by {worst:.3f} of its size, more than "
            f"max_error {max_error}; ask for more ranges, for experts (export_expert_loras), or force it"
        )
    folder = _cleared(folder)
    files = []
    for number, (span, embedding, error) in enumerate(zip(pairwise(bounds), embeddings, errors, strict=True)):
        path = folder / f"lora_{number:03}.safetensors"
        tensors = mean_lora(model, embedding, adapter_name=adapter_name)
        notes = {"dydit.mean_error": f"{error.total:.6g}", "dydit.mean_timesteps": str(len(embedding))}
        write_lora(path, tensors, dataclasses.replace(spec, timestep_range=span), notes)
        files.append(RangeFile(path=path, timestep_range=span, error=error))
    return files


@torch.no_grad()
def export_expert_loras(
    model: Any,
    timesteps: Float[Tensor, " steps"],
    folder: str | Path,
    spec: ModelSpec,
    *,
    adapter_name: str = "default",
) -> Path:
    """Write one plain LoRA for each expert to ``folder``, and the gates of every layer at ``timesteps``.

    ``timesteps``: as in ``export_range_loras``. At these the files say all that the adapter does; between them gates
    are interpolated.
    """
    layers = td_layers(model, adapter_name)
    rows = timesteps.sort().values
    embeddings = timestep_embeddings(model, rows)
    gates = {name: layer.gate(adapter_name)(embeddings) for name, layer in layers.items()}
    folder = _cleared(folder)
    for number in range(next(iter(gates.values())).shape[1]):
        tensors = {}
        for name, layer in layers.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.down(adapter_name).weight.float()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (
                layer.up(adapter_name).weight[number].float() * layer.scaling[adapter_name]
            )
        write_lora(folder / f"lora_{number:03}.safetensors", tensors, spec, {"dydit.expert": str(number)})
    write_tensors(folder / GATES_FILE, {TIMESTEPS: 1000 * rows.float(), **gates}, {"dydit.format": "gates"})
    return folder


def load_lora_schedule(pipeline: Any, folder: str | Path, *, name: str = "td") -> RemovableHandle:
    """Load a folder of ``export_range_loras`` or ``export_expert_loras`` into a diffusers pipeline.

    From then on every forward of ``pipeline.transformer`` uses the LoRAs as its timestep asks, whatever the pipeline
    and its sampler. The handle's ``remove()`` stops that; ``pipeline.unload_lora_weights()`` then drops the LoRAs. A
    forward costs one synchronisation with the device, to read its timestep.

    Args:
        name: What the adapters are called: ``<name>_000`` and so on.

    Raises ValueError if the folder holds no such files.
    """
    folder = Path(folder)
    files = sorted(folder.glob(_FILES))
    if not files:
        raise ValueError(f"{folder}: expected {_FILES}, as dydit export writes, found none")
    adapters = [f"{name}_{file.stem.removeprefix('lora_')}" for file in files]
    has_gates = (folder / GATES_FILE).is_file()
    bounds = [] if has_gates else [_upper_bound(file) for file in files]
    for file, adapter in zip(files, adapters, strict=True):
        pipeline.load_lora_weights(folder, weight_name=file.name, adapter_name=adapter, local_files_only=True)
    model = pipeline.transformer
    use = _use_experts(model, adapters, folder / GATES_FILE) if has_gates else _use_ranges(model, adapters, bounds)

    def before_forward(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        use(_one_timestep(kwargs["timestep"]))

    return model.register_forward_pre_hook(before_forward, with_kwargs=True)


def _use_ranges(model: Any, adapters: list[str], bounds: list[int]) -> Callable[[float], None]:
    """Makes the adapter of a timestep's range the only active one."""
    current = None

    def use(timestep: float) -> None:
        nonlocal current
        wanted = adapters[min(bisect_left(bounds, timestep), len(bounds) - 1)]
        if wanted != current:
            model.set_adapters(wanted, 1.0)
            current = wanted

    return use


def _use_experts(model: Any, adapters: list[str], path: Path) -> Callable[[float], None]:
    """Gives each expert of each layer its gate at a timestep as strength."""
    tensors = {name: tensor.double().numpy() for name, tensor in read_tensors(path).tensors.items()}
    rows = tensors.pop(TIMESTEPS)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if missing := sorted(set(tensors) - set(layers)):
        raise ValueError(f"{path}: {missing[0]} has gates but no LoRA in {type(model).__name__}")
    model.set_adapters(adapters, 1.0)

    def use(timestep: float) -> None:
        for name, gates in tensors.items():
            for adapter, column in zip(adapters, gates.T, strict=True):
                layers[name].set_scale(adapter, float(np.interp(timestep, rows, column)))

    return use


def _one_timestep(timestep: Tensor) -> float:
    """The timestep of a forward, 0 to 1000; FLUX takes thousandths."""
    low, high = (float(x) for x in timestep.detach().float().aminmax())
    if low != high:
        raise ValueError(f"LoRAs that follow the timestep need one timestep for a whole batch, got {low} to {high}")
    return 1000 * low


def _upper_bound(file: Path) -> int:
    span = read_tensors(file).metadata.get("modelspec.timestep_range")
    if span is None:
        raise ValueError(f"{file}: its header lacks modelspec.timestep_range, and {GATES_FILE} is not beside it")
    return int(span.split(",")[1])


def _cleared(folder: str | Path) -> Path:
    """The folder without the files of an earlier export."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob(_FILES), folder / GATES_FILE):
        old.unlink(missing_ok=True)
    return folder
