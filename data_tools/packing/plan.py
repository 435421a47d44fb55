"""The plan: which input goes to which shard, under which key; a function of the listing and the options alone.

It is kept beside the shards, so that a later run goes on with the same plan or says what is no longer the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_tools.packing.config import PackConfig
from data_tools.packing.duplicates import drop_duplicates, forget_hashes, hash_candidates, noted_hashes
from data_tools.packing.inputs import Dropped, Input
from data_tools.packing.sources import Listing

PLAN_FILE = "plan.json"
INPUTS_FILE = "inputs.jsonl"
FORMAT = "dydit-pack-v1"

_MAX_KEY = 120


class Planned(NamedTuple):
    """An input and its key in the shards."""

    key: str
    input: Input


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """A shard to be written; it holds fewer samples where inputs turn out unfit, and is left out if all do."""

    name: str
    """File name."""
    samples: tuple[Planned, ...]
    config: PackConfig

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the options and inputs."""
        content = [FORMAT, asdict(self.config), [(planned.key, planned.input.stamp) for planned in self.samples]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a source."""

    shards: tuple[PlannedShard, ...]
    dropped: tuple[Dropped, ...]
    """Inputs that the plan leaves out, by their names."""
    total: int
    """Inputs, those left out too."""


def make_plan(
    listing: Listing, config: PackConfig, *, state: Path, run: str, workers: int, progress: bool = True
) -> Plan:
    """Drop what cannot be packed as far as that is known, choose keys and cut into shards.

    Args:
        state: the folder where the plan is kept; ValueError, saying what differs, if it holds the plan of other inputs
            or options.
        run: a name for this run, unlike that of any other at the same time.
        workers: threads that read inputs whose sizes are equal, to find those with equal bytes.
    """
    _check_options(state, config)
    known = _check_inputs(state, listing)
    inputs, dropped = _without_texts(listing.inputs, config)
    if not config.keep_duplicates:
        known = known or noted_hashes(state, inputs)
        inputs = hash_candidates(inputs, known, state=state, run=run, workers=workers, progress=progress)
        known = {item.name: item.sha256 for item in inputs}
        inputs, duplicates = drop_duplicates(inputs, config)
        dropped += duplicates
    if config.shuffle:
        inputs = sorted(inputs, key=lambda item: hashlib.sha256(item.name.encode()).digest())
    shards = tuple(
        PlannedShard(name=f"shard-{number:06d}.tar", samples=tuple(samples), config=config)
        for number, samples in enumerate(_cut(_keyed(inputs), config))
    )
    _save(state, listing, config, known)
    total = len(listing.inputs) + len(listing.dropped)
    everything = tuple(sorted([*listing.dropped, *dropped]))
    assert total == len(everything) + sum(len(shard.samples) for shard in shards), "the plan lost an input"
    return Plan(shards=shards, dropped=everything, total=total)


def _without_texts(inputs: Iterable[Input], config: PackConfig) -> tuple[list[Input], list[Dropped]]:
    kept, dropped = [], []
    for item in inputs:
        if item.texts or item.captions or item.label is not None or config.caption_from == "name":
            kept.append(item)
        else:
            dropped.append(Dropped(item.name, "no caption", "neither a caption nor a label"))
    return kept, dropped


# Keys and shards


def _keyed(inputs: list[Input]) -> Iterator[Planned]:
    """Keys from the inputs' names; those that would be equal get a piece of their name's hash."""
    plain = [_plain_key(item) for item in inputs]
    counts, used = Counter(plain), set[str]()
    for key, item in zip(plain, inputs, strict=True):
        if counts[key] > 1 or len(key) > _MAX_KEY:
            key = f"{key[:_MAX_KEY]}-{hashlib.sha256(item.name.encode()).hexdigest()[:12]}"
        assert key not in used, f"two inputs with the key {key}"
        used.add(key)
        yield Planned(key, item)


def _plain_key(item: Input) -> str:
    """``"a b/c.d.png"`` -> ``"a_b/c_d"``: letters and digits of any script, dashes, underscores and slashes."""
    stem = item.name if item.cell else str(PurePosixPath(item.name).with_suffix(""))
    return re.sub(r"[^\w/-]", "_", unicodedata.normalize("NFC", stem))


def _cut(planned: Iterable[Planned], config: PackConfig) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    size = 0
    for sample in planned:
        if shard and (len(shard) == config.samples_per_shard or size + sample.input.size > config.shard_mib << 20):
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += sample.input.size
    if shard:
        yield shard


# The plan on disk


def _check_options(state: Path, config: PackConfig) -> None:
    if not (state / PLAN_FILE).is_file():
        return
    kept = json.loads((state / PLAN_FILE).read_text(encoding="utf-8"))
    if kept["format"] != FORMAT:
        raise ValueError(f"{state.parent}: packed as {kept['format']}, not {FORMAT}; choose another folder")
    asked: dict[str, Any] = asdict(config)
    names = [name for name in asked if asked[name] != kept["options"].get(name)]
    if names:
        differ = ", ".join(f"{name} was {kept['options'].get(name)!r}, now {asked[name]!r}" for name in names)
        raise ValueError(
            f"{state.parent}: was begun with other options ({differ}); keep them, or choose another folder"
        )


def _check_inputs(state: Path, listing: Listing) -> dict[str, str]:
    """Hashes that an earlier run found; ValueError if the inputs are no longer those that it listed."""
    if not (state / PLAN_FILE).is_file():
        return {}
    stamps, hashes = {}, {}
    with (state / INPUTS_FILE).open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            stamps[entry["name"]], hashes[entry["name"]] = entry["stamp"], entry["sha256"]
    now = {item.name: item.stamp for item in listing.inputs}
    differences = {
        "new": sorted(now.keys() - stamps.keys()),
        "gone": sorted(stamps.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & stamps.keys() if now[name] != stamps[name]),
    }
    found = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in differences.items() if names]
    if found:
        raise ValueError(
            f"{state.parent}: the inputs are not those that it was begun with: {'; '.join(found)}; bring them back, "
            "or choose another folder"
        )
    return {name: sha256 for name, sha256 in hashes.items() if sha256}


def _save(state: Path, listing: Listing, config: PackConfig, hashes: dict[str, str]) -> None:
    if not (state / PLAN_FILE).is_file():
        lines = (
            json.dumps({"name": item.name, "stamp": item.stamp, "sha256": hashes.get(item.name, "")}) + "\n"
            for item in listing.inputs
        )
        replace_file(state / INPUTS_FILE, lines)
        replace_file(state / PLAN_FILE, [json.dumps({"format": FORMAT, "options": asdict(config)}, indent=1) + "\n"])
    forget_hashes(state)


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a text aside and rename it into place; whoever does the same at the same time, on any machine."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
