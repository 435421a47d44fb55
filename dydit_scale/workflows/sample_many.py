"""``dydit sample --num``: thousands of pictures over all ranks, resumable, in the file that FID's programs read.

Picture i shows prompt (or class) i modulo their number, from noise that depends on the seed and i alone. Pictures are
drawn in blocks of ``batch``, always the same ones: a block is what a rank draws at a time, a file, and what a restart
finds or draws again. So pictures depend neither on the ranks nor on restarts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dydit_scale.checkpoint.agree import first_problem
from dydit_scale.checkpoint.files import sync_folder
from dydit_scale.models.family import SampleConfig
from dydit_scale.parallel.world import World, on_main
from dydit_scale.sampling.blocks import Blocks, block_bytes
from dydit_scale.sampling.execution import Execution
from dydit_scale.sampling.generate import generate
from dydit_scale.sampling.npz import write_npz
from dydit_scale.sampling.speed import fallback_lines, machine
from dydit_scale.sampling.video import write_video
from dydit_scale.workflows.folders import locked, told_when_full
from dydit_scale.workflows.runs import LoadedRun, load_run, sample_config
from dydit_scale.workflows.sample import PackOptions, pack_run, packed_line
from dydit_scale.workflows.sample_set import (
    PROMPTS_FILE,
    RESULT_FILE,
    Subjects,
    Wanted,
    begin,
    check_request,
    find_subjects,
    made_by,
    missing_blocks,
    recorded_batch,
    write_whole,
)

LOCK_FILE = ".sampling.lock"
CPU_BATCH = 16
FIRST_TRY = 128
"""Pictures of the first attempt to find what a GPU's memory holds; halved until it fits."""
COUNTED = 16
"""Pictures on which tokens are counted for ``fixed_tokens``."""


class Drawn(NamedTuple):
    """What was done."""

    pictures: int
    """Of the whole set."""
    drawn: int
    """Of them now; the others were there."""
    seconds: float
    """From the first block to the last."""
    ranks: int

    def __str__(self) -> str:
        if not self.drawn:
            return f"{self.pictures} pictures, all of them there already"
        by = f"{self.ranks} processes" if self.ranks > 1 else "one process"
        speed = f"{self.drawn / self.seconds:.2f} pictures/s"
        return f"{self.pictures} pictures, {self.drawn} drawn now by {by} in {self.seconds:.1f} s, {speed}"


def sample_many(
    folder: Path, wanted: Wanted, world: World, *, config: Mapping[str, Any], packing: PackOptions = PackOptions()
) -> Drawn:
    """Draw what is missing of a set, every rank a share of the blocks, then write it as asked for. Collective.

    Args:
        folder: of the run; a dynamic one is packed.
        config: fields of SampleConfig; None keeps the run's own. Without ``batch`` that of the blocks which are there
            is kept; else it is ``CPU_BATCH``, or found by trying on a GPU.

    Raises ValueError before anything is drawn if the folder is no run, the model does not know a prompt, the sampler or
    the size, ``wanted.out`` holds other things or pictures made otherwise (naming the difference), or the disk is too
    small; later if it is full or the memory does not hold a batch.
    """
    run = load_run(folder, device=str(world.device))
    settings, subjects = sample_config(run, **config), find_subjects(run, wanted.prompts)
    check_request(run, settings, wanted)
    making = made_by(run, settings, subjects, packing)
    given = config.get("batch")
    with locked(wanted.out, world, LOCK_FILE, "samples into it"):
        batch = on_main(world, lambda: recorded_batch(wanted, making, given))
        if batch is None and world.device.type == "cpu":
            batch = CPU_BATCH
        with _prepared(run, settings, subjects, packing, world):
            if batch is None:
                batch = on_main(world, lambda: _batch_that_fits(run, settings, subjects, wanted.num))
            settings, blocks = replace(settings, batch=batch), wanted.blocks(batch)
            todo = missing_blocks(blocks, world)
            on_main(world, lambda: begin(wanted, making, settings, sum(len(blocks.numbers(block)) for block in todo)))
            done = _draw(run, settings, subjects, blocks, todo, world)
        if wanted.pictures:
            _write_pictures(wanted, blocks, world)
        on_main(world, lambda: _finish(wanted, blocks, subjects, done, run))
    return done


@contextmanager
def _prepared(
    run: LoadedRun, settings: SampleConfig, subjects: Subjects, packing: PackOptions, world: World
) -> Iterator[None]:
    """Inside the ``with`` a dynamic run is packed and runs as asked for."""
    if run.recipe.dynamic is None:
        yield
        return
    plan = pack_run(run, subjects.of(range(COUNTED)), replace(settings, batch=COUNTED), packing)
    if world.is_main:
        print(packed_line(plan))
    with Execution(run.network, packing.execution) as execution:
        yield
    if world.is_main:
        for line in fallback_lines(plan.run.fallback, execution.op_by_op):
            print(line)


