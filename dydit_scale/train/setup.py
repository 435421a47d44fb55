"""From a recipe to a run that can take its first step: everything is checked, then built, then restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dydit_scale.checkpoint.folder import has_checkpoints
from dydit_scale.checkpoint.state import engine_name, restore
from dydit_scale.checkpoint.store import Checkpoint, load_checkpoint
from dydit_scale.checkpoint.writer import CheckpointWriter, SaveReport
from dydit_scale.data.dataset import DataSet
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.stream import ShardStream
from dydit_scale.models.family import frozen_parts
from dydit_scale.models.loading import base_digest
from dydit_scale.models.registry import family_of
from dydit_scale.parallel.ema import Ema
from dydit_scale.parallel.engine import AdamWConfig, Engine, ParamGroup, make_engine
from dydit_scale.parallel.reduce import max_flag
from dydit_scale.parallel.watchdog import Watchdog
from dydit_scale.parallel.world import World, broadcast_object, on_main
from dydit_scale.train.attempt import Attempt, take_folder
from dydit_scale.train.build import Parts, build_parts, param_groups, shard_units
from dydit_scale.train.checks import check_batch, check_data, check_same
from dydit_scale.train.encoded import EncodedInputs, check_encoded
from dydit_scale.train.frozen import FrozenRouters
from dydit_scale.train.gates import GateLog, make_gate_log
from dydit_scale.train.guard import Guard
from dydit_scale.train.listening import make_endpoint, peak_of, start_metrics
from dydit_scale.train.metrics import Metrics, RankLog
from dydit_scale.train.objective import Objective, make_process
from dydit_scale.train.observer import Observer
from dydit_scale.train.preflight import check_agreement, check_disk, check_writing
from dydit_scale.train.recipe import Recipe, differences, save_recipe
from dydit_scale.train.recompute import checkpoint_function
from dydit_scale.train.stopping import Stopped, StopRequest
from dydit_scale.train.validation import Validator


@dataclass
class Run:
    """Everything alive in a run."""

    recipe: Recipe
    world: World
    folder: Path
    data: DataSet | ShardStream
    engine: Engine
    ema: Ema | None
    objective: Objective
    validator: Validator
    gates: GateLog | None
    frozen: FrozenRouters | None
    metrics: Metrics | None
    base: str
    """Digest of the base's weights, which a checkpoint belongs to."""
    guard: Guard
    stop: StopRequest
    watchdog: Watchdog
    attempt: Attempt
    writer: CheckpointWriter
    observer: Observer
    step: int = 0
    """The next step to train."""
    consumed: int = 0
    """Position in the data of the next step's first sample. It grows with every step, also with those that are left
    out or trained again."""
    saved: int | None = None
    """Step of the newest checkpoint that all ranks know of; None before the first."""
    saved_consumed: int = 0
    """``consumed`` of that checkpoint."""
    saving_consumed: int = 0
    """``consumed`` of the save under way."""

    def told(self, report: SaveReport) -> None:
        """What became of a save; on every rank alike."""
        if report.path is not None:
            self.saved, self.saved_consumed = report.step, self.saving_consumed
        self.observer.failed_saves += report.path is None
        if self.metrics:
            self.metrics.checkpoint(report, self.observer.failed_saves)

    def say(self, text: str) -> None:
        """A line for people, from rank 0."""
        if self.metrics:
            self.metrics.say(text)

    def close(self) -> None:
        """Write what is left to say."""
        for writer in (self.metrics, self.observer.log):
            if writer:
                writer.close()


def hold_folder(recipe: Recipe, world: World, stop: StopRequest, watchdog: Watchdog) -> Attempt:
    """Take the run's folder for this attempt, with signs of life from here on. Collective.

    Raises FolderInUseError on every rank if another process trains there, ValueError if it cannot be written.
    """
    folder = Path(recipe.run)

    def take() -> Attempt:
        try:
            return take_folder(folder, wait=min(recipe.limits.takeover, recipe.limits.setup / 2))
        except OSError as error:
            raise ValueError(f"run {folder}: cannot be written: {error}; choose another run=FOLDER") from error

    attempt = on_main(world, take)
    if world.is_main:
        stop.watch(folder, attempt.token)
        watchdog.beat = attempt.beat
    return attempt


def check_first(recipe: Recipe, world: World, *, resume: bool) -> DataSet | ShardStream:
    """What can be refused at once, before the run's folder is touched. Collective; ValueError on every rank."""
    data = check_agreement(recipe, world, resume=resume)
    check_batch(recipe, world)
    indexes: Sequence[ShardIndex | ShardStream] = (data,) if isinstance(data, ShardStream) else data.indexes
    for config, index in zip(recipe.data.split(), indexes, strict=True):
        own = replace(recipe, data=config)
        check_data(own, index)
        on_main(world, partial(check_encoded, own, index))
    folder = Path(recipe.run)
    if not resume and broadcast_object(world, has_checkpoints(folder / "checkpoints")):
        raise ValueError(
            f"run {folder} holds checkpoints already: continue it with --resume, or choose another run=FOLDER"
        )
    return data


