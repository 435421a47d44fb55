"""TD-LoRA as several plain LoRAs that take turns while a diffusers pipeline samples.

Either one file for each range of timesteps, each the mean over its range, or one file for each expert and a table of
gates, which at the timesteps of the export loses nothing. ``load_lora_schedule`` reads both.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
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
    write_mean,
)
from dydit_scale.adapters.td_lora import td_layers
from dydit_scale.adapters.tensor_file import TensorFile, read_metadata, read_tensors, write_tensors

GATES_FILE = "gates.safetensors"
TIMESTEPS = "timesteps"
"""In the file of gates: the rows' timesteps, rising, 0 to 1000; every other tensor is a layer's [rows, experts]."""
_FILES = "lora_[0-9][0-9][0-9].safetensors"
_FORMAT = "dydit.format"
_RANGE, _EXPERT, _GATES = "lora-range", "lora-expert", "lora-gates"
_GRID = 1001  # rows of gates besides those of the sampler, evenly over all timesteps
Weights = Callable[[float], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class RangeFile:
    """One file of ``export_range_loras``."""

    path: Path
    timestep_range: tuple[int, int]
    """Above the first (or at it, if 0) and up to the second, of 1000."""
    timesteps: Tensor
    """Those of the sampler in it, as the model's forward takes them."""
    tensors: dict[str, Tensor]
    """What the file holds."""
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

    Each file has its error in the header and a .json beside it, as ``write_mean`` writes them. An earlier export
    to the folder is replaced; other files stay.

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
    specs = [dataclasses.replace(spec, timestep_range=span) for span in pairwise(bounds)]
    files = []
    for number, part in enumerate(parts):
        embeddings = timestep_embeddings(model, part)
        file = RangeFile(
            path=Path(folder) / f"lora_{number:03}.safetensors",
            timestep_range=(bounds[number], bounds[number + 1]),
            timesteps=part,
            tensors=mean_lora(model, embeddings, adapter_name=adapter_name),
            error=mean_error(model, embeddings, adapter_name=adapter_name),
        )
        files.append(file)
    worst = max(file.error.total for file in files)
    if worst > max_error and not force:
        raise ValueError(
            f"{folder}: the mean over a range of timesteps misses the adapter by {worst:.3f} of its size, more than "
            f"max_error {max_error}; ask for more ranges, for experts (export_expert_loras), or force it"
        )
    remove_schedule(folder)
    for file, described in zip(files, specs, strict=True):
        write_mean(file.path, file.tensors, described, file.error, {_FORMAT: _RANGE})
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
    """Write one plain LoRA for each expert to ``folder``, and a table of every layer's gates.

    The table has a row for each of ``timesteps`` (as in ``export_range_loras``), where the files say all that the
    adapter does, and for every thousandth of the way; elsewhere gates are interpolated. An earlier export to the folder
    is replaced; other files stay.
    """
    layers = td_layers(model, adapter_name)
    rows = torch.cat([timesteps, torch.linspace(0, 1, _GRID).to(timesteps)]).unique()
    embeddings = timestep_embeddings(model, rows)
    gates = {name: layer.gate(adapter_name)(embeddings) for name, layer in layers.items()}
    experts = []
    for number in range(next(iter(gates.values())).shape[1]):
        tensors = {}
        for name, layer in layers.items():
            up = layer.up(adapter_name).weight[number].float() * layer.scaling[adapter_name]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.down(adapter_name).weight.float()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = up
        experts.append(tensors)
    folder = remove_schedule(folder)
    for number, tensors in enumerate(experts):
        write_lora(folder / f"lora_{number:03}.safetensors", tensors, spec, {_FORMAT: _EXPERT})
    write_tensors(folder / GATES_FILE, {TIMESTEPS: 1000 * rows.float(), **gates}, {_FORMAT: _GATES})
    return folder


