"""The training loop. It never asks which engine it has."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dydit_scale.checkpoint.folder import has_checkpoints
from dydit_scale.checkpoint.state import capture, engine_name, restore
from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint
from dydit_scale.checkpoint.writer import CheckpointWriter
from dydit_scale.data.loader import Batch, make_loader
from dydit_scale.data.shards import ShardIndex, load_index
from dydit_scale.dynamic.losses import cost_loss
from dydit_scale.models.family import frozen_parts
from dydit_scale.models.loading import base_digest
from dydit_scale.models.registry import family_of
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import AdamWConfig, Engine, StepResult, make_engine
from dydit_scale.parallel.reduce import global_mean, mean_values
from dydit_scale.parallel.world import World, broadcast_object
from dydit_scale.train.build import build_parts, param_groups, shard_units
from dydit_scale.train.checks import check_batch, check_data, check_same
from dydit_scale.train.gates import GateLog, make_gate_log
from dydit_scale.train.metrics import Metrics
from dydit_scale.train.objective import Objective, Terms, make_process
from dydit_scale.train.recipe import Recipe, build, differences, save_recipe
from dydit_scale.train.recompute import checkpoint_function
from dydit_scale.train.validation import Validator

MAX_REFUSED = 10
"""Steps in a row whose gradients may be infinite or not a number before the run gives up."""


def lr_scale(step: int, *, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then half a cosine from 1 to ``final`` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class Run:
    """Everything alive in a run."""

    recipe: Recipe
    world: World
    folder: Path
    index: ShardIndex
    engine: Engine
    ema: Ema | None
    objective: Objective
    validator: Validator
    gates: GateLog | None
    metrics: Metrics | None
    writer: CheckpointWriter
    base: str
    """Digest of the base's weights, which a checkpoint belongs to."""
    start: tuple[int, int]
    """Step and consumed samples at which this process took over."""
    step: int
    refused: int = 0

    @property
    def consumed(self) -> int:
        """Samples that whole steps have used: the position in the data."""
        step, consumed = self.start
        return consumed + (self.step - step) * self.recipe.train.batch_size


def train(recipe: Recipe, world: World, *, resume: bool = False) -> Path:
    """Train to the recipe's last step and return the run's folder. Collective: every rank calls it.

    Raises:
        ValueError: something in the recipe, the data or the base does not fit (before the first step), or the run's
            folder holds checkpoints and ``resume`` is false.
    """
    run = start(recipe, world, resume=resume)
    batches = _batches(run)
    while run.step < recipe.train.steps:
        began = time.perf_counter()
        record = train_step(run, list(islice(batches, recipe.train.accumulation)))
        record["seconds"] = time.perf_counter() - began
        record["samples_per_second"] = recipe.train.batch_size / record["seconds"]
        if run.metrics:
            run.metrics.step(record)
        run.step += 1
        _look(run)
    if run.metrics:
        run.metrics.close()
    return run.folder


def train_step(run: Run, batches: list[Batch]) -> dict[str, Any]:
    """One optimiser step over this rank's micro-batches; returns its record, averaged over ranks."""
    recipe, engine, step = run.recipe, run.engine, run.step
    target = recipe.cost.schedule.at(step)
    engine.network.train()
    sums = {"loss": 0.0, "loss_flow": 0.0, "loss_supervision": 0.0, "loss_cost": 0.0, "ratio": 0.0}
    for n, batch in enumerate(batches):
        with engine.forward_context():
            terms = _terms(run, batch)
            parts = _reduce(terms, recipe, target)
        engine.backward(parts["loss"] / len(batches), last=n == len(batches) - 1)
        for key in sums:
            sums[key] += float(parts[key].detach()) / len(batches)
    scale = lr_scale(step, steps=recipe.train.steps, warmup=recipe.train.warmup_steps, final=recipe.train.final_lr)
    result = engine.step(scale)
    if run.ema is not None and result.applied:
        run.ema.update()
    _count_refused(run, result)
    means = mean_values(sums)
    return {"step": step, **means, "target": target, "lr": recipe.train.lr * scale, "grad_norm": result.grad_norm}


