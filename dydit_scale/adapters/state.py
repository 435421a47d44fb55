"""Saving and loading a TD-LoRA adapter: a folder that peft reads too, plus the routers of a dynamic model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dydit_scale.adapters.delivery import embedding_dim
from dydit_scale.adapters.td_layer import NETWORK_GATES
from dydit_scale.adapters.td_lora import (
    TDLORA,
    TDLoraConfig,
    adapter_configs,
    add_td_lora,
    is_dynamic_name,
    rank_of,
    target_linears,
    td_layers,
)
from dydit_scale.adapters.tensor_file import check_names_and_shapes, check_tensors, read_tensors, write_tensors

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
ROUTERS_FILE = "dynamic_routers.safetensors"
# peft writes and expects the name of its wrapper in front, also for models that were never wrapped.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """What ``load_td_lora`` found."""

    config: TDLoraConfig
    """The adapter's config."""
    metadata: dict[str, str]
    """The metadata it was saved with."""
    skipped_routers: tuple[str, ...]
    """Routers in the folder that were not loaded."""


def _parameter_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Name in the file -> name of the parameter in the model."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for name, layer in td_layers(model, adapter_name).items():
        for part in ("td_down", "td_up"):
            found[f"{name}.{part}.weight"] = f"{name}.{part}.{adapter_name}.weight"
        gate = names[layer.gate(adapter_name)]  # the layer's own, or the network's
        for leaf in ("weight", "bias"):
            found[f"{gate.removesuffix(f'.{adapter_name}')}.{leaf}"] = f"{gate}.{leaf}"
    return found


