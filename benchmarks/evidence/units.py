"""One unit of the evidence: a model is trained in one way with one seed, draws, and is measured."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.evidence.controls import BUILDS
from benchmarks.evidence.emoji import pack_emoji, read_captions, write_emoji_base
from benchmarks.evidence.sizes import ROOT, SIZES, Size, Trial
from dydit_scale.data.loader import open_data
from dydit_scale.data.shapes.language import CLASSES
from dydit_scale.data.shapes.motion import MOTIONS
from dydit_scale.dynamic.config import DynamicConfig
from dydit_scale.evaluation.judges import judge_for
from dydit_scale.models.quiet import quiet_libraries
from dydit_scale.models.registry import family_of
from dydit_scale.models.small import small_class_latte_pipeline, small_class_pipeline
from dydit_scale.monitoring.records import read_metrics
from dydit_scale.parallel.world import init_world
from dydit_scale.sampling.generate import generate, sampler_timesteps
from dydit_scale.sampling.speed import machine
from dydit_scale.train.build import build_parts
from dydit_scale.train.loop import train
from dydit_scale.train.objective import Objective, sample_size
from dydit_scale.train.recipe import Recipe, load_recipe
from dydit_scale.train.validation import Validator
from dydit_scale.workflows.base import write_base
from dydit_scale.workflows.launch import call
from dydit_scale.workflows.runs import LoadedRun, load_run, pick_device, sample_config

LONGER = 4
"""Times the steps of what is trained for longer."""
DISTILL = "supervision.kind=distill"
STATIC = ("dynamic=null", "cost.target=1", "supervision.kind=none", "adapter.kind=none", "supervision.guidance=1")


class Variant(NamedTuple):
    """A way to train."""

    title: str
    overrides: tuple[str, ...] = (DISTILL,)
    base: str = "base"
    """Or ``narrow``."""
    build: str = ""
    """One of controls.BUILDS."""
    longer: int = 1
    """Times the steps of the others."""


def dynamic(target: float, *more: str) -> tuple[str, ...]:
    """Overrides of a dynamic run."""
    return (f"cost.target={target}", DISTILL, *more)


VARIANTS: dict[str, Variant] = {
    "base": Variant("base, untouched", STATIC),
    "static": Variant("base, fine-tuned equally long", STATIC),
    "narrow": Variant("narrow static model, trained as the base, then fine-tuned", STATIC, base="narrow"),
    "uniform": Variant(
        "uniform width, magnitude-ranked", dynamic(0.5, "dynamic.tokens=false", "cost.weight=0"), build="uniform"
    ),
    "random": Variant("random routers", dynamic(0.5, "cost.weight=0"), build="random"),
    "width": Variant("dynamic, width only", dynamic(0.5, "dynamic.tokens=false")),
    "tokens": Variant("dynamic, tokens only", dynamic(0.5, "dynamic.heads=false", "dynamic.mlp=false")),
    "dynamic-0.7": Variant("dynamic, lambda 0.7", dynamic(0.7)),
    "dynamic-0.5": Variant("dynamic, lambda 0.5", dynamic(0.5)),
    "dynamic-0.3": Variant("dynamic, lambda 0.3", dynamic(0.3)),
    "complete": Variant("dynamic, with the complete model", ("cost.target=0.5", "supervision.kind=complete")),
    "alone": Variant("dynamic, data alone", ("cost.target=0.5", "supervision.kind=none")),
}
"""Those of the first claim; the title says what a table calls it. Where none is named, lambda is 0.5 and the frozen
base teaches."""
for _tau in (2, 5):
    VARIANTS[f"tau-{_tau}"] = Variant(f"temperature {_tau}", dynamic(0.5, f"dynamic.temperature={_tau}"))
for _experts in (1, 2, 4, 8):
    VARIANTS[f"td-lora-{_experts}"] = Variant(
        f"TD-LoRA, {_experts} expert{'s' if _experts > 1 else ''}",
        dynamic(0.5, "adapter.kind=td_lora", f"adapter.experts={_experts}", "adapter.rank=RANK", "train.lr=4e-3"),
    )
for _name in ("static", "uniform", "dynamic-0.5"):
    VARIANTS[f"{_name}-long"] = VARIANTS[_name]._replace(
        title=f"{VARIANTS[_name].title}, {LONGER} times the steps", longer=LONGER
    )
VARIANTS["lora"] = Variant("plain LoRA", dynamic(0.5, "adapter.kind=lora", "adapter.rank=RANK", "train.lr=4e-3"))


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time."""

    trial: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.trial}-{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Place:
    """Where the evidence of one size is made."""

    out: Path
    size_name: str

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def trial(self, name: str) -> Path:
        """Data and bases of a family."""
        return self.out / name

    def run(self, unit: Unit) -> Path:
        """The training run."""
        return self.out / "runs" / unit.name

    def record(self, unit: Unit) -> Path:
        """What was measured."""
        return self.out / "units" / f"{unit.name}.json"

    def more(self, name: str) -> Path:
        """What was measured of units once they were there."""
        return self.out / "more" / f"{name}.json"

    def pictures(self, unit: Unit) -> Path:
        """What was drawn: arr_0 uint8."""
        return self.out / "pictures" / f"{unit.name}.npz"


STAGES = {"shards": ("shards",), "held-out": ("held-out",), "bases": ("base", "narrow")}
"""What families need before their units run; the parts of a stage are made side by side."""


def parts_of(trial: Trial) -> tuple[str, ...]:
    """Which of those parts a family has."""
    if not trial.base_steps:  # the base ships with the repository, and a narrow one would take as long to train
        return ("shards", "held-out")
    return ("shards", "held-out", "base") if trial.emoji else ("shards", "held-out", "base", "narrow")


def prepare(place: Place, name: str, part: str) -> None:
    """Make a part of :data:`STAGES`, unless it is there; it appears when it is whole.

    Raises ValueError if it was made with other settings.
    """
    trial, folder = place.size.trials[name], place.trial(name)
    done, new, note = folder / part, folder / f"{part}.new", folder / f"{part}.json"
    made = {key: getattr(trial, key) for key in ("recipe", "data", "samples", "base_steps", "base_batch")}
    made = json.loads(json.dumps({**made, "held_out": place.size.held_out}))
    if done.exists():
        if (before := json.loads(note.read_text())["settings"]) != made:
            raise ValueError(f"{done} was made with {before}, now {made} are asked for: choose another OUT")
        return
    began = time.monotonic()
    shutil.rmtree(new, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if part in ("shards", "held-out"):
        _write_data(place, trial, part, new)
    else:
        _train_base(trial, folder, part, new)
    note.write_text(json.dumps({"seconds": round(time.monotonic() - began, 1), "settings": made}, indent=1))
    new.rename(done)


def _write_data(place: Place, trial: Trial, part: str, out: Path) -> None:
    if trial.emoji:
        return pack_emoji(out, held_out=part == "held-out")
    count, seed = (trial.samples, 0) if part == "shards" else (place.size.held_out, 1)
    call("dydit", "data", "shapes", out, *trial.data, "--samples", str(count), "--seed", str(seed))


def _train_base(trial: Trial, folder: Path, part: str, out: Path) -> None:
    """Train the static base, or the narrow one, as the recipe of the demo's base does."""
    untrained = folder / f"{part}-untrained"
    shutil.rmtree(untrained, ignore_errors=True)
    if trial.emoji:
        write_emoji_base(folder / "shards", untrained)
    elif part == "base":
        write_base(untrained, trial.family)
    else:
        _narrow(trial).save_pretrained(untrained)
    call(
        "python", "recipes/shapes/make_base.py", f"recipes/{trial.recipe}.yaml", out, *trial.options, *STATIC,
        f"data.path={folder / 'shards'}", f"model.base={untrained}",
        "model.from_scratch=true", "engine.name=single",
        f"train.steps={trial.base_steps}", f"train.batch_size={trial.base_batch}", "train.ema=0.995",
        "train.lr=2e-3", "train.warmup_steps=50", "train.sample_every=0",
    )  # fmt: skip


def _narrow(trial: Trial, target: float = 0.5) -> Any:
    """The pipeline of the static model whose heads are so much narrower that it costs nearest to ``target``."""

    def make(head_dim: int) -> Any:
        if trial.video:
            return small_class_latte_pipeline(list(MOTIONS), head_dim=head_dim)
        return small_class_pipeline([s.phrase() for s in CLASSES], kind=trial.family, head_dim=head_dim)

    full = _macs(trial, make(16))
    head_dim = min(range(8, 16), key=lambda dim: abs(_macs(trial, make(dim)) / full - target))
    return make(head_dim)


def _macs(trial: Trial, pipeline: Any) -> float:
    """MACs of the static model for one sample."""
    recipe = load_recipe(ROOT / f"recipes/{trial.recipe}.yaml", trial.options)
    family = family_of(pipeline)
    off = DynamicConfig(heads=False, mlp=False, tokens=False)
    network = family.dynamic_class.from_static(pipeline.transformer, off)
    return float(family.cost(network, pipeline, sample_size(recipe), recipe.model.text_tokens).static)


def recipe_of(place: Place, unit: Unit) -> Recipe:
    """The recipe that the unit trains."""
    trial, variant = place.size.trials[unit.trial], VARIANTS[unit.variant]
    steps = trial.steps * variant.longer
    overrides = [
        *trial.options, *variant.overrides, f"run={place.run(unit)}", f"seed={unit.seed}",
        f"data.path={place.trial(unit.trial) / 'shards'}", "engine.name=single", f"train.steps={steps}",
        f"train.batch_size={trial.batch}", f"train.warmup_steps={max(1, steps // 16)}", "train.ema=0.98",
        f"cost.ramp_steps={steps // 3}", "train.evaluate_every=0", "train.sample_every=0",
        "train.evaluate_samples=4", "train.save_every=0",
    ]  # fmt: skip
    if trial.base_steps or variant.base != "base":
        overrides.append(f"model.base={place.trial(unit.trial) / variant.base}")
    if "adapter.rank=RANK" in overrides:
        place_of = overrides.index("adapter.rank=RANK")
        overrides[place_of] = f"adapter.rank={equal_rank(trial, overrides)}"
    return load_recipe(ROOT / f"recipes/{trial.recipe}.yaml", overrides)


def equal_rank(trial: Trial, overrides: Sequence[str]) -> int:
    """The rank whose adapter has the number of parameters nearest to that of TD-LoRA with the recipe's rank and
    experts."""
    own = [o for o in overrides if not o.startswith(("adapter.rank", "data.path", "run="))]
    wanted = _adapter_size(trial, [*own, "adapter.kind=td_lora", "adapter.experts=4", "adapter.rank=16"])
    sizes = [_adapter_size(trial, [*own, f"adapter.rank={rank}"]) for rank in (1, 2)]
    each = sizes[1] - sizes[0]
    return max(1, round((wanted - (sizes[0] - each)) / each))


def _adapter_size(trial: Trial, overrides: Sequence[str]) -> int:
    network = build_parts(load_recipe(ROOT / f"recipes/{trial.recipe}.yaml", overrides)).network
    return adapter_parameters(network)


def adapter_parameters(network: Any) -> int:
    """Numbers that learn, but for the routers."""
    return sum(p.numel() for n, p in network.named_parameters() if p.requires_grad and ".dy_" not in f".{n}")


def run_unit(place: Place, unit: Unit) -> dict[str, Any]:
    """Train, draw and measure, unless it was done; the record is what the pages are made of."""
    quiet_libraries()
    init_world()
    began, done = time.monotonic(), place.record(unit)
    recipe, variant, trial = recipe_of(place, unit), VARIANTS[unit.variant], place.size.trials[unit.trial]
    digest = settings_digest(recipe, place, unit)
    if done.is_file() and (record := json.loads(done.read_text()))["settings"] == digest:
        return record
    if unit.variant == "base":
        found = _untouched(recipe, place, unit, trial)
    else:
        found = _trained(recipe, variant, place, unit, trial)
    record = {
        "trial": unit.trial, "variant": unit.variant, "seed": unit.seed, "settings": digest, **found,
        "seconds": round(time.monotonic() - began, 1), **machine(),
    }  # fmt: skip
    done.parent.mkdir(parents=True, exist_ok=True)
    aside = done.with_suffix(".new")
    aside.write_text(json.dumps(record, indent=1))
    os.replace(aside, done)
    return record


def settings_digest(recipe: Recipe, place: Place, unit: Unit) -> str:
    """Of everything that decides what a unit with this recipe measures, wherever its files lie."""
    values = recipe.as_dict()
    del values["run"], values["data"]["path"], values["model"]["base"]
    decides = [values, asdict(place.size.trials[unit.trial]), unit.variant]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _untouched(recipe: Recipe, place: Place, unit: Unit, trial: Trial) -> dict[str, Any]:
    """The base, measured with the unit's noise."""
    parts = build_parts(recipe)
    parts.pipeline.to(pick_device("auto"))
    network = parts.network.eval()
    run = LoadedRun(place.run(unit), recipe, parts.pipeline, network, None)  # type: ignore[arg-type]
    return {**held_out(run, place, unit), **draw(run, place, unit, trial)}


def _trained(recipe: Recipe, variant: Variant, place: Place, unit: Unit, trial: Trial) -> dict[str, Any]:
    shutil.rmtree(recipe.run, ignore_errors=True)
    build = BUILDS.get(variant.build, build_parts)
    began = time.monotonic()
    train(recipe, init_world(), build=build)
    seconds = time.monotonic() - began
    records = read_metrics(Path(recipe.run) / "metrics.jsonl")
    steps = [r["ratio"] for r in records if "ratio" in r][-max(1, recipe.train.steps // 8) :]
    run = load_run(recipe.run, build=build)
    found = held_out(run, place, unit)
    if variant.base == "narrow":
        found["ratio"] = _macs(trial, run.pipeline) / _macs(trial, _full_base(place, unit))
    return {
        **found,
        "ratio_training": float(np.mean(steps)),
        "train_seconds": round(seconds, 1),
        "learns": adapter_parameters(build(recipe).network),
        **draw(run, place, unit, trial),
    }


@torch.no_grad()
def held_out(run: LoadedRun, place: Place, unit: Unit) -> dict[str, float]:
    """Denoising error and cost ratio, gates by threshold, on samples that no model has seen."""
    shards = str(place.trial(unit.trial) / "held-out")
    recipe = replace(
        run.recipe,
        data=replace(run.recipe.data, path=shards),
        train=replace(run.recipe.train, evaluate_samples=place.size.held_out),
    )
    device = next(run.network.parameters()).device
    objective = Objective(recipe, run.network, run.pipeline, None, device)
    found = Validator(recipe, open_data(recipe.data), objective, init_world()).evaluate(run.network)
    return {"ratio": found.ratio_eval, "mse": found.mse_eval}


def _full_base(place: Place, unit: Unit) -> Any:
    recipe = recipe_of(place, Unit(unit.trial, "static", unit.seed))
    return build_parts(recipe).pipeline


def draw(run: LoadedRun, place: Place, unit: Unit, trial: Trial) -> dict[str, Any]:
    """Pictures of the judge's prompts by the packed model, kept, and the judge's score."""
    config = sample_config(run, steps=trial.sampler_steps, cfg=trial.cfg, batch=48, seed=unit.seed)
    judge = judge_for(reads_text=family_of(run.pipeline).reads_text, video=config.frames > 1)
    prompts = read_captions(place.trial(unit.trial), trial.pictures) if trial.emoji else judge.prompts(trial.pictures)
    if run.recipe.dynamic is not None:
        run.network.pack(sampler_timesteps(run.pipeline, config))
    with torch.no_grad():
        pictures = generate(run.pipeline, prompts, config)
    file = place.pictures(unit)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, arr_0=pictures, prompts=np.array(prompts))
    if trial.emoji:
        return {"pictures": len(pictures)}
    return {"score": judge.score(pictures, prompts)["overall"], "pictures": len(pictures)}
