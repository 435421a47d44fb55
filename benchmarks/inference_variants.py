"""The ways to run one model that benchmarks/inference.py sets beside each other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference_masks import Shares, TokenThresholds, set_width
from benchmarks.inference_peers import (
    EveryOther,
    Skipped,
    blocks_of,
    cache_config,
    cacheable,
    counted_macs,
    twin_of,
    watched_blocks,
    with_fixed_k,
    with_merged_tokens,
)
from benchmarks.inference_sizes import Size
from dydit_scale.dynamic.capacity import TokenCapacity
from dydit_scale.dynamic.cost import KeepRates, ModelCost
from dydit_scale.dynamic.masks import DynamicMasks
from dydit_scale.dynamic.packing import shallow
from dydit_scale.models.plan import PackedPlan, RunState, TokenPlan
from dydit_scale.sampling.execution import Execution

VARIANTS = {
    "static": "static, diffusers' class",
    "open": "ours, all gates open",
    "open-packed": "ours, all gates open, packed",
    "masked": "masked, as released",
    "width": "packed, width only",
    "tokens": "packed, tokens only",
    "both": "packed, both",
    "capacity": "packed, both, fixed capacity",
    "fused": "packed, both, fixed capacity, fused tokens",
    "int8": "packed, both, int8 copies",
    "static-compile": "static, torch.compile",
    "compile": "packed, fixed capacity, torch.compile",
    "static-cudagraphs": "static, CUDA graphs",
    "cudagraphs": "packed, fixed capacity, CUDA graphs",
    "static-fbc": "static, FirstBlockCache",
    "both-fbc": "packed, both, FirstBlockCache",
    "static-taylor": "static, TaylorSeer",
    "both-taylor": "packed, both, TaylorSeer",
    "static-mag": "static, MagCache",
    "both-mag": "packed, both, MagCache",
    "fixed-k": "static, fixed k tokens in each MLP",
    "tomesd": "static, tokens merged by tomesd",
}
"""What can be measured, and what tables call it."""
COMPILED = ("static-compile", "compile", "static-cudagraphs", "cudagraphs")
PACKED = ("open-packed", "width", "tokens", "both", "fused", "int8", "compile", "cudagraphs")
"""Those with copies of their own, and"""
OWNER = {name: "both" for name in ("capacity", "both-fbc", "both-taylor", "both-mag")}
"""those that run the copies of another one."""
ON_REQUEST = ("int8",)
"""Not for speed."""
FEW_STEPS = (
    "static", "open", "open-packed", "both", "capacity", *COMPILED, "static-fbc", "both-fbc", "static-taylor",
    "both-taylor",
)  # fmt: skip
"""Of a four-step sampler. MagCache is not among them: it needs magnitudes that were measured on such a model."""
Inputs = list[dict[str, Any]]


@dataclass
class Routed:
    """A dynamic model, its token thresholds, and the masks that it really uses, step by step."""

    model: Any
    cost: ModelCost
    thresholds: TokenThresholds | None
    masks: list[DynamicMasks] = field(default_factory=list)
    _of: Inputs | None = None

    def before(self, step: int) -> None:
        """Precedes the forward of a step."""
        if self.thresholds is not None:
            self.thresholds.set(step)

    @torch.no_grad()
    def collect(self, inputs: Inputs) -> None:
        """Take down the masks of every step, if they are not those of these inputs already."""
        if self._of is inputs:
            return
        self.masks.clear()
        for step, x in enumerate(inputs):
            self.before(step)
            self.masks.append(DynamicMasks(*(m.cpu() for m in self.model(**x, collect=True).masks)))
        self._of = inputs

    def macs_of(self, inputs: Inputs) -> float:
        """MACs of a sample of these inputs over all steps."""
        self.collect(inputs)
        return self.macs()

    def macs(self, ran: list[list[int]] | None = None) -> float:
        """MACs of a sample over all steps; ``ran`` names the blocks that each step computed (None: all)."""
        total = 0.0
        for step, masks in enumerate(self.masks):
            blocks = range(len(self.cost.blocks)) if ran is None else ran[step]
            rates = KeepRates(*(rate[list(blocks)] for rate in masks.keep_rates()))
            part = replace(self.cost, blocks=tuple(self.cost.blocks[i] for i in blocks))
            total += float(part.dynamic(rates).mean())
        return total


@dataclass(frozen=True)
class Packed:
    """What is told of a model's plan; the plan itself would keep copies alive that a cache has had cut anew."""

    run: RunState = field(default_factory=RunState)
    bytes: int = 0
    stored: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: PackedPlan | None) -> Packed:
        return cls() if plan is None else cls(plan.run, plan.bytes, {**plan.stored})


