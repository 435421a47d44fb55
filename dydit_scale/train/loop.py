"""The training loop. It never asks which engine it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dydit_scale.checkpoint.state import capture
from dydit_scale.data.loader import BadDataError, Batch, make_loader
from dydit_scale.dynamic.losses import cost_loss
from dydit_scale.parallel.faults import fail_point, strike
from dydit_scale.parallel.reduce import global_mean, max_flag, mean_values
from dydit_scale.parallel.watchdog import Phase, Watchdog
from dydit_scale.parallel.world import World, gather_objects, on_main
from dydit_scale.train.attempt import Attempt
from dydit_scale.train.build import Parts, build_parts
from dydit_scale.train.exits import Exit
from dydit_scale.train.frozen import LEVELS, WidthTable
from dydit_scale.train.metrics import Metrics
from dydit_scale.train.objective import Terms
from dydit_scale.train.recipe import Recipe
from dydit_scale.train.rollback import go_back
from dydit_scale.train.setup import Run, check_first, hold_folder, leave_if_asked, start
from dydit_scale.train.stopping import Stopped, StopRequest

_LOSS_FAULTS = {"nan": math.nan, "inf": math.inf, "spike": 1000.0}


def lr_scale(step: int, *, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then half a cosine from 1 to ``final`` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(
    recipe: Recipe,
    world: World,
    *,
    resume: bool = False,
    stop: StopRequest | None = None,
    build: Callable[..., Parts] = build_parts,
) -> Path:
    """Train to the recipe's last step and return the run's folder. Collective: every rank calls it.

    Args:
        resume: continue from the newest good checkpoint, where there is one.
        stop: asked after each step.
        build: makes the network of the recipe; for experiments that no recipe describes. It must make the same on
            every rank and at every start.

    Raises:
        ValueError: something in the recipe, the data or the base does not fit (before the first step), or the run's
            folder holds checkpoints and ``resume`` is false.
        Stopped: ``stop`` was asked for, or the run's stop file was written; the state is saved.
        NotFiniteError: going back to the last checkpoint did not help.
        FolderInUseError: another process trains in the run's folder.
        BadDataError: more unusable samples than the recipe allows.
        CheckpointError: no checkpoint could be read, or the last one not be written.
    """
    stop = stop or StopRequest()
    with Watchdog(world, Path(recipe.run), recipe.limits, code=Exit.STUCK) as watchdog:
        data = check_first(recipe, world, resume=resume)
        leave_if_asked(stop)
        with _held(recipe, world, stop, watchdog) as attempt:
            run = start(recipe, data, world, stop=stop, watchdog=watchdog, attempt=attempt, build=build)
            try:
                _steps(run)
            finally:
                run.close()
    return run.folder


def _steps(run: Run) -> None:
    fail_point("train.start")
    leave_if_asked(run.stop)
    batches = _batches(run)
    train = run.recipe.train
    phase: Phase = "setup"  # the first step compiles, and counts to the set-up
    try:
        if run.step and not on_main(run.world, lambda: run.metrics is None or run.metrics.evaluated):
            _look(run, saved=True)  # killed after the save
        while run.step < train.steps:
            run.watchdog.enter(phase)
            phase = "step"
            fail_point("data.next", run.step)
            run.observer.begin()
            read = list(islice(batches, train.accumulation))
            run.observer.has_data()
            taken = train_step(run, read)
            run.step += 1
            run.consumed += train.batch_size
            run.observer.finish(taken.record, consumed=run.consumed, counts=taken.applied, commit=run.writer.newest)
            if run.metrics:
                run.metrics.step(taken.record)
            if taken.spike or run.guard.must_go_back:
                go_back(run)
            elif run.step == train.steps or not taken.stop:
                _look(run)
            if taken.stop and run.step < train.steps:
                raise Stopped
    except Stopped:
        raise Stopped(_leave(run)) from None
    except BadDataError:
        raise
    except ValueError as error:  # no mistake of the recipe, which would have been found before the first step
        raise RuntimeError(f"step {run.step}: {error}") from error


class Taken(NamedTuple):
    """A step that was taken, equal on all ranks but for the times."""

    record: dict[str, Any]
    stop: bool
    spike: bool
    applied: bool


def train_step(run: Run, batches: list[Batch]) -> Taken:
    """One optimiser step over this rank's micro-batches; its record is averaged over ranks.

    Raises Stopped, on every rank alike, if a stop is asked for between micro-batches: the step is left undone.
    """
    recipe, engine, step = run.recipe, run.engine, run.step
    fail_point("train.step", step)
    target = recipe.cost.schedule.at(step)
    table = _frozen_table(run)
    settled = table is not None and recipe.frozen_routers.tokens  # nothing is left to steer the cost with
    engine.network.train()
    sums = {"loss": 0.0, "loss_flow": 0.0, "loss_supervision": 0.0, "loss_cost": 0.0, "ratio": 0.0}
    fault = _LOSS_FAULTS.get(strike("train.loss", step) or "", 1.0)
    for n, batch in enumerate(batches):
        if n and max_flag(run.stop.asked()):
            raise Stopped
        with engine.forward_context():
            terms = _terms(run, batch, table)
            parts = _reduce(terms, recipe, target, steered=not settled)
        if n == 0 and fault != 1:
            parts["loss"] = parts["loss"] * fault
        engine.backward(parts["loss"] / len(batches), last=n == len(batches) - 1)
        for key in sums:
            sums[key] += float(parts[key].detach()) / len(batches)
    flags = {"stop": float(run.stop.asked()), "lost": float(run.world.is_main and run.attempt.lost())}
    means = mean_values(sums | flags | run.observer.values(step))
    seen = run.observer.reduced(means)
    if means.pop("lost"):
        on_main(run.world, run.attempt.still_ours)
    stop = means.pop("stop") > 0
    scale = lr_scale(step, steps=recipe.train.steps, warmup=recipe.train.warmup_steps, final=recipe.train.final_lr)
    spike = run.guard.is_spike(means["loss"]) and _can_go_back(run)
    # the step of a spike only clears the gradients: the checkpoint that follows brings the old moments back
    result = engine.step(0.0 if spike else scale, frozen=table is not None)
    if result.applied and not spike:
        run.guard.went_well(means["loss"])
        if run.ema is not None:
            run.ema.update()
    else:
        run.guard.went_wrong(step, sums["loss"], batches, refused=not result.applied)
        run.observer.nonfinite += not result.applied
        _tell(run, means["loss"], spike)
    record = {"step": step, **means, "target": target, "lr": recipe.train.lr * scale, "grad_norm": result.grad_norm}
    record |= seen | {"nonfinite": run.observer.nonfinite, "rollbacks": len(run.guard.rollbacks)}
    if table is not None:
        record["sub_networks"] = len(table.networks)
    return Taken(record, stop, spike, applied=result.applied and not spike)


def _can_go_back(run: Run) -> bool:
    if run.saved is None:
        run.writer.wait()  # the first one may be under way
    return run.saved is not None


def _tell(run: Run, loss: float, spike: bool) -> None:
    if spike:
        return run.say(f"step {run.step}: the loss is {loss:.4g}, a spike (guard.spike)")
    count, limit = run.guard.refused, run.recipe.guard.refused
    run.say(f"step {run.step}: the gradients are not finite, the step is left out ({count} in a row, limit {limit})")


def _leave(run: Run) -> str:
    """Save once more, unless nothing was trained since the last time, and say who asked. Collective."""
    reasons = gather_objects(run.world, run.stop.reason)
    run.watchdog.enter("checkpoint")
    run.writer.wait()
    if (run.step, run.consumed) != (run.saved or 0, run.saved_consumed):
        _save(run, must=True)
    if run.world.is_main:
        run.stop.clear()
    asked = ", ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
    where = f"before step {run.step} of {run.recipe.train.steps}"
    state = f"the state is saved in {run.folder}, continue with --resume" if run.step else "nothing was trained yet"
    return f"stopped {where} by {asked}; {state}"


@contextmanager
def _held(recipe: Recipe, world: World, stop: StopRequest, watchdog: Watchdog) -> Iterator[Attempt]:
    """The run's folder is this attempt's inside the ``with``."""
    attempt, how = hold_folder(recipe, world, stop, watchdog), "done"
    try:
        yield attempt
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        watchdog.beat = None
        if world.is_main:
            with suppress(OSError):  # a full disk must not hide how the run ended
                attempt.end(how)


def _frozen_table(run: Run) -> WidthTable | None:
    """The table of sub-networks where routers are frozen. Collective."""
    if run.frozen is None:
        return None
    before, table = run.frozen.table, run.frozen.at(run.step, run.engine, run.ema)
    if table is not None and before is None:
        run.say(
            f"step {run.step}: the routers are frozen; {len(table.networks)} sub-networks over {LEVELS} noise levels, "
            "each micro-batch runs one"
        )
    return table


def _terms(run: Run, batch: Batch, table: WidthTable | None) -> Terms:
    objective, seed, step = run.objective, run.recipe.seed, run.step
    places, network = batch.positions - run.consumed, None
    if table is None:
        levels = objective.training_levels(step, places)
    else:
        network, numbers = table.draw(seed, step, places)
        levels = objective.process.training_levels(numbers)
    inputs = objective.prepare(batch, levels, seed, unprompted=objective.guided)
    terms = objective.terms(run.engine.module, inputs, batch.positions, step, network)
    run.observer.saw(inputs, terms)
    return terms


def _reduce(terms: Terms, recipe: Recipe, target: float, *, steered: bool) -> dict[str, torch.Tensor]:
    flow, supervision = terms.flow.mean(), terms.supervision.mean()
    ratio = global_mean(terms.ratio.mean())
    cost = cost_loss(ratio, target)
    weight = recipe.cost.weight if recipe.dynamic is not None and steered else 0.0
    loss = flow + recipe.supervision.weight * supervision + weight * cost
    return {"loss": loss, "loss_flow": flow, "loss_supervision": supervision, "loss_cost": cost, "ratio": ratio}


def _look(run: Run, *, saved: bool = False) -> None:
    """After a step: save (unless ``saved``), evaluate and sample where the recipe says so, and at the end.

    Raises Stopped if a stop is asked for on the way and steps are left to train.
    """
    train, last = run.recipe.train, run.step == run.recipe.train.steps
    due = {
        n: last or (every > 0 and run.step % every == 0)
        for n, every in (("eval", train.evaluate_every), ("save", train.save_every))
    }
    # a checkpoint amid refused steps would be a place to go back to where nothing was learnt
    due["save"] &= not saved and (last or not run.guard.refused)
    draw = bool(train.sample_prompts) and train.sample_every > 0 and (last or run.step % train.sample_every == 0)
    if due["save"]:
        _save(run, must=last)
    if due["eval"] or draw:
        _leave_unless(last, run)
        run.watchdog.enter("evaluation")
        fail_point("train.evaluate", run.step - 1)
        run.engine.network.eval()
        with _averaged(run), torch.no_grad(), run.engine.forward_context():
            evaluation = _evaluate(run) if due["eval"] else None
            _leave_unless(last, run)
            grid = run.validator.sample() if draw else None
        if run.metrics and grid is not None:
            _write_grid(run.metrics, run.folder / "samples" / f"step-{run.step:07d}.png", grid)
        if run.metrics and evaluation:
            run.metrics.evaluation({"step": run.step - 1, **evaluation})
        _leave_unless(last, run)


def _leave_unless(last: bool, run: Run) -> None:
    if not last and max_flag(run.stop.asked()):
        raise Stopped


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
    run.watchdog.enter("checkpoint")
    meta = {
        "step": run.step,
        "consumed": run.consumed,
        "recipe": asdict(run.recipe),
        "data": run.data.digest,
        "base": run.base,
        "guard": run.guard.state(),
    }
    on_main(run.world, run.attempt.still_ours)
    run.writer.wait()
    run.watchdog.enter("checkpoint")
    run.saving_consumed = run.consumed
    run.writer.save(run.step, capture(run.engine, run.ema), meta, must=must)


def _averaged(run: Run) -> AbstractContextManager[None]:
    return run.ema.swapped() if run.ema is not None else nullcontext()


def _batches(run: Run) -> Iterator[Batch]:
    train, world = run.recipe.train, run.world
    loader = make_loader(
        run.recipe.data, run.data, seed=run.recipe.seed, rank=world.rank, world_size=world.world_size,
        global_batch=train.batch_size, micro_batch=train.batch_size // world.world_size // train.accumulation,
        consumed=run.consumed, quarantine=run.folder / f"quarantine-{world.rank}.jsonl",
    )  # fmt: skip
    run.observer.loader = loader
    return iter(loader)