def _batch_that_fits(run: LoadedRun, settings: SampleConfig, subjects: Subjects, num: int) -> int:
    """The first of ``FIRST_TRY``, its half, its quarter, ... with which a whole block is drawn without running out of
    memory; ValueError if not even one picture is."""
    batch = min(FIRST_TRY, num)
    while True:
        try:
            generate(
                run.pipeline, subjects.of(range(batch)), replace(settings, batch=batch), progress=f"trying {batch}"
            )
        except torch.OutOfMemoryError:
            if batch == 1:
                raise ValueError("sampling: the memory does not hold what drawing one picture needs") from None
        else:
            return batch
        torch.cuda.empty_cache()  # not in the handler, whose error keeps the tensors
        batch //= 2


def _draw(
    run: LoadedRun, config: SampleConfig, subjects: Subjects, blocks: Blocks, todo: list[int], world: World
) -> Drawn:
    """The blocks ``todo``, in turns of one for each rank. Collective.

    After each turn the ranks tell how it went, so that none draws on for hours when another is gone.
    """
    counts = [len(blocks.numbers(block)) for block in todo]
    start, there = time.perf_counter(), blocks.num - sum(counts)
    hidden = not world.is_main
    with tqdm(
        total=blocks.num, initial=there, desc="sampling", unit="picture", disable=hidden, dynamic_ncols=True
    ) as bar:
        for turn in range(0, len(todo), world.world_size):
            problem = None
            try:
                for block in todo[turn : turn + world.world_size][world.rank : world.rank + 1]:
                    _draw_block(run, config, subjects, blocks, block)
            except (ValueError, OSError) as error:
                problem = str(error)
            if failed := first_problem(world, problem):
                raise ValueError(failed)
            bar.update(sum(counts[turn : turn + world.world_size]))
    return Drawn(blocks.num, sum(counts), time.perf_counter() - start, world.world_size)


def _draw_block(run: LoadedRun, config: SampleConfig, subjects: Subjects, blocks: Blocks, block: int) -> None:
    if not blocks.folder.is_dir():
        raise ValueError(f"{blocks.folder}: rank 0 has made it, and it is not here; all ranks need one folder")
    numbers = blocks.numbers(block)
    try:
        pictures = generate(run.pipeline, subjects.of(numbers), config, first=numbers.start)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"sampling: the memory does not hold a batch of {config.batch}; choose a smaller --batch, and another "
            "--out, for the batch of a set stays"
        ) from error
    write_whole(blocks.path(block), block_bytes(pictures))


def _write_pictures(wanted: Wanted, blocks: Blocks, world: World) -> None:
    """Each rank those of its blocks. Collective."""
    folder, problem = wanted.picture_folder, None
    own = range(world.rank, len(blocks), world.world_size)
    try:
        folder.mkdir(exist_ok=True)
        with told_when_full(folder, "writing them"):
            for block in tqdm(own, desc="writing files", unit="block", disable=not world.is_main, dynamic_ncols=True):
                for number, picture in zip(blocks.numbers(block), blocks.read(block), strict=True):
                    if picture.ndim == 4:
                        write_video(folder / wanted.picture_name(number, clip=True), picture, wanted.fps)
                    else:
                        Image.fromarray(picture).save(folder / wanted.picture_name(number, clip=False))
    except (ValueError, OSError) as error:
        problem = str(error)
    if failed := first_problem(world, problem):
        raise ValueError(failed)


def _finish(wanted: Wanted, blocks: Blocks, subjects: Subjects, done: Drawn, run: LoadedRun) -> None:
    """Write prompts and speed, and the npz if it is wanted."""
    prompts = "".join(f"{prompt}\n" for prompt in subjects.of(range(wanted.num)))
    write_whole(wanted.out / PROMPTS_FILE, prompts.encode())
    if done.drawn:
        speed = {"pictures_per_second": done.drawn / done.seconds, **machine(run.pipeline.device)}
        write_whole(wanted.out / RESULT_FILE, (json.dumps({**done._asdict(), **speed}, indent=1) + "\n").encode())
    if wanted.npz is None:
        return
    labels = None if subjects.labels is None else np.resize(subjects.labels, wanted.num)
    aside = wanted.npz_aside
    try:
        with told_when_full(wanted.npz.parent, "writing it"):
            write_npz(aside, _read_all(blocks, f"writing {wanted.npz.name}"), wanted.num, labels)
            os.replace(aside, wanted.npz)
            sync_folder(wanted.npz.parent)
    finally:
        aside.unlink(missing_ok=True)


def _read_all(blocks: Blocks, title: str) -> Iterator[np.ndarray]:
    with tqdm(total=blocks.num, desc=title, unit="picture", dynamic_ncols=True) as bar:
        for block in range(len(blocks)):
            pictures = blocks.read(block)
            yield pictures
            bar.update(len(pictures))
