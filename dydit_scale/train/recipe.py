"""Recipes: YAML files read into frozen dataclasses, strict about names, types and what fits together."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dydit_scale.data.config import DataConfig
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.dynamic.losses import TargetSchedule
from dydit_scale.monitoring.config import MonitorConfig
from dydit_scale.parallel.engine import EngineConfig
from dydit_scale.parallel.watchdog import LimitsConfig
from dydit_scale.train.guard import GuardConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The static model to start from."""

    base: str
    """Folder or hub name of a FluxPipeline."""
    from_scratch: bool = False
    """Start the transformer from random weights instead of the base's; for making a base."""
    text_tokens: int = 512
    """Length to which T5 pads captions (FLUX.1-dev 512, schnell 256)."""
    guidance: float = 1.0
    """Distilled guidance given in training, where the base has a guidance embedder."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which weights learn, besides the routers."""

    kind: Literal["none", "routers", "lora", "td_lora"] = "none"
    """``none``: all weights (full fine-tuning). ``routers``: nothing else, the base stays as it is."""
    rank: int = 16
    """Rank of the update; for td_lora that of the shared down-projection."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; null for alpha = rank."""
    experts: int = 4
    """Experts of td_lora, mixed by the timestep."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """How td_lora mixes them."""
    gate_scope: Literal["layer", "network"] = "layer"
    """Whether each layer of td_lora mixes its experts with a gate of its own, or all with one of the network."""
    variant: Literal["plain", "rslora", "dora"] = "plain"
    """Of lora: ``rslora`` scales by alpha / sqrt(rank) (arXiv 2312.03732), ``dora`` learns magnitude and direction
    apart (arXiv 2402.09353)."""
    targets: str = (
        r".*transformer_blocks\.\d+\..*"
        r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"
    )
    """Regular expression on the names of linear layers."""

    @property
    def is_lora(self) -> bool:
        """True if there are weights of an adapter."""
        return self.kind in ("lora", "td_lora")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.experts < 1:
            raise ValueError(f"adapter: rank and experts must be 1 or more; got {self.rank} and {self.experts}")
        if self.variant != "plain" and self.kind != "lora":
            raise ValueError(f"adapter.variant {self.variant!r} is of kind lora; got kind {self.kind!r}")
        if (self.gate, self.gate_scope) != ("softmax", "layer") and self.kind != "td_lora":
            raise ValueError(f"adapter.gate and adapter.gate_scope are of kind td_lora; got kind {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class SupervisionConfig:
    """A second target for the dynamic model, besides the data."""

    kind: Literal["none", "complete", "distill"] = "none"
    """``complete``: the complete model learns from the data too (DyDiT). ``distill``: the dynamic one imitates the
    static base, which costs a forward only; with adapters the base is this model with adapters off and gates open."""
    weight: float = 1.0
    """Weight of the term."""
    guidance: float = 1.0
    """More than 1, with ``distill``: imitate the base under classifier-free guidance of this scale, as it will be
    sampled. Every sample then runs a second time without its prompt, which doubles the cost."""
    steps: int | None = None
    """Steps from the start in which it acts; null for all."""

    def __post_init__(self) -> None:
        if self.guidance < 1 or (self.guidance > 1 and self.kind != "distill"):
            raise ValueError(
                f"supervision.guidance: expected 1 (off), or more with supervision.kind distill; got {self.guidance} "
                f"with {self.kind}"
            )


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """The budget."""

    target: float = 1.0
    """lambda: MACs dynamic / static to reach."""
    weight: float = 2.0
    """Weight of the squared distance from the target."""
    hold_steps: int = 0
    """Steps at a target of 1."""
    ramp_steps: int = 1000
    """Steps from 1 down to the target."""

    @property
    def schedule(self) -> TargetSchedule:
        """The target over steps."""
        return TargetSchedule(target=self.target, hold_steps=self.hold_steps, ramp_steps=self.ramp_steps)

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"cost.target: expected a ratio in (0, 1]; got {self.target}")
        if self.hold_steps < 0 or self.ramp_steps < 0 or self.weight < 0:
            raise ValueError("cost.hold_steps, cost.ramp_steps, cost.weight: expected numbers that are not negative")


@dataclass(frozen=True, kw_only=True)
class FrozenRoutersConfig:
    """A last phase at the sparse cost: routers stand still, and each micro-batch runs one sub-network."""

    from_step: int | None = None
    """The phase's first step; null for no such phase. The more micro-batches (ranks x train.accumulation) a step has,
    the more noise levels it sees: aim at 8 or more."""
    tokens: bool = True
    """Token routers stand still too, and skipped tokens are not computed. false: they go on learning, and skipped
    tokens are computed and masked."""

    def __post_init__(self) -> None:
        if self.from_step is not None and self.from_step < 0:
            raise ValueError(f"frozen_routers.from_step: expected a step, or null for no phase; got {self.from_step}")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Density of noise levels in training, shifted."""

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """``logit_normal``: sigmoid(mean + std * normal), as FLUX. ``uniform``: as SiT, as samplers visit the levels."""
    mean: float = 0.0
    """Mean of the normal."""
    std: float = 1.0
    """Its standard deviation."""
    shift: float = 1.0
    """More than 1 trains more on noisy levels; FLUX at 1024² uses e^1.15 = 3.16."""

    def __post_init__(self) -> None:
        if self.density not in ("logit_normal", "uniform"):
            raise ValueError(f"flow.density: expected logit_normal or uniform; got {self.density!r}")
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"flow.std, flow.shift: expected positive numbers; got {self.std} and {self.shift}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation and what is written when."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples per step over all ranks."""
    accumulation: int = 1
    """Micro-batches per step and rank."""
    lr: float = 1e-4
    """Peak learning rate."""
    router_lr: float | None = None
    """Peak learning rate of routers and adapter gates; null for ``lr``."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """AdamW's weight decay (routers have none)."""
    warmup_steps: int = 50
    """Linear warm-up."""
    final_lr: float = 0.02
    """Learning rate at the end of the cosine, as a share of the peak."""
    ema: float | None = 0.999
    """Decay of the averaged weights, which are the ones evaluated and exported; null for none."""
    gradient_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute blocks in the backward pass, for memory. ``selective`` keeps attention and every second product of
    matrices, which are what costs time to make."""
    checkpointed_blocks: int = 1
    """Only every n-th block is recomputed."""
    evaluate_every: int = 50
    """Steps between evaluations on fixed noise; 0 for only at the end."""
    evaluate_samples: int = 256
    """Samples of that evaluation."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Verified checkpoints to keep."""
    keep_every: int = 0
    """Keep the checkpoints of every such step too; 0 for none."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in CPU memory; false stops training meanwhile."""
    save_failures: int = 3
    """So many failed saves in a row end the run; fewer are warned of."""
    sample_every: int = 0
    """Steps between grids of pictures; 0 for none."""
    sample_prompts: tuple[str, ...] = ()
    """Captions of that grid."""
    sample_steps: int = 20
    """Sampler steps of that grid."""
    sample_cfg: float = 1.0
    """Classifier-free guidance of that grid, for undistilled models."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "evaluate_samples", "sample_steps", "keep", "save_failures")
        for name in (*counts, "checkpointed_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: expected 1 or more; got {getattr(self, name)}")
        if self.keep_every < 0:
            raise ValueError(f"train.keep_every: expected a number of steps, or 0 for none; got {self.keep_every}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"train.betas: expected two numbers in [0, 1); got {list(self.betas)}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"train.ema: expected a decay in [0, 1), or null for none; got {self.ema}")
        if self.sample_cfg < 1:
            raise ValueError(f"train.sample_cfg: expected 1 (off) or more; got {self.sample_cfg}")
        if self.lr <= 0 or (self.router_lr is not None and self.router_lr <= 0):
            raise ValueError(
                f"train.lr, train.router_lr: expected positive numbers; got {self.lr} and {self.router_lr}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a training run. ``dynamic: null`` trains the static model."""

    name: str
    run: str
    """Folder of the run."""
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    dynamic: DynamicConfig | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    frozen_routers: FrozenRoutersConfig = field(default_factory=FrozenRoutersConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML file."""
        return _plain(self)

    def __post_init__(self) -> None:
        if self.dynamic is None and self.cost.target < 1:
            raise ValueError(f"cost.target is {self.cost.target}, but dynamic is null: a static model always costs 1")
        if self.dynamic is None and self.adapter.kind == "routers":
            raise ValueError("adapter.kind is routers, but dynamic is null: there are none, and nothing would learn")
        if self.dynamic is None and self.supervision.kind != "none":
            raise ValueError(
                f"supervision.kind is {self.supervision.kind!r}, but dynamic is null: there is nothing to supervise"
            )
        if self.frozen_routers.from_step is not None:
            self._check_frozen(self.frozen_routers.from_step)

    def _check_frozen(self, from_step: int) -> None:
        where, ramped = "frozen_routers.from_step", self.cost.hold_steps + self.cost.ramp_steps
        if self.dynamic is None or not (self.dynamic.heads or self.dynamic.mlp):
            raise ValueError(f"{where} is {from_step}, but no width is dynamic: there are no width routers to freeze")
        if not self.dynamic.always_on:
            raise ValueError(f"{where}: a model without dynamic.always_on may have no head on, and cannot be cut so")
        if self.adapter.variant == "dora":
            raise ValueError(f"{where}: adapter.variant dora cannot be cut to rows and columns; choose plain or rslora")
        if self.engine.name == "zero" and self.engine.zero_stage == 3:
            raise ValueError(
                f"{where}: ranks run different sub-networks, and ZeRO-3 fetches the weights of each layer in an order "
                "that all must share; set engine.name: fsdp, which fetches blocks, or engine.zero_stage: 2"
            )
        if self.engine.compile:
            raise ValueError(f"{where}: engine.compile would compile each sub-network anew; set it to false")
        if not ramped <= from_step < self.train.steps:
            raise ValueError(
                f"{where}: expected a step after the ramp to cost.target, which ends at {ramped} (cost.hold_steps + "
                f"cost.ramp_steps), and before train.steps {self.train.steps}; got {from_step}"
            )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with dotted overrides such as ``train.lr=1e-4``.

    Raises:
        ValueError: no such file, bad YAML, an unknown key (with the likely one), a wrong type, or values that do not
        fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path}: no such file")
    try:
        for text in overrides:
            if "=" not in text:
                raise ValueError(f"override {text!r}: expected key=value, e.g. train.lr=1e-4")
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, OSError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path}: expected a mapping of keys to values")
    return build(Recipe, typing.cast(dict[str, Any], values), where="")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe; :func:`load_recipe` reads it back equal."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(recipe.as_dict())))


def differences(old: dict[str, Any], new: Recipe) -> list[str]:
    """Lines ``key: old -> new`` for every value that differs; ``old`` as in a YAML file, of any release."""
    a, b = _flat(old), flat_values(new)
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def flat_values(recipe: Recipe) -> dict[str, Any]:
    """Its values under dotted keys."""
    return _flat(recipe.as_dict())


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """``cls`` from plain values; errors name the dotted key."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            likely = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {where}{likely[0]}?" if likely else f"known keys: {', '.join(fields)}"
            raise ValueError(f"recipe: unknown key {where}{key}; {hint}")
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"recipe: {where}{missing[0]} is missing")
    return cls(**{key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if isinstance(value, bool):  # YAML reads off and on so, and earlier recipes had nothing else
            value = next((word for word in ("full" if value else "none",) if word in args), value)
        if value not in args:
            raise ValueError(f"recipe: {where}: expected one of {', '.join(map(str, args))}; got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"recipe: {where}: expected keys below it; got {value!r}")
        return build(typing.cast(type, hint), value, f"{where}.")
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a word
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is str and value is None:  # KEY= on the command line
        return ""
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"recipe: {where}: expected {getattr(hint, '__name__', hint)}; got {value!r}")


def _plain(recipe: Recipe) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x

    return plain(dataclasses.asdict(recipe))


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return out