@dataclass(kw_only=True)
class Setting:
    """What all variants of one comparison share; models are made when they are first asked for."""

    size: Size
    static: Any
    draw: Callable[..., Inputs]
    """The inputs of the picture of a number, one dict a step."""
    timesteps: Tensor
    shares: Shares
    target: float
    """The cost ratio that the shares were drawn for, which peers are set to as well."""
    few: bool = False
    max_bytes: int | None = None
    """What the copies of a packed variant may take, the same for all: they are to be stored alike."""
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def steps(self) -> int:
        """Measured."""
        return len(self.timesteps)

    @cached_property
    def inputs(self) -> Inputs:
        """Of the picture that token thresholds are found with, and first runs draw."""
        return self.draw(0)

    @cached_property
    def open_model(self) -> Any:
        """Ours, never packed."""
        return self.size.make_dynamic(self.static)

    @cached_property
    def cost(self) -> ModelCost:
        """Of the static model and, with routers, of ours."""
        return self.size.cost()

    @cached_property
    def both(self) -> Routed:
        """Packed; the variants with a cache share it, for plans are large and hooks come and go."""
        return self.routed()

    def pack(self, model: Any, **options: Any) -> Any:
        """The plan of a model packed for the steps.

        Raises:
            Skipped: its copies would take more than they may.
        """
        try:
            return model.pack(self.timesteps, max_bytes=self.max_bytes, **options)
        except ValueError as error:
            raise Skipped(str(error)) from error

    @torch.no_grad()
    def routed(self, *, packed: bool = True, **dynamic: bool) -> Routed:
        """A dynamic model whose routers follow the shares; ``dynamic`` says what of it is dynamic."""
        model = self.size.make_dynamic(self.static, **dynamic)
        set_width(model, self.shares, self.timesteps)
        if packed:
            self.pack(model)
        thresholds = TokenThresholds(model, self.steps) if model.dynamic.tokens else None
        if thresholds is not None:
            thresholds.fit(lambda step: model(**self.inputs[step]), self.shares.tokens)
        routed = Routed(model, self.size.cost(model), thresholds)
        routed.collect(self.inputs)
        return routed


@dataclass(kw_only=True)
class Variant:
    """One way to run the steps of a sampler."""

    name: str
    model: Any
    macs: float
    """Of one sample, all steps, of the first picture."""
    macs_from: str = "cost model"
    """Or: blocks that ran (and the cost model), FlopCounterMode."""
    beside: str = "static"
    """The variant that ideal and realised compare with."""
    before: Callable[[int], None] = lambda step: None
    """Precedes the forward of a step and is timed with it."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of the forward."""
    cache: Any = None
    """Enabled around each run."""
    blocks_computed: float = 1.0
    """The share of blocks that ran, over all steps."""
    macs_of: Callable[[Inputs], float] | None = None
    """The same of other pictures; None: it is the same for all."""
    packed: Packed = field(default_factory=Packed)
    execution: Execution | None = None
    """What compiled or captured it."""
    follow: Callable[[], None] = lambda: None
    """Precedes a run, and is not timed with it."""

    def check_name(self) -> None:
        """Skipped if forwards ran masked, or op by op: the row would not be what it is called."""
        if self.packed.run.fallback is not None:
            raise Skipped(f"some forwards ran masked: {self.packed.run.fallback}")
        if self.execution is not None and self.execution.op_by_op is not None:
            raise Skipped(f"some forwards ran op by op: {self.execution.op_by_op}")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around a run: the cache is enabled and empty, and gone afterwards."""
        self.follow()
        if self.cache is None:
            yield
            return
        if isinstance(threshold := getattr(self.cache, "threshold", None), EveryOther):
            threshold.exceeded = False
        self.model.enable_cache(self.cache)
        try:
            yield
        finally:
            self.model.disable_cache()
            gc.collect()  # hooks and blocks hold each other, and the blocks their packed weights

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Tensor:
        """The forwards of all steps; the last one's sample. Conditions are new tensors, as those of a new picture."""
        new = {id(v): v.clone() for v in inputs[0].values() if isinstance(v, Tensor)}
        for step, x in enumerate(inputs):
            self.before(step)
            latents, rest = x["hidden_states"], {k: new.get(id(v), v) for k, v in x.items() if k != "hidden_states"}
            with nullcontext() if self.cache is None else self.model.cache_context("cond", step_index=step):
                out = self.model(latents, **rest, **self.options, return_dict=False)[0]  # tomesd reads the first one
        return out


def build(name: str, setting: Setting) -> Variant:
    """The variant of that name.

    Raises:
        Skipped: it does not apply to this model, or something that it needs is not there.
    """
    static = {"name": name, "macs": setting.steps * setting.cost.static}
    if name == "static":
        return Variant(model=setting.static, **static)
    if name == "open":
        return Variant(model=setting.open_model, options={"gates": "open"}, **static)
    if name == "open-packed":
        model = setting.size.make_dynamic(setting.static, tokens=False)
        return Variant(model=model, packed=Packed.of(setting.pack(model)), **static)
    if name in ("static-compile", "static-cudagraphs"):
        twin = twin_of(setting.static)
        twin.compile(dynamic=False, mode="reduce-overhead" if name == "static-cudagraphs" else None)
        return Variant(model=twin, **static)
    if name in ("masked", "width", "tokens", "both"):
        return _routed(name, setting)
    if name in ("capacity", "fused", "compile", "cudagraphs"):
        return _with_capacity(name, setting)
    if name == "int8":
        routed = setting.routed(packed=False)
        setting.pack(routed.model, weights="int8")
        return _of(name, routed)
    if name == "fixed-k":
        return _counted(name, with_fixed_k(setting.static, setting.cost, setting.size.tokens, setting.target), setting)
    if name == "tomesd":
        return _counted(name, with_merged_tokens(setting.static, setting.target), setting)
    base, _, kind = name.partition("-")
    return _cached(name, setting, base, cache_config(kind, setting.steps, few=setting.few))