def start(recipe: Recipe, world: World, *, resume: bool) -> Run:
    """Check everything that can be checked, then build the run and, on resume, restore its newest good checkpoint."""
    folder = Path(recipe.run)
    index = load_index(Path(recipe.data.path))
    check_batch(recipe, world)
    check_data(recipe, index)
    checkpoint = _find_checkpoint(folder, recipe, world, resume=resume)
    base = base_digest(recipe.model.base)
    if checkpoint is not None:
        check_same(checkpoint, folder, data=index.digest, base=base)
    parts = build_parts(recipe)
    if recipe.train.gradient_checkpointing != "none":
        function = checkpoint_function(
            parts.network, shard_units(parts.network), recipe.train.gradient_checkpointing,
            recipe.train.checkpointed_blocks,
            carry_timestep=recipe.dynamic is None and recipe.adapter.kind == "td_lora",
        )  # fmt: skip
        parts.network.enable_gradient_checkpointing(function)
    gates = make_gate_log(parts.network, make_process(recipe, family_of(parts.pipeline)), folder)
    groups = param_groups(recipe, parts.network)
    adamw = AdamWConfig(betas=recipe.train.betas)
    for part in frozen_parts(parts.pipeline):
        part.to(world.device)
    engine = make_engine(
        recipe.engine, parts.network, groups, world,
        shard_units=shard_units(parts.network), accumulation=recipe.train.accumulation, adamw=adamw,
    )  # fmt: skip
    ema = Ema(engine, recipe.train.ema) if recipe.train.ema is not None else None
    step, consumed = 0, 0
    if checkpoint is not None:
        restore(checkpoint, engine, ema)
        step, consumed = checkpoint.step, checkpoint.meta["consumed"]
    objective = Objective(recipe, parts.network, parts.pipeline, parts.teacher, world.device)
    validator = Validator(recipe, index, objective, world)
    metrics = None
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, folder / "recipe.yaml")
        metrics = Metrics(folder, name=recipe.name, steps=recipe.train.steps, first_step=step)
        metrics.say(_summary(recipe, engine, groups, index, step))
    writer = _writer(recipe, world, metrics)
    writer.start()
    at = (step, consumed)
    return Run(recipe, world, folder, index, engine, ema, objective, validator, gates, metrics, writer, base, at, step)


def _writer(recipe: Recipe, world: World, metrics: Metrics | None) -> CheckpointWriter:
    train = recipe.train
    return CheckpointWriter(
        Path(recipe.run) / "checkpoints", world, engine=engine_name(recipe.engine), keep=train.keep,
        keep_every=train.keep_every, failures=train.save_failures, asynchronous=train.async_save,
        tell=metrics.checkpoint if metrics else lambda report: None,
    )  # fmt: skip


def _terms(run: Run, batch: Batch) -> Terms:
    places = batch.positions - run.consumed
    levels = run.objective.training_levels(run.step, places)
    inputs = run.objective.prepare(batch, levels, run.recipe.seed, unprompted=run.objective.guided)
    return run.objective.terms(run.engine.module, inputs, batch.positions, run.step)


def _reduce(terms: Terms, recipe: Recipe, target: float) -> dict[str, torch.Tensor]:
    flow, supervision = terms.flow.mean(), terms.supervision.mean()
    ratio = global_mean(terms.ratio.mean())
    cost = cost_loss(ratio, target)
    weight = recipe.cost.weight if recipe.dynamic is not None else 0.0
    loss = flow + recipe.supervision.weight * supervision + weight * cost
    return {"loss": loss, "loss_flow": flow, "loss_supervision": supervision, "loss_cost": cost, "ratio": ratio}