def td_lora_state(
    model: nn.Module, adapter_name: str = "default", *, full_state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's tensors by name without the adapter's name, e.g. ``blocks.0.attn.to_q.td_up.weight``.

    ``full_state`` is the gathered state of a sharded model (parameter name -> tensor); by default the tensors are
    those of ``model`` itself. Raises ValueError if a parameter is missing there or the adapter does not exist.
    """
    source = dict(model.named_parameters()) if full_state is None else full_state
    names = _parameter_names(model, adapter_name)
    missing = [parameter for parameter in names.values() if parameter not in source]
    if missing:
        raise ValueError(f"td_lora_state: full_state lacks {len(missing)} parameters, first: {missing[0]}")
    return {key: source[parameter].detach() for key, parameter in names.items()}


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the routers (names with ``dy_``) of a dynamic model; empty for a static one."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if is_dynamic_name(name)}


def save_td_lora(
    model: nn.Module,
    folder: str | Path,
    *,
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = "default",
    full_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``adapter_model.safetensors``, ``adapter_config.json`` and, if there are any, the routers beside them.

    Args:
        model: A model with a TD-LoRA adapter.
        folder: Made if needed; files of an earlier save in it are replaced.
        extra: Router tensors by name; by default those of the model (``router_state``).
        metadata: Text for the file header.
        adapter_name: Which adapter.
        full_state: The gathered state of a sharded model, as in ``td_lora_state``.

    Returns the folder. Raises ValueError for tensors that are sharded, empty, or not finite; nothing is written then.
    """
    folder = Path(folder)
    tensors = td_lora_state(model, adapter_name, full_state=full_state)
    if extra is None:
        source = router_state(model) if full_state is None else full_state
        extra = {name: tensor for name, tensor in source.items() if is_dynamic_name(name)}
    check_tensors(tensors, f"adapter {adapter_name!r}")
    if extra:
        check_tensors(extra, "routers")
    text = {"dydit.format": "td_lora", **(metadata or {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROUTERS_FILE).unlink(missing_ok=True)
    if extra:
        write_tensors(folder / ROUTERS_FILE, extra, text)
    write_tensors(folder / ADAPTER_FILE, {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}, text)
    _write_config(folder / CONFIG_FILE, adapter_configs(model)[adapter_name])
    return folder


def _write_config(path: Path, config: TDLoraConfig) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_config(path: Path) -> TDLoraConfig:
    """The config in ``adapter_config.json``. Raises ValueError if it is missing, damaged, or of another method."""
    if not path.is_file():
        raise ValueError(f"{path}: expected the config of a TD-LoRA adapter, found no file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != TDLORA:
        raise ValueError(f"{path}: expected peft_type {str(TDLORA)!r}, got {kind!r}; load other adapters with peft")
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(TDLoraConfig)})
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}; the adapter was saved by another version")
    # peft switches this on in what its own save writes; here an adapter that is loaded can be trained on.
    try:
        return TDLoraConfig(**{**values, "inference_mode": False})
    except TypeError as error:
        raise ValueError(f"{path}: a value has the wrong type ({error})") from error


def _expected_shapes(model: nn.Module, config: TDLoraConfig, adapter_name: str) -> dict[str, tuple[int, ...]]:
    if adapter_name in adapter_configs(model):
        return {name: tuple(tensor.shape) for name, tensor in td_lora_state(model, adapter_name).items()}
    time_dim = embedding_dim(model, config.time_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    targets = target_linears(model, config)
    for name, linear in targets.items():
        rank = rank_of(config, name)
        shapes[f"{name}.td_down.weight"] = (rank, linear.in_features)
        shapes[f"{name}.td_up.weight"] = (config.experts, linear.out_features, rank)
    for name in [NETWORK_GATES] if config.gate_scope == "network" else targets:
        shapes[f"{name}.td_router.weight"] = (config.experts, time_dim)
        shapes[f"{name}.td_router.bias"] = (config.experts,)
    return shapes


def _same_scaling(model: nn.Module, config: TDLoraConfig, adapter_name: str) -> None:
    there = adapter_configs(model)[adapter_name]
    for key in ("alpha", "alpha_pattern", "gate", "gate_scope"):
        if getattr(there, key) != getattr(config, key):
            raise ValueError(
                f"load_td_lora: adapter {adapter_name!r} in the model has {key} {getattr(there, key)}, "
                f"the file has {getattr(config, key)}; load into a model without it"
            )


def _routers_to_load(model: nn.Module, path: Path, wanted: bool | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The routers to copy, and the names of those in the file that stay there."""
    there = router_state(model)
    load = bool(there) if wanted is None else wanted
    if not load:
        return {}, tuple(sorted(read_tensors(path).tensors)) if path.is_file() else ()
    if not path.is_file():
        raise ValueError(
            f"{path}: expected the routers of a dynamic model, found none; routers=False keeps the model's"
        )
    tensors = read_tensors(path).tensors
    check_names_and_shapes(tensors, {n: t.shape for n, t in there.items()}, str(path), type(model).__name__)
    return tensors, ()


@torch.no_grad()
def load_td_lora(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default", routers: bool | None = None
) -> LoadedAdapter:
    """Load what ``save_td_lora`` wrote into a static or dynamic model; adds the adapter if the model lacks it.

    Args:
        model: Static or dynamic, not sharded. Its adapter becomes trainable, as after ``add_td_lora``.
        folder: The folder of the adapter.
        adapter_name: Name of the adapter in the model.
        routers: Whether the folder's routers are loaded; by default if the model has any. They are then required.

    Raises ValueError if a file is missing or damaged, or a name or shape does not fit; the model is unchanged then.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE)
    file = read_tensors(folder / ADAPTER_FILE)
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in file.tensors.items()}
    where = str(folder / ADAPTER_FILE)
    if adapter_name in adapter_configs(model):
        _same_scaling(model, config, adapter_name)
    check_names_and_shapes(tensors, _expected_shapes(model, config, adapter_name), where, type(model).__name__)
    loaded_routers, skipped = _routers_to_load(model, folder / ROUTERS_FILE, routers)
    if adapter_name not in adapter_configs(model):
        add_td_lora(model, config, adapter_name)
    targets = model.state_dict(keep_vars=True)
    for key, parameter in _parameter_names(model, adapter_name).items():
        targets[parameter].copy_(tensors[key])
    for name, tensor in loaded_routers.items():
        targets[name].copy_(tensor)
    if callable(unpack := getattr(model, "unpack", None)):
        unpack()  # its slices hold the weights of before
    metadata = {key: value for key, value in file.metadata.items() if key not in ("format", "dydit.format")}
    return LoadedAdapter(config=config, metadata=metadata, skipped_routers=skipped)
