"""Planned shards become tars, by this process or several, each renamed into place when it is whole."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset
from tqdm import tqdm

from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import (
    MAX_BYTES,
    UNREADABLE,
    Dropped,
    UnfitError,
    extension_of,
    read_file,
    read_texts,
)
from data_tools.packing.media import kind_of, prepare
from data_tools.packing.plan import Planned, PlannedShard, replace_file
from data_tools.packing.tables import read_cell
from dydit_scale.data.decode import MAX_CAPTION_BYTES

LEFT_OUT = "caption left out"


class Desk(NamedTuple):
    """The folders of one run."""

    out: Path
    """For whole shards."""
    state: Path
    """For records and unfinished shards, on the same file system."""
    name: str
    """Of the run, unlike that of any other at the same time."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What became of a planned shard."""

    digest: str
    """Of the plan."""
    packed: int
    bytes: int
    """Size of the tar; 0 if nothing was packed and there is none."""
    changes: dict[str, int]
    """Conversions, by what was converted."""
    dropped: list[Dropped]
    left_out: list[Dropped]
    """Captions beyond a limit of samples that were packed."""
    sha256: str = ""
    """Of the tar as it was written, in hex; "" if there is none, or an earlier version wrote it."""


class _Hashed:
    """A file and the SHA-256 of what is written to it from end to end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


class _Sample(NamedTuple):
    members: dict[str, bytes | str]
    changes: tuple[str, ...]
    left_out: tuple[str, ...]


def find_record(desk: Desk, shard: PlannedShard) -> ShardRecord | None:
    """The record of a shard that is there with its size; None if it must be written (again)."""
    path = _record_file(desk, shard)
    if not path.is_file():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    lines = {name: [Dropped(*line) for line in fields[name]] for name in ("dropped", "left_out")}
    record = ShardRecord(**fields | lines)
    tar = desk.out / shard.name
    size = tar.stat().st_size if tar.is_file() else 0
    is_final = all(line.reason != UNREADABLE for line in record.dropped)
    return record if (record.digest, record.bytes) == (shard.digest, size) and is_final else None


def write_all(
    shards: list[PlannedShard], desk: Desk, *, workers: int, done: int, progress: bool
) -> dict[str, ShardRecord]:
    """Write shards, several at a time; their records by their names. The bar starts at ``done`` inputs.

    Raises ValueError when a shard cannot be written or a process dies; whole shards stay for the next run.
    """
    total = done + sum(len(shard.samples) for shard in shards)
    with tqdm(total=total, initial=done, desc="packing", unit="input", disable=None if progress else True) as bar:
        if workers == 1 or len(shards) < 2:
            return {shard.name: write_shard(shard, desk, bar.update) for shard in shards}
        ticks = multiprocessing.Value("q", done)
        with ProcessPoolExecutor(min(workers, len(shards)), initializer=_start_worker, initargs=(ticks,)) as pool:
            futures = {pool.submit(_write_in_worker, shard, desk): shard.name for shard in shards}
            try:
                records = {}
                for future in _as_completed(set(futures), lambda: bar.update(ticks.value - bar.n)):
                    records[futures[future]] = future.result()
                return records
            except BrokenProcessPool as error:
                raise ValueError(
                    f"{desk.out}: a process that packs died (out of memory?); run the command again to go on"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _as_completed(pending: set[Future[ShardRecord]], tick: Callable[[], Any]) -> Iterator[Future[ShardRecord]]:
    while pending:
        completed, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        tick()
        yield from completed


_ticks: Any = None


def _start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the parent is killed, its workers would wait for their next shard for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _write_in_worker(shard: PlannedShard, desk: Desk) -> ShardRecord:
    return write_shard(shard, desk, _tick)


def _tick() -> None:
    with _ticks.get_lock():
        _ticks.value += 1


def write_shard(shard: PlannedShard, desk: Desk, tick: Callable[[], Any]) -> ShardRecord:
    """Write one shard aside, rename it into place, and then its record; ``tick`` is called after each input."""
    changes: Counter[str] = Counter()
    dropped: list[Dropped] = []
    left_out: list[Dropped] = []
    aside = desk.state / f"{shard.name}.{desk.name}"
    try:
        with aside.open("wb") as file:
            packed, hashed = 0, _Hashed(file)
            limits = {"maxcount": len(shard.samples) + 1, "maxsize": float("inf")}
            options = {"encoder": False, "mtime": 0, "verbose": 0, "opener": lambda name: hashed}
            with webdataset.ShardWriter("%d", **limits, **options) as writer:
                for planned in shard.samples:
                    try:
                        sample = _make_sample(planned, shard.config)
                    except UnfitError as error:
                        dropped.append(Dropped(planned.input.name, error.reason, error.detail))
                    else:
                        writer.write(sample.members)
                        changes.update(sample.changes)
                        left_out += [Dropped(planned.input.name, LEFT_OUT, why) for why in sample.left_out]
                        packed += 1
                    tick()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{desk.out / shard.name}: cannot be written ({error}); run the command again to go on"
        ) from error
    size = aside.stat().st_size if packed else 0
    record = ShardRecord(
        digest=shard.digest,
        packed=packed,
        bytes=size,
        changes=dict(changes),
        dropped=dropped,
        left_out=left_out,
        sha256=hashed.sha256.hexdigest() if packed else "",
    )
    if packed:
        os.replace(aside, desk.out / shard.name)
    else:
        aside.unlink()
        (desk.out / shard.name).unlink(missing_ok=True)
    replace_file(_record_file(desk, shard), [json.dumps(asdict(record)) + "\n"])
    return record


def _record_file(desk: Desk, shard: PlannedShard) -> Path:
    return desk.state / f"{shard.name}.json"


def _make_sample(planned: Planned, config: PackConfig) -> _Sample:
    item = planned.input
    texts = read_texts(item, config)
    data = read_cell(item.file.path, item.cell) if item.cell else read_file(item.file, MAX_BYTES)
    media = prepare(data, kind_of(data) if item.cell else extension_of(item.name), config)
    fields: dict[str, Any] = {"source": item.name}
    if media.changes:
        fields["converted"] = media.changes
    members: dict[str, bytes | str] = {"__key__": planned.key, media.extension: media.data}
    if len(texts.captions) == 1:
        members["txt"] = texts.captions[0].encode()
    elif texts.captions:
        fields["captions"] = texts.captions
    if texts.label is not None:
        members["cls"] = str(texts.label).encode()
    members["json"] = json.dumps(fields, ensure_ascii=False).encode()
    if len(members["json"]) > MAX_CAPTION_BYTES:
        detail = (
            f"{len(texts.captions)} captions in a json of {len(members['json'])} bytes, more than {MAX_CAPTION_BYTES}"
        )
        raise UnfitError("over a limit", detail)
    return _Sample(members, media.changes, texts.left_out)
