"""What the ranks make sure of together before any expensive work: that they run the same, where they can write."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dydit_scale
from dydit_scale.checkpoint.folder import list_checkpoints
from dydit_scale.data.dataset import DataSet
from dydit_scale.data.loader import open_data
from dydit_scale.data.stream import ShardStream
from dydit_scale.parallel.engine import ParamGroup
from dydit_scale.parallel.world import World, gather_objects, on_main
from dydit_scale.train.attempt import Attempt, read_holder
from dydit_scale.train.recipe import Recipe, flat_values

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "numpy", "safetensors")


def check_agreement(recipe: Recipe, world: World, *, resume: bool) -> DataSet | ShardStream:
    """The recipe's data, once all ranks agree on recipe, data, packages and code. Collective.

    Raises ValueError on every rank, naming what differs and on which ranks, or the rank that cannot read its data.
    """
    data, problem = None, None
    try:
        data = open_data(recipe.data)
    except (ValueError, OSError) as error:
        problem = str(error)
    told = gather_objects(world, (problem, _facts(recipe, data) | {"--resume": str(resume)}))
    for rank, (said, _) in enumerate(told):
        if said is not None:
            raise ValueError(said if world.world_size == 1 else f"rank {rank}: {said}")
    if different := disagreements([facts for _, facts in told]):
        lines = "\n  ".join(different)
        raise ValueError(
            f"the ranks do not agree:\n  {lines}\nStart every process with the same recipe, data, packages and code"
        )
    assert data is not None
    return data


def disagreements(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines ``name: value on rank 0; value on ranks 1, 2`` for all that differs between the ranks."""
    lines = []
    for name in sorted({name for of_rank in facts for name in of_rank}):
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, of_rank in enumerate(facts):
            ranks[str(of_rank.get(name))].append(rank)
        if len(ranks) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on {_ranks(numbers)}" for value, numbers in ranks.items()))
    return lines


def check_writing(folder: Path, attempt: Attempt, world: World) -> None:
    """ValueError on every rank unless all of them can write and sync a file in the run's folder, and it is one folder
    to all of them. Collective."""
    problem = None
    probe = folder / f".probe-rank-{world.rank}"
    try:
        with probe.open("w") as file:
            file.write("can this be written?")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
        holder = read_holder(folder)
        if holder is None or holder.token != attempt.token:
            problem = "it is not the folder that rank 0 sees; put the run on storage that all machines share"
    except OSError as error:
        problem = f"cannot be written: {error}; free space, or choose another run=FOLDER"
    for rank, said in enumerate(gather_objects(world, problem)):
        if said is not None:
            raise ValueError(f"run {folder}: {said}" if world.world_size == 1 else f"run {folder}, rank {rank}: {said}")


def check_disk(recipe: Recipe, folder: Path, groups: Sequence[ParamGroup], world: World) -> None:
    """ValueError on every rank unless the disk has room for the checkpoints to come. Collective.

    One is 4 bytes x (weight, two moments, average) for each trainable parameter; while the next is written,
    ``train.keep`` older ones lie there.
    """
    numbers = sum(param.numel() for group in groups for param in group.params.values())
    one = numbers * 4 * (3 + (recipe.train.ema is not None))

    def check() -> None:
        there = min(len(list_checkpoints(folder / "checkpoints")), recipe.train.keep)
        needed, free = one * (recipe.train.keep + 1 - there), shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"run {folder}: {needed / 1e9:.2f} GB needed for checkpoints ({recipe.train.keep + 1 - there} of "
                f"{one / 1e9:.2f} GB), {free / 1e9:.2f} GB free; free space, lower train.keep, or choose another "
                "run=FOLDER"
            )

    on_main(world, check)


def _facts(recipe: Recipe, data: DataSet | ShardStream | None) -> dict[str, str]:
    """What must be the same on every rank."""
    facts = {f"recipe {key}": repr(value) for key, value in flat_values(recipe).items()}
    facts |= {f"package {name}": _version(name) for name in PACKAGES}
    facts["run folder"] = str(Path(recipe.run).resolve())
    facts["data index"] = "none" if data is None else data.digest[:12]
    facts["code of dydit_scale"] = code_digest()[:12]
    return facts


def code_digest() -> str:
    """sha256 over the names and contents of this package's Python files."""
    digest, root = hashlib.sha256(), Path(dydit_scale.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
