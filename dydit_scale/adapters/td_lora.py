"""TD-LoRA as a peft tuner: LoRA whose up-projection is mixed from experts by the timestep.

W(t) = W0 + scaling * (sum_i g_i(t) B_i) A, one A and several B_i per layer, the gates g from the pure timestep
embedding. Importing this module makes peft know the method ("TDLORA"); peft itself stays as it is.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from dydit_scale.adapters.delivery import (
    TimestepCheckpoint,
    attach_timestep_state,
    checkpoint_with_timestep,
    embedding_dim,
    is_in_embedder,
)
from dydit_scale.adapters.td_layer import NETWORK_GATES, GateKind, GateScope, TDLoraLayer, TimestepGates
from dydit_scale.dynamic.weight_only import quantisation_of

__all__ = [
    "TDLORA",
    "TDLoraConfig",
    "TDLoraLayer",
    "TDLoraModel",
    "TimestepCheckpoint",
    "adapters_off",
    "add_td_lora",
    "checkpoint_with_timestep",
    "is_dynamic_name",
    "merge_at",
    "rank_of",
    "target_linears",
    "td_layers",
    "unmerge",
]


class _PeftTypeName(str):
    """peft's PeftType is a closed enum, but its registries are keyed by string; some messages want ``.value``."""

    value = name = property(str.__str__)


TDLORA = _PeftTypeName("TDLORA")