def _look(run: Run) -> None:
    """After a step: evaluate, sample and save where the recipe says so, and at the end."""
    train, last = run.recipe.train, run.step == run.recipe.train.steps
    due = {
        n: last or (every > 0 and run.step % every == 0)
        for n, every in (("eval", train.evaluate_every), ("save", train.save_every))
    }
    draw = bool(train.sample_prompts) and train.sample_every > 0 and (last or run.step % train.sample_every == 0)
    if due["save"]:
        _save(run, must=last)
    if due["eval"] or draw:
        run.engine.network.eval()
        with _averaged(run), torch.no_grad(), run.engine.forward_context():
            evaluation = _evaluate(run) if due["eval"] else None
            grid = run.validator.sample() if draw else None
        if run.metrics and grid is not None:
            _write_grid(run.metrics, run.folder / "samples" / f"step-{run.step:07d}.png", grid)
        if run.metrics and evaluation:
            run.metrics.evaluation({"step": run.step - 1, **evaluation})


def _evaluate(run: Run) -> dict[str, float]:
    """Loss and cost on fixed noise, and what the adapter's gates do. Collective."""
    found: dict[str, float] = run.validator.evaluate(run.engine.module)._asdict()
    if run.gates is not None:
        gathered = run.engine.gather(run.engine.local_parameters(), run.gates.parameters)
        if run.metrics:
            try:
                found |= run.gates.evaluate(gathered, run.step)
            except OSError as error:
                run.metrics.say(f"warning: {run.gates.folder} was not written: {error}; training goes on")
    return found


def _write_grid(metrics: Metrics, path: Path, grid: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).save(path)
    except OSError as error:
        metrics.say(f"warning: {path} was not written: {error}; training goes on")


def _save(run: Run, *, must: bool) -> None:
    """Start to write a checkpoint; a failure (a full disk, say) is told and survived, unless it is one too many.

    ``must``: wait for it; a failure is an error. Collective.
    """
    meta = {
        "step": run.step,
        "consumed": run.consumed,
        "recipe": asdict(run.recipe),
        "data": run.index.digest,
        "base": run.base,
    }
    run.writer.save(run.step, capture(run.engine, run.ema), meta, must=must)


def _averaged(run: Run) -> AbstractContextManager[None]:
    return run.ema.swapped() if run.ema is not None else nullcontext()


def _batches(run: Run) -> Iterator[Batch]:
    train, world = run.recipe.train, run.world
    loader = make_loader(
        run.recipe.data, run.index, seed=run.recipe.seed, rank=world.rank, world_size=world.world_size,
        global_batch=train.batch_size, micro_batch=train.batch_size // world.world_size // train.accumulation,
        consumed=run.consumed, quarantine=run.folder / f"quarantine-{world.rank}.jsonl",
    )  # fmt: skip
    return iter(loader)


def _find_checkpoint(folder: Path, recipe: Recipe, world: World, *, resume: bool) -> Checkpoint | None:
    checkpoints = folder / "checkpoints"
    exists = broadcast_object(world, has_checkpoints(checkpoints))
    if exists and not resume:
        raise ValueError(
            f"run {folder} holds checkpoints already: continue it with --resume, or choose another run=FOLDER"
        )
    if not exists:
        return None
    checkpoint = load_checkpoint(checkpoints, world=world)
    if checkpoint is not None and world.is_main:
        for line in differences(build(Recipe, checkpoint.meta["recipe"], ""), recipe):
            print(f"resume: the recipe differs in {line}", flush=True)
    return checkpoint


def _count_refused(run: Run, result: StepResult) -> None:
    run.refused = 0 if result.applied else run.refused + 1
    if run.refused == MAX_REFUSED:
        raise RuntimeError(
            f"step {run.step}: the gradient was not finite for {MAX_REFUSED} steps in a row; "
            "the last checkpoint is intact. Lower train.lr, or look at the data and the base"
        )


def _summary(recipe: Recipe, engine: Engine, groups: list, index: ShardIndex, step: int) -> str:
    counts = ", ".join(f"{sum(p.numel() for p in g.params.values()) / 1e6:.2f} M {g.name}" for g in groups)
    total = engine.parameters / 1e6
    where = f"{engine.config.name} x {engine.world.world_size} on {engine.world.device.type}, {engine.config.precision}"
    start = f", from step {step}" if step else ""
    return f"{recipe.name}: {total:.2f} M parameters, {counts} learn; {where}; {index.num_samples} samples{start}"