def _routed(name: str, setting: Setting) -> Variant:
    if name == "both":
        return _of(name, setting.both)
    if name == "masked":
        return _of(name, setting.routed(packed=False))
    off = {"width": {"tokens": False}, "tokens": {"heads": False, "mlp": False}}[name]
    return _of(name, setting.routed(**off))


def _of(name: str, routed: Routed, **others: Any) -> Variant:
    plan = routed.model._plan
    varies = routed.thresholds is not None and (plan is None or plan.tokens.counts is None)
    return Variant(name=name, model=routed.model, macs=routed.macs(), before=routed.before, packed=Packed.of(plan),
                   macs_of=routed.macs_of if varies else None, **others)  # fmt: skip


def _with_capacity(name: str, setting: Setting) -> Variant:
    both = setting.both
    both.collect(setting.inputs)
    capacity = TokenCapacity.from_masks(setting.timesteps.tolist(), both.masks)
    model = shallow(both.model)  # with its routers, which follow the same thresholds
    others: dict[str, Any] = {}
    if name == "capacity":
        counts = capacity.at(setting.timesteps, len(setting.cost.blocks), model.timestep_tolerance).tolist()
        run = RunState()

        def follow_both() -> None:  # with its weights too, wherever they are: a cache packs them anew
            object.__setattr__(model, "_plan", replace(both.model._plan, tokens=TokenPlan(counts), run=run))

        follow_both()
        others = {"follow": follow_both}
    else:
        kinds = {"kernel_layout": name != "compile", "fused_tokens": name == "fused"}
        fused = setting.pack(model, capacity=capacity, **kinds).fused_tokens
        if fused is not None and not fused.fused:
            raise Skipped(f"no MLP runs in the fused kernels: {fused.reason}")
    routed = Routed(model, both.cost, both.thresholds)
    routed.collect(setting.inputs)
    if name in ("capacity", "fused"):
        return _of(name, routed, **others)
    execution = setting.stack.enter_context(Execution(routed.model, backend=name))
    return _of(name, routed, beside=f"static-{name}", execution=execution)


def _cached(name: str, setting: Setting, base: str, cache: Any) -> Variant:
    if len(setting.cost.blocks) == 1:
        raise Skipped("a cache of blocks needs two of them")
    if base == "static":
        ones = DynamicMasks(*(torch.ones(len(setting.cost.blocks), 1, 1) for _ in range(3)))
        without = replace(setting.cost, blocks=tuple(replace(b, router=0) for b in setting.cost.blocks))
        routed = Routed(cacheable(setting.static), without, None, [ones] * setting.steps)
        variant = Variant(name=name, model=routed.model, macs=routed.macs(), cache=cache)
    else:
        routed = setting.both
        routed.collect(setting.inputs)
        variant = _of(name, routed, cache=cache)
    ran = _blocks_that_run(variant, setting.inputs)
    computed = sum(map(len, ran)) / (setting.steps * len(setting.cost.blocks))

    def macs_of(inputs: Inputs) -> float:
        if base == "both":
            routed.collect(inputs)
        # Every second step is left out of all pictures; diffusers' defaults may decide by what is in them.
        return routed.macs(_blocks_that_run(variant, inputs) if setting.few else ran)

    return replace(variant, macs=routed.macs(ran), macs_of=macs_of, macs_from="blocks that ran",
                   blocks_computed=computed)  # fmt: skip


def _blocks_that_run(variant: Variant, inputs: Inputs) -> list[list[int]]:
    """The blocks that each step computes of a picture."""
    starts: list[int] = []
    with watched_blocks(variant.model) as ran:

        def before(step: int) -> None:
            starts.append(len(ran))
            variant.before(step)

        with variant.ready():
            replace(variant, before=before).run(inputs)
    steps = [ran[start:end] for start, end in zip(starts, [*starts[1:], len(ran)], strict=True)]
    everything = list(range(len(blocks_of(variant.model))))
    assert steps[0] == everything, f"{variant.name}: the first step computed {steps[0]}"
    return steps


def _counted(name: str, model: Any, setting: Setting) -> Variant:
    variant = Variant(name=name, model=model, macs=0.0, macs_from="FlopCounterMode")
    rows = len(setting.inputs[0]["hidden_states"])
    macs = setting.steps * counted_macs(lambda: variant.run(setting.inputs[:1])) / rows
    return replace(variant, macs=macs)