def remove_schedule(folder: str | Path) -> Path:
    """Remove from ``folder``, which is made if needed, what either export wrote to it, and nothing else."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob(_FILES), *folder.glob(GATES_FILE)):
        if read_metadata(path).get(_FORMAT) in (_RANGE, _EXPERT, _GATES):
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    return folder


def load_lora_schedule(pipeline: Any, folder: str | Path, *, name: str = "td") -> RemovableHandle:
    """Load a folder of ``export_range_loras`` or ``export_expert_loras`` into a diffusers pipeline.

    From then on every forward of ``pipeline.transformer`` uses the LoRAs as its timestep asks, whatever the sampler and
    its number of steps; other active adapters stay active. A batch has one timestep, and reading it costs a
    synchronisation with the device. To end it, call the handle's ``remove()`` and drop the LoRAs
    (``pipeline.unload_lora_weights()`` or ``delete_adapters``). LoRAs that change cannot be fused.

    Args:
        name: What the adapters are called: ``<name>_000`` and so on.

    Raises ValueError if files are missing, damaged or do not belong together, do not fit the transformer, or adapters
    of this name are there already.
    """
    folder = Path(folder)
    paths = [path for path in sorted(folder.glob(_FILES)) if read_metadata(path).get(_FORMAT) in (_RANGE, _EXPERT)]
    files = {path: read_tensors(path) for path in paths}
    if not files:
        raise ValueError(f"{folder}: expected lora_000.safetensors and so on, as dydit export writes, found none")
    adapters = {path: f"{name}_{path.stem.removeprefix('lora_')}" for path in files}
    layers = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in next(iter(files.values())).tensors}
    has_gates = any(file.metadata[_FORMAT] == _EXPERT for file in files.values())
    names = list(adapters.values())
    weights = _gates(folder, names, layers) if has_gates else _ranges(files, names, layers)
    model = pipeline.transformer
    if there := sorted(set(names) & set(getattr(model, "peft_config", {}))):
        raise ValueError(f"load_lora_schedule: adapter {there[0]!r} exists already; drop it first, or choose a name")
    if absent := sorted(layers - {layer for layer, _ in model.named_modules()}):
        raise ValueError(f"{folder} does not fit {type(model).__name__}, which has no layer {absent[0]}")
    active = {m: list(m.active_adapters) for m in model.modules() if isinstance(m, LoraLayer)}
    for path, adapter in adapters.items():
        pipeline.load_lora_weights(folder, weight_name=path.name, adapter_name=adapter, local_files_only=True)
    loaded = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and set(names) <= set(m.r)}
    for layer, others in active.items():  # every load has made its own adapter the only active one
        layer.set_adapter(others, inference_mode=True)
    if set(loaded) != layers:
        pipeline.delete_adapters(names)
        raise ValueError(f"{folder}: diffusers made {len(loaded)} LoRA layers of it, expected {len(layers)}")

    def before_forward(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        timestep = _one_timestep(kwargs)
        for layer, strengths in weights(timestep).items():
            _apply(layer, loaded[layer], strengths, names)

    return model.register_forward_pre_hook(before_forward, with_kwargs=True)


def _ranges(files: Mapping[Path, TensorFile], adapters: list[str], layers: set[str]) -> Weights:
    """At any timestep the one adapter of its range, with weight 1. Raises ValueError unless they cover all."""
    spans = []
    for path, file in files.items():
        low, _, high = file.metadata.get("modelspec.timestep_range", "").partition(",")
        if not (low.isdigit() and high.isdigit()):
            raise ValueError(f"{path}: expected modelspec.timestep_range 'low,high' in its header")
        spans.append((int(low), int(high)))
    if [0, *(high for _, high in spans)] != [*(low for low, _ in spans), 1000]:
        text = ", ".join(f"{low}-{high}" for low, high in spans)
        raise ValueError(f"{next(iter(files)).parent}: ranges {text} do not cover 0-1000 once; is a file missing?")
    bounds = [high for _, high in spans]

    def weights(timestep: float) -> Mapping[str, Mapping[str, float]]:
        adapter = adapters[bisect_left(bounds, min(timestep, 1000.0))]
        return {layer: {adapter: 1.0} for layer in layers}

    return weights


def _gates(folder: Path, adapters: list[str], layers: set[str]) -> Weights:
    """At a timestep all adapters, weighted by each layer's gates. Raises ValueError if the table does not fit them."""
    path = folder / GATES_FILE
    tensors = {name: tensor.double().numpy() for name, tensor in read_tensors(path).tensors.items()}
    rows = tensors.pop(TIMESTEPS, None)
    if rows is None or set(tensors) != layers:
        raise ValueError(f"{path}: expected {TIMESTEPS} and gates of the {len(layers)} layers of the LoRAs beside it")
    for layer, table in tensors.items():
        if table.shape != (len(rows), len(adapters)):
            raise ValueError(
                f"{path}: {layer}: expected gates [{len(rows)}, {len(adapters)}], a column for each LoRA file, got "
                f"{list(table.shape)}; is a file missing?"
            )

    def weights(timestep: float) -> Mapping[str, Mapping[str, float]]:
        place = float(np.interp(timestep, rows, np.arange(len(rows))))  # between which rows, in rows
        below, above, share = int(place), min(int(place) + 1, len(rows) - 1), place % 1
        mixed = {layer: (1 - share) * table[below] + share * table[above] for layer, table in tensors.items()}
        return {layer: dict(zip(adapters, gates.tolist(), strict=True)) for layer, gates in mixed.items()}

    return weights


def _apply(name: str, layer: Any, strengths: Mapping[str, float], ours: Iterable[str]) -> None:
    """Make ``strengths`` the only ones of our adapters that act in a layer, beside others that are active there."""
    if layer.merged or not set(strengths) <= set(layer.r):
        state = "fused" if layer.merged else "gone"
        raise ValueError(
            f"{name}: LoRAs that follow the timestep are {state}; call remove() on their handle, or load them again"
        )
    active = [*(a for a in layer.active_adapters if a not in ours), *strengths]
    if layer.active_adapters != active:
        layer.set_adapter(active, inference_mode=True)
    for adapter, strength in strengths.items():
        layer.set_scale(adapter, strength)


def _one_timestep(kwargs: Mapping[str, Any]) -> float:
    """The timestep of a forward, 0 to 1000; FLUX is given it divided by 1000."""
    if "timestep" not in kwargs:
        raise ValueError("LoRAs that follow the timestep: pass timestep= to the transformer by name")
    low, high = torch.stack(torch.aminmax(kwargs["timestep"].detach().float())).tolist()
    if low != high:
        raise ValueError(f"LoRAs that follow the timestep need one timestep for a whole batch, got {low} to {high}")
    return 1000 * low
