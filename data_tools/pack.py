"""``dydit data pack``: pictures and clips of a folder, a table or a saved HF data set become webdataset shards.

What goes where is planned from the listing alone. Every shard is written aside by one process, renamed when it is
whole, and noted beside the plan; so neither the number of processes and machines nor an interruption shows in the
bytes.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_tools.check import read_sha256
from data_tools.packing.config import PackConfig
from data_tools.packing.inputs import CLIP_EXTENSIONS, Dropped, extension_of
from data_tools.packing.plan import PLAN_FILE, Plan, PlannedShard, make_plan, replace_file
from data_tools.packing.sources import Listing, list_source
from data_tools.packing.writing import Desk, ShardRecord, find_record, write_all
from data_tools.shapes import CLASSES_FILE
from dydit_scale.data.index import INDEX_FILE, ShardIndex, load_index
from dydit_scale.data.processes import default_workers, run_jobs
from dydit_scale.data.shards import index_folder
from dydit_scale.data.video import require_av

STATE_FOLDER = ".pack"
REPORT_FILE = "pack-report.jsonl"
UNUSABLE = "packed, but unusable"


class Part(NamedTuple):
    """Machine ``number`` of ``of`` that pack one source together: it writes every ``of``-th shard."""

    number: int = 1
    of: int = 1


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What was packed, in this run and before."""

    total: int
    """Inputs of this part."""
    packed: int
    """Some of them may be ``bad`` in the index."""
    dropped: Counter[str]
    """Inputs by reason."""
    changes: Counter[str]
    left_out: int
    """Captions beyond a limit of samples that were packed with others."""
    ignored: Counter[str]
    """Other files of the source, by extension."""
    notes: list[str]
    written: int
    """Shards written by this run."""
    found: int
    """Shards that an earlier run had written."""
    report: Path
    index: ShardIndex | None
    """None for a part."""