def start(
    recipe: Recipe,
    data: DataSet | ShardStream,
    world: World,
    *,
    stop: StopRequest,
    watchdog: Watchdog,
    attempt: Attempt,
    build: Callable[..., Parts] = build_parts,
) -> Run:
    """Build the run (its network by ``build``) and restore its newest good checkpoint, if there is one. Collective.

    Raises ValueError if something does not fit, Stopped if a stop was asked for on the way.
    """
    folder = Path(recipe.run)
    check_writing(folder, attempt, world)
    checkpoint = _find_checkpoint(folder, recipe, world)
    base = base_digest(recipe.model.base)
    if checkpoint is not None:
        check_same(checkpoint, folder, data=data.digest, base=base)
    leave_if_asked(stop)
    encodings = {} if isinstance(data, ShardStream) else data.encodings
    pixels = isinstance(data, ShardStream) or len(encodings) < len(data.indexes)
    encodes = pixels or (bool(recipe.train.sample_prompts) and recipe.train.sample_every > 0)
    parts = build(recipe, text_encoders=encodes)
    if recipe.train.gradient_checkpointing != "none":
        function = checkpoint_function(
            parts.network, shard_units(parts.network), recipe.train.gradient_checkpointing,
            recipe.train.checkpointed_blocks,
            carry_timestep=recipe.dynamic is None and recipe.adapter.kind == "td_lora",
        )  # fmt: skip
        parts.network.enable_gradient_checkpointing(function)
    process = make_process(recipe, family_of(parts.pipeline))
    gates = make_gate_log(parts.network, process, folder)
    from_step = recipe.frozen_routers.from_step
    frozen = None if from_step is None else FrozenRouters(parts.network, process, from_step)
    groups = param_groups(recipe, parts.network)
    check_disk(recipe, folder, groups, world)
    leave_if_asked(stop)
    adamw = AdamWConfig(betas=recipe.train.betas)
    if encodes:  # or decodes samples
        for part in frozen_parts(parts.pipeline):
            part.to(world.device)
    engine = make_engine(
        recipe.engine, parts.network, groups, world,
        shard_units=shard_units(parts.network), accumulation=recipe.train.accumulation, adamw=adamw,
    )  # fmt: skip
    ema = Ema(engine, recipe.train.ema) if recipe.train.ema is not None else None
    leave_if_asked(stop)
    encoded = {source: EncodedInputs(folder, encoding) for source, (folder, encoding) in encodings.items()}
    objective = Objective(recipe, parts.network, parts.pipeline, parts.teacher, world.device, encoded)
    endpoints = make_endpoint(recipe, world)
    log = RankLog(folder, world.rank, endpoints)
    watchdog.beat = partial(_beat, attempt, log) if world.is_main else log.beat
    run = Run(
        recipe, world, folder, data, engine, ema, objective, Validator(recipe, data, objective, world), gates, frozen,
        None,
        base, Guard(recipe.guard), stop, watchdog, attempt,
        _writer(recipe, world, attempt, lambda report: run.told(report)),
        Observer(recipe, world, objective, log, peak_of(recipe, world)),
    )  # fmt: skip
    if checkpoint is not None:
        restore(checkpoint, engine, ema)
        run.step = run.saved = checkpoint.step
        run.consumed = run.saved_consumed = checkpoint.meta["consumed"]
        run.guard.load(checkpoint.meta.get("guard"))
    if world.is_main:
        save_recipe(recipe, folder / "recipe.yaml")
        run.metrics = start_metrics(recipe, run.observer, attempt, endpoints, first_step=run.step)
        run.say(_summary(recipe, engine, groups, data, run.step))
    run.writer.start()
    return run


def _beat(attempt: Attempt, log: RankLog) -> None:
    attempt.beat()
    log.beat()


def _writer(recipe: Recipe, world: World, attempt: Attempt, tell: Callable[[SaveReport], None]) -> CheckpointWriter:
    train = recipe.train
    return CheckpointWriter(
        Path(recipe.run) / "checkpoints", world, engine=engine_name(recipe.engine), keep=train.keep,
        keep_every=train.keep_every, failures=train.save_failures, asynchronous=train.async_save,
        may_commit=attempt.still_ours, tell=tell,
        limit=recipe.limits.checkpoint / 5,  # the watchdog ends what does not end itself
    )  # fmt: skip


def leave_if_asked(stop: StopRequest) -> None:
    """Raise Stopped on every rank if any of them was asked to stop during set-up, where nothing is to be saved.
    Collective."""
    if max_flag(stop.asked()):
        raise Stopped(f"stopped during set-up by {stop.reason or 'a request to another rank'}; no step was trained")


def _find_checkpoint(folder: Path, recipe: Recipe, world: World) -> Checkpoint | None:
    if not broadcast_object(world, has_checkpoints(folder / "checkpoints")):
        return None
    checkpoint = load_checkpoint(folder / "checkpoints", world=world, repair=True)
    if checkpoint is not None and world.is_main:
        for line in differences(checkpoint.meta["recipe"], recipe):
            print(f"resume: the recipe differs in {line}", flush=True)
    return checkpoint


def _summary(
    recipe: Recipe, engine: Engine, groups: Sequence[ParamGroup], data: DataSet | ShardStream, step: int
) -> str:
    counts = ", ".join(f"{sum(p.numel() for p in g.params.values()) / 1e6:.2f} M {g.name}" for g in groups)
    total = engine.parameters / 1e6
    where = f"{engine.config.name} x {engine.world.world_size} on {engine.world.device.type}, {engine.config.precision}"
    begins = f", from step {step}" if step else ""
    if isinstance(data, ShardStream):
        read = f"{len(data.shards)} shards as a stream, their captions, classes and integrity not checked beforehand"
        begins += ", with the data shuffled anew: a resume of a stream is not exact" if step else ""
    else:
        read = f"{data.num_samples} samples"
    return f"{recipe.name}: {total:.2f} M parameters, {counts} learn; {where}; {read}{begins}"