# Not frozen: peft writes into its configs (peft_type, inference_mode), and a frozen class cannot extend its own.
@dataclass(kw_only=True)
class TDLoraConfig(PeftConfig):
    """What to adapt and how large."""

    target_modules: list[str] | tuple[str, ...] | str | None = None
    """Linear layers to adapt: names (or ends of names) or one regular expression for the whole name."""
    exclude_modules: list[str] | tuple[str, ...] | str | None = None
    """Layers to leave out of them, in the same form."""
    rank: int = 8
    """Rank of the update."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    experts: int = 4
    """Number of up-projections the timestep mixes; 1 is plain LoRA."""
    gate: GateKind = "softmax"
    """How they are mixed: ``softmax`` gates share what sums to one, ``sigmoid`` gates open each expert by itself."""
    gate_scope: GateScope = "layer"
    """Whether each layer has a gate of its own, or all layers of the ``network`` share one."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: regular expression for the end of the name -> rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some layers, in the same form."""
    time_dim: int | None = None
    """Width of the timestep embedding; found in the model if it has one timestep embedder."""
    init_noise: float = 2.0**-10
    """Size of the experts' entries at the start; a power of two, so that they cancel exactly."""
    seed: int = 0
    """Seed of the start values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TDLORA
        # peft shortens long lists to ends that are unique in this model only; it leaves tuples alone.
        if isinstance(self.target_modules, (list, set)):
            self.target_modules = tuple(sorted(self.target_modules))
        if isinstance(self.exclude_modules, (list, set)):
            self.exclude_modules = tuple(sorted(self.exclude_modules))
        for where, rank in {"rank": self.rank, **self.rank_pattern, "experts": self.experts}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"TDLoraConfig: {where}: expected a positive integer, got {rank!r}")
        for where, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"TDLoraConfig: {where}: expected a positive number, got {alpha!r}")
        if self.gate not in get_args(GateKind):
            raise ValueError(f"TDLoraConfig: gate: expected one of {', '.join(get_args(GateKind))}, got {self.gate!r}")
        if self.gate_scope not in get_args(GateScope):
            raise ValueError(
                f"TDLoraConfig: gate_scope: expected one of {', '.join(get_args(GateScope))}, got {self.gate_scope!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"TDLoraConfig: dropout: expected a value in [0, 1), got {self.dropout!r}")
        if not (self.init_noise > 0 and math.frexp(self.init_noise)[0] == 0.5):
            raise ValueError(f"TDLoraConfig: init_noise: expected a power of two, got {self.init_noise!r}")


def is_dynamic_name(name: str) -> bool:
    """Whether a parameter or module belongs to the routers of a dynamic model (a part of its name starts with dy_)."""
    return any(part.startswith("dy_") for part in name.split("."))


def rank_of(config: TDLoraConfig, name: str) -> int:
    """Rank of the layer called ``name``."""
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)


def _alpha_of(config: TDLoraConfig, name: str) -> float:
    return config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.alpha)


def target_linears(model: nn.Module, config: TDLoraConfig) -> dict[str, Any]:
    """The linear layers (plain or quantised) of ``model`` that ``config`` adapts, by name; all are checked before
    anything is changed.

    Raises ValueError if a target or pattern matches nothing, or matches something that cannot be adapted.
    """
    if not config.target_modules:
        raise ValueError("TDLoraConfig: target_modules: expected names or a regular expression, got nothing")
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    names = [name for name in modules if name and not name.startswith(adapted)]
    found = {name: _linear(name, modules[name]) for name in names if check_target_module_exists(config, name)}
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    for target in targets:
        if not (found if isinstance(config.target_modules, str) else [n for n in found if _ends_with(n, target)]):
            close = difflib.get_close_matches(target.rpartition(".")[2], {n.rpartition(".")[2] for n in names}, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"target_modules: {target!r} matches no layer of {type(model).__name__}{hint}")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in found):
            raise ValueError(f"rank_pattern/alpha_pattern: {pattern!r} matches none of the adapted layers")
    return found


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _linear(name: str, module: nn.Module) -> Any:
    if is_in_embedder(name):
        raise ValueError(f"target_modules: {name} makes the timestep embedding that the update needs; exclude it")
    if is_dynamic_name(name):
        raise ValueError(f"target_modules: {name} belongs to a router, which is trained in full; exclude it")
    base = module.get_base_layer() if isinstance(module, TDLoraLayer) else module
    plain = isinstance(base, nn.Linear) and isinstance(base.weight, Tensor) and base.weight.is_floating_point()
    if isinstance(base, BaseTunerLayer) or not (plain or quantisation_of(base) is not None):
        raise ValueError(
            f"target_modules: {name}: expected an nn.Linear, plain or quantised in a way that peft knows, without "
            f"another adapter, got {type(base).__module__}.{type(base).__name__}; exclude it"
        )
    if not hasattr(base, "in_features"):
        raise ValueError(f"target_modules: {name}: {type(base).__name__} is no single linear layer; exclude it")
    return base


class TDLoraModel(BaseTuner):
    """peft's view of the method: puts a TDLoraLayer around every targeted linear layer."""

    prefix = "td_"
    tuner_layer_cls = TimestepGates

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, TDLoraConfig), f"TDLoraModel needs a TDLoraConfig, got {type(peft_config)}"
        target_linears(model, peft_config)
        peft_config.time_dim = embedding_dim(model, peft_config.time_dim)
        attach_timestep_state(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, TDLoraLayer):
            layer = target
        else:
            base = _linear(current_key, target)
            layer = TDLoraLayer(base, current_key, attach_timestep_state(self.model), quantisation_of(base))
        layer.add_adapter(
            adapter_name,
            rank=rank_of(peft_config, current_key),
            alpha=_alpha_of(peft_config, current_key),
            dropout=peft_config.dropout,
            experts=peft_config.experts,
            time_dim=peft_config.time_dim,
            noise=peft_config.init_noise,
            seed=peft_config.seed,
            gate=peft_config.gate,
            network_gates=_network_gates(self.model) if peft_config.gate_scope == "network" else None,
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.set_adapter(self.active_adapters)  # also where gates of the network took another for the active one

    def unload(self) -> nn.Module:
        """The base model, without a trace of the adapters."""
        if hasattr(self.model, NETWORK_GATES):
            delattr(self.model, NETWORK_GATES)
        return super().unload()


def _network_gates(model: nn.Module) -> TimestepGates:
    """Those on the root; made with the first layer and no sooner, since peft freezes a base that has no tuner layer."""
    gates = getattr(model, NETWORK_GATES, None)
    if not isinstance(gates, TimestepGates):
        gates = TimestepGates()
        setattr(model, NETWORK_GATES, gates)
    return gates


PEFT_TYPE_TO_CONFIG_MAPPING[TDLORA] = TDLoraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[TDLORA] = TDLoraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[TDLORA] = TDLoraModel.prefix  # type: ignore[index]


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The peft configs of a model by adapter name; empty without adapters."""
    return getattr(model, "peft_config", {})


def add_td_lora(model: nn.Module, config: TDLoraConfig, adapter_name: str = "default") -> nn.Module:
    """Adapt ``model`` in place and return it; the output does not change until the first training step.

    The parameters of the new adapter (fp32) become trainable, the rest of the model is frozen, except that router
    parameters (``dy_``) stay as the caller set them. ``config`` is copied.

    Raises ValueError if the adapter exists already or the config does not fit the model (which is then unchanged).
    """
    if adapter_name in adapter_configs(model):
        raise ValueError(f"add_td_lora: adapter {adapter_name!r} exists already; choose another adapter_name")
    target_linears(model, config)
    before = {name: p.requires_grad for name, p in model.named_parameters() if is_dynamic_name(name)}
    inject_adapter_in_model(copy.deepcopy(config), model, adapter_name=adapter_name)
    parameters = dict(model.named_parameters())
    for name, requires_grad in before.items():
        parameters[name].requires_grad_(requires_grad)
    return model


def td_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, TDLoraLayer]:
    """The TD-LoRA layers of ``model`` by name, those with the adapter if one is named; ValueError if there are none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TDLoraLayer)}
    if adapter_name is not None:
        layers = {name: m for name, m in layers.items() if adapter_name in m.td_down}
    if not layers:
        which = "adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        raise ValueError(f"{type(model).__name__} has no TD-LoRA {which}; call add_td_lora or load_td_lora first")
    return layers


def merge_at(model: nn.Module, t_emb: Tensor) -> None:
    """Make every TD-LoRA layer a plain linear layer at one timestep, ``t_emb`` [1, dim]; merging again replaces it.

    Keeps a second copy of the adapted weights, so that ``unmerge(model)`` is exact.
    """
    for layer in td_layers(model).values():
        layer.merge_at(t_emb)


def unmerge(model: nn.Module) -> None:
    """Undo ``merge_at`` exactly."""
    for layer in td_layers(model).values():
        layer.unmerge()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is exactly its base: no adapter of any peft method acts. Only a flag per layer is set.

    For a teacher's forward in a training step; keep it under torch.no_grad(), since activations that are recomputed
    after the ``with`` would see the adapters again. Routers of dynamic models are not adapters: they stay as they are.

    Raises ValueError if the model has no adapter, or one that is merged.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"adapters_off: {type(model).__name__} has no adapter, so it is not its own teacher")
    if getattr(model, "_plan", None) is not None:
        raise ValueError("adapters_off: the model is packed, with adapters folded into its slices; unpack it first")
    if any(layer.merged for layer in layers):
        raise ValueError("adapters_off: adapters are merged into the base weights; unmerge first")
    before = [layer._disable_adapters for layer in layers]
    # Not peft's enable_adapters: it also changes requires_grad.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