def pack(
    source: Path | str,
    out: Path | str,
    config: PackConfig | None = None,
    *,
    part: Part | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> PackSummary:
    """Write the inputs of ``source`` as ``out/shard-000000.tar``, ..., index them and report what was left out.

    A run on the same source, options and folder goes on where an earlier one ended. The same inputs and options give
    the same tars, byte for byte, with the same versions of Pillow and PyAV.

    Args:
        source: see ``list_source``.
        part: write only this part's shards, and leave the index to a run without parts; one that is there goes with
            the first shard that is written.
        workers: processes that convert and write; None for one on each core, at most 8.

    Raises ValueError, before anything is written, for a source without inputs, a folder with other shards or begun
    with other inputs or options, another run at work there; and when nothing at all could be packed.
    """
    source, out, config, part = Path(source), Path(out), config or PackConfig(), part or Part()
    workers = default_workers() if workers is None else workers
    _check_arguments(source, out, part, workers)
    listing = list_source(source, config, progress=progress)
    if any(extension_of(item.name) in CLIP_EXTENSIONS for item in listing.inputs):
        require_av()
    with _desk(out, part) as desk:
        with _planning(desk):
            plan = make_plan(listing, config, state=desk.state, run=desk.name, workers=workers, progress=progress)
        _check_foreign(out, plan)
        mine = plan.shards[part.number - 1 :: part.of]
        records, index = _find(mine, desk, part, workers, progress)
        missing = [shard for shard in mine if shard.name not in records]
        if missing:
            # It would be taken for the index of what is written from here on.
            (out / INDEX_FILE).unlink(missing_ok=True)
        done = sum(len(shard.samples) for shard in mine if shard.name in records)
        records |= write_all(missing, desk, workers=workers, done=done, progress=progress)
        if listing.classes is not None:
            replace_file(out / CLASSES_FILE, [json.dumps(listing.classes, indent=1, ensure_ascii=False) + "\n"])
        told = _tally(plan, [records[shard.name] for shard in mine], part)
        report = out / (REPORT_FILE if part.of == 1 else f"pack-report-{part.number}-of-{part.of}.jsonl")
        _write_report(report, told.dropped, told.left_out)
        if part.of == 1:
            if not told.packed:
                raise _nothing_packed(source, desk, listing, told.dropped, report)
            index = index or index_folder(out, workers=workers, progress=progress).index
            assert index.num_samples == told.packed, f"{told.packed} samples packed, {index.num_samples} in the index"
            _write_report(report, told.dropped, told.left_out, _unusable(index, mine))
    return PackSummary(
        total=told.packed + len(told.dropped),
        packed=told.packed,
        dropped=Counter(line.reason for line in told.dropped),
        changes=told.changes,
        left_out=len(told.left_out),
        ignored=listing.ignored,
        notes=listing.notes,
        written=len(missing),
        found=len(mine) - len(missing),
        report=report,
        index=index,
    )


def describe(summary: PackSummary) -> Iterator[str]:
    """The summary in lines."""
    yield from summary.notes
    dropped = sum(summary.dropped.values())
    yield f"{summary.total} inputs: {summary.packed} packed, {dropped} dropped"
    if dropped:
        yield f"  dropped: {_counts(summary.dropped)}; each with its reason in {summary.report}"
    if summary.left_out:
        yield f"  captions left out of packed samples: {summary.left_out}, in the same file"
    if summary.index is not None and summary.index.bad:
        yield f"  {UNUSABLE}: {len(summary.index.bad)}, each with its reason in {summary.report}"
    if summary.changes:
        yield f"  converted: {_counts(summary.changes)}"
    if summary.ignored:
        yield f"  other files, ignored: {_counts(summary.ignored)}"
    yield f"  shards: {summary.written} written" + (f", {summary.found} found whole" if summary.found else "")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(
        f"{name} {count}" for name, count in sorted(counter.items(), key=lambda entry: (-entry[1], entry[0]))
    )


def _check_arguments(source: Path, out: Path, part: Part, workers: int) -> None:
    if part.of < 1 or not 1 <= part.number <= part.of:
        raise ValueError(f"part: expected 1/{part.of} to {part.of}/{part.of}, got {part.number}/{part.of}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder or a new path, got the file {out}; choose another path")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out: {out} lies inside the source {source}; choose a folder outside")
    held = sorted(path.name for path in (*out.glob("*.tar"), *out.glob(INDEX_FILE)))
    if held and not (out / STATE_FOLDER / PLAN_FILE).is_file():
        raise ValueError(f"{out}: already holds other shards ({', '.join(held[:5])}); choose another folder")


def _check_foreign(out: Path, plan: Plan) -> None:
    foreign = sorted({path.name for path in out.glob("*.tar")} - {shard.name for shard in plan.shards})
    if foreign:
        raise ValueError(f"{out}: holds shards that are not of this source ({', '.join(foreign[:5])}); move them away")


@contextmanager
def _desk(out: Path, part: Part) -> Iterator[Desk]:
    """Where plan, records and unfinished shards are kept, for one run of each part at a time."""
    state, name = out / STATE_FOLDER, f"{part.number}-of-{part.of}"
    state.mkdir(parents=True, exist_ok=True)
    with (state / f"lock-{name}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another run is packing there; wait for it") from error
        for unfinished in state.glob(f"*.{name}"):
            unfinished.unlink()
        yield Desk(out, state, name)


@contextmanager
def _planning(desk: Desk) -> Iterator[None]:
    """One run at a time plans, and compares inputs; the others wait, and go by its plan."""
    with (desk.state / "lock-plan").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{desk.out}: another part makes the plan; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find(
    shards: Sequence[PlannedShard], desk: Desk, part: Part, workers: int, progress: bool
) -> tuple[dict[str, ShardRecord], ShardIndex | None]:
    """The records of the shards that are there and whole, by name, and their index if it is there for all of them.

    Where it is not, all shards are about to be read for it, so comparing their SHA-256 before costs little.
    """
    records = {shard.name: record for shard in shards if (record := find_record(desk, shard)) is not None}
    if part.of > 1:
        return records, None
    index = _find_index(desk.out, records) if len(records) == len(shards) else None
    if index is None:
        for name in _damaged(desk.out, records, workers, progress):
            del records[name]
    return records, index


def _find_index(out: Path, records: dict[str, ShardRecord]) -> ShardIndex | None:
    """The index that is there, if it says of all shards what their records do."""
    if not (out / INDEX_FILE).is_file():
        return None
    try:
        index = load_index(out)
    except ValueError:  # torn, or of other shards
        return None
    written = {name: record for name, record in records.items() if record.packed}
    is_same = {info.name for info in index.shards} == written.keys() and all(
        (info.bytes, info.count) == (written[info.name].bytes, written[info.name].packed)
        and written[info.name].sha256 in ("", info.sha256)
        for info in index.shards
    )
    return index if is_same else None


def _damaged(out: Path, records: dict[str, ShardRecord], workers: int, progress: bool) -> list[str]:
    """Shards whose SHA-256 is no longer that of their record."""
    known = [name for name, record in records.items() if record.sha256]
    if not known:
        return []
    digests = run_jobs(
        read_sha256,
        [out / name for name in known],
        workers=min(workers, len(known)),
        total_bytes=sum(records[name].bytes for name in known),
        title="checking",
        progress=progress,
    )
    return [name for name, (sha256, _) in zip(known, digests, strict=True) if sha256 != records[name].sha256]


class _Tally(NamedTuple):
    """What the shards of a part say."""

    packed: int
    dropped: list[Dropped]
    left_out: list[Dropped]
    changes: Counter[str]


def _tally(plan: Plan, records: Sequence[ShardRecord], part: Part) -> _Tally:
    """The records of a part's shards in one; what the plan drops is the first part's."""
    mine, planned = plan.shards[part.number - 1 :: part.of], plan.dropped if part.number == 1 else []
    told = _Tally(
        packed=sum(record.packed for record in records),
        dropped=[*planned, *(line for record in records for line in record.dropped)],
        left_out=[line for record in records for line in record.left_out],
        changes=sum((Counter(record.changes) for record in records), Counter()),
    )
    total = sum(len(shard.samples) for shard in mine) + len(planned)
    assert total == told.packed + len(told.dropped), (
        f"{total} inputs, but {told.packed} packed and {len(told.dropped)} dropped"
    )
    return told


def _nothing_packed(source: Path, desk: Desk, listing: Listing, dropped: list[Dropped], report: Path) -> ValueError:
    # Without shards there is nothing that the plan would have to fit: other options or inputs may come here.
    (desk.state / PLAN_FILE).unlink()
    message = f"{source}: nothing could be packed ({_counts(Counter(line.reason for line in dropped))}); see {report}"
    if listing.tables:
        message += (
            f". Tables beside the pictures were not read ({', '.join(listing.tables[:5])}); to pack what one of them "
            f"lists, run `dydit data pack {source / listing.tables[0]} {desk.out}`"
        )
    return ValueError(message)


def _unusable(index: ShardIndex, shards: Sequence[PlannedShard]) -> list[Dropped]:
    """A line for each packed sample that the index finds bad."""
    if not index.bad:
        return []
    names = {planned.key: planned.input.name for shard in shards for planned in shard.samples}
    return [Dropped(names[index.key(sample)], UNUSABLE, reason) for sample, reason in sorted(index.bad.items())]


def _write_report(report: Path, *lines: list[Dropped]) -> None:
    replace_file(report, (json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in chain(*lines)))
