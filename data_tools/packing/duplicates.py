"""Inputs with equal bytes: those of equal size are read and hashed, and every hash is noted as it comes.

The notes are the runs' own and go when the plan, which has the hashes too, is kept; so a run that is killed while it
compares loses little.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import MAX_BYTES, Dropped, Input, UnfitError, read_file, read_texts

_CHUNK = 4096
_NOTES = "hashes-*.jsonl"


def noted_hashes(state: Path, inputs: Iterable[Input]) -> dict[str, str]:
    """SHA-256 (hex) by name of inputs that runs without a plan had read, as far as these are the same still."""
    noted = {}
    for path in state.glob(_NOTES):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:  # the last line of a run that was killed
                    continue
                noted[entry["name"], entry["stamp"]] = entry["sha256"]
    stamped = ((item.name, item.stamp) for item in inputs) if noted else ()
    return {name: noted[name, stamp] for name, stamp in stamped if (name, stamp) in noted}


def forget_hashes(state: Path) -> None:
    """Remove all notes."""
    for path in state.glob(_NOTES):
        path.unlink(missing_ok=True)


def hash_candidates(
    inputs: list[Input], known: dict[str, str], *, state: Path, run: str, workers: int, progress: bool
) -> list[Input]:
    """``inputs`` with the hashes of those that are not the only ones of their size.

    Args:
        known: hashes by name, of inputs that need not be read.
        state: the folder for the notes of the run ``run``.
        workers: threads that read.
    """
    sizes = Counter(item.size for item in inputs)
    wanted = [place for place, item in enumerate(inputs) if sizes[item.size] > 1 and not item.sha256]
    hashed = list(inputs)
    for place in wanted:
        hashed[place] = replace(inputs[place], sha256=known.get(inputs[place].name, ""))
    unread = [place for place in wanted if not hashed[place].sha256]
    if not unread:
        return hashed
    remaining, total, done = iter(unread), len(wanted), len(wanted) - len(unread)
    with (
        ThreadPoolExecutor(workers) as pool,
        (state / _NOTES.replace("*", run)).open("a", encoding="utf-8", buffering=1) as notes,
        tqdm(total=total, initial=done, desc="comparing", unit="file", disable=None if progress else True) as bar,
    ):
        notes.write("\n")  # ends a line that a killed run left
        # Chunks, because a pool takes up all that it is given at once.
        while chunk := list(islice(remaining, _CHUNK)):
            for place, sha256 in zip(chunk, pool.map(lambda p: _hash(inputs[p]), chunk), strict=True):
                hashed[place] = item = replace(inputs[place], sha256=sha256)
                if sha256:
                    notes.write(json.dumps({"name": item.name, "stamp": item.stamp, "sha256": sha256}) + "\n")
                bar.update()
    return hashed


def _hash(item: Input) -> str:
    """ "" where the file cannot be read, which is reported when it is to be packed."""
    try:
        return hashlib.sha256(read_file(item.file, MAX_BYTES)).hexdigest()
    except UnfitError:
        return ""


def drop_duplicates(inputs: list[Input], config: PackConfig) -> tuple[list[Input], list[Dropped]]:
    """Of inputs with equal bytes, the first whose caption and label will do stays."""
    groups: dict[str, list[Input]] = defaultdict(list)
    for item in inputs:
        if item.sha256:
            groups[item.sha256].append(item)
    dropped: list[Dropped] = []
    for group in groups.values():
        first = next((item for item in group if _has_texts(item, config)), None) if len(group) > 1 else None
        if first is not None:
            rest = (item.name for item in group if item is not first)
            dropped += [Dropped(name, "duplicate", f"has the bytes of {first.name}") for name in rest]
    gone = {line.input for line in dropped}
    return [item for item in inputs if item.name not in gone], dropped


def _has_texts(item: Input, config: PackConfig) -> bool:
    try:
        read_texts(item, config)
    except UnfitError:
        return False
    return True
