"""Is the data still what was indexed? Finds all that differs, not only the first of it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dydit_scale.data.encoded import EMPTY_FILE, ENCODERS_FILE, read_empty
from dydit_scale.data.index import (
    INDEX_FILE,
    ShardIndex,
    ShardInfo,
    changed_shards,
    file_sha256,
    find_shards,
    read_index,
)
from dydit_scale.data.processes import Advance, run_jobs
from dydit_scale.data.tar import read_at


class Checked(NamedTuple):
    """What a check found."""

    findings: tuple[str, ...]
    """All that is wrong, each in a line; empty if the data is what was indexed."""
    shards: tuple[ShardInfo, ...]
    """The shards that the index lists."""


def check_shards(
    folder: Path | str,
    *,
    quick: bool = False,
    workers: int = 1,
    progress: bool = True,
    tell: Callable[[str], object] = lambda line: None,
) -> Checked:
    """Compare a folder with its index: the index's own files by SHA-256, the shards by name, size and SHA-256.

    Where a shard differs, the CRC32 of its samples' pictures, clips and captions says which of them are hit; other
    members have no checksum of their own.

    Args:
        quick: leave the bytes of the shards unread.
        workers: Processes that read.
        tell: gets each finding as soon as it is there.

    Raises ValueError on a folder without an index, saying what to run.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        count = len(find_shards(folder))
        raise ValueError(f"{folder}: {count} shards, but no {INDEX_FILE} to compare with; {_again(folder)}")
    shards, findings = _read_listing(folder), []
    for finding in _findings(folder, shards, quick, workers, progress):
        findings.append(finding)
        tell(finding)
    return Checked(tuple(findings), shards)


def _read_listing(folder: Path) -> tuple[ShardInfo, ...]:
    """The shards by index.json alone, so that a torn array hides nothing of them."""
    try:
        return tuple(ShardInfo(**shard) for shard in json.loads((folder / INDEX_FILE).read_bytes())["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {INDEX_FILE} itself cannot be read ({error}); {_again(folder)}") from error


def _findings(folder: Path, shards: tuple[ShardInfo, ...], quick: bool, workers: int, progress: bool) -> Iterator[str]:
    index, broken = None, {}
    try:
        index = read_index(folder)
        broken = index.broken
        if index.encoding is not None:
            read_empty(folder, index.encoding)
    except ValueError as error:
        encoded = (folder / ENCODERS_FILE).is_file()
        what = "restore its files from their source, or encode the data again" if encoded else _again(folder)
        yield f"{INDEX_FILE if index is None else EMPTY_FILE}: torn or foreign ({error}); {what}"
    yield from changed_shards(folder, shards, broken)
    present = [number for number, shard in enumerate(shards) if (folder / shard.name).is_file()]
    if quick or not present:
        return
    paths = [folder / shards[number].name for number in present]
    digests = run_jobs(
        read_sha256,
        paths,
        workers=min(workers, len(paths)),
        total_bytes=sum(path.stat().st_size for path in paths),
        title="checking",
        progress=progress,
    )
    for number, (sha256, trouble) in zip(present, digests, strict=True):
        if trouble:
            yield f"{shards[number].name}: cannot be read ({trouble}); copy it again from its source"
        elif sha256 != shards[number].sha256:
            yield from _changed_shard(folder, shards[number], number, index)


def read_sha256(path: Path, advance: Advance) -> tuple[str, str]:
    """The digest of a file, or why there is none."""
    try:
        return file_sha256(path, advance), ""
    except OSError as error:
        return "", str(error)


def _changed_shard(folder: Path, shard: ShardInfo, number: int, index: ShardIndex | None) -> Iterator[str]:
    differs = f"{shard.name}: its SHA-256 is not the one indexed"
    if index is None:
        yield f"{differs}; which samples are hit cannot be told without a whole index"
        return
    hit = dict(_changed_samples(folder / shard.name, index, number))
    if len(hit) == shard.count:
        yield f"{differs}, nor is any of its {shard.count} samples: another file under its name, or moved bytes"
    elif hit:
        yield f"{differs}; {len(hit)} of {shard.count} samples are hit"
        yield from (f"{index.name(sample)}: {what}" for sample, what in hit.items())
    else:
        yield f"{differs}, but its {shard.count} samples are whole: headers, labels or other members changed"


def _changed_samples(path: Path, index: ShardIndex, number: int) -> Iterator[tuple[int, str]]:
    """The samples of a shard with a part whose bytes are not those indexed, and which parts."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for sample in range(*index.starts[number : number + 2]):
            place = index.record(sample)
            media = "clip" if index.frames is not None and index.frames[sample] else "picture"
            wrong = [
                name
                for part, name in ((place.image, media), (place.caption, "caption"))
                if part.offset and zlib.crc32(read_at(fd, part.offset, part.bytes)) != part.crc
            ]
            if wrong:
                yield sample, f"{' and '.join(wrong)} changed since indexed (CRC32)"
    finally:
        os.close(fd)


def _again(folder: Path) -> str:
    return f"run `dydit data index {folder}`"
