"""A strict walk over the headers of a tar shard.

The standard reader takes any damaged header for the end of the archive and drops the rest without a word; this one asks
for contiguous members inside the file, two zero blocks after the last of them and, up to the end of a record, nothing
but zeros behind those.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = 512
CHUNK = 1 << 20
RECORD = 20 * BLOCK
"""Tars are filled up with zeros to a multiple of this."""
ZEROS = bytes(BLOCK)
REPAIR = "copy the shard again from its source, or write it again"

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_MAX_EXTENSION_BYTES = 1 << 20
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")


class Member(NamedTuple):
    """One regular file of a shard: its name and where its bytes lie."""

    name: str
    offset: int
    size: int
    header: int
    """Where its header begins, or the first of the extended ones that belong to it."""


def split_name(name: str) -> tuple[str, str]:
    """``"a/000.seg.png"`` -> ``("a/000", "seg.png")``, as webdataset does: cut at the file name's first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def read_at(fd: int, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` without moving the descriptor's position; fewer if the file ends before."""
    parts = []
    while size > 0 and (part := os.pread(fd, min(size, 1 << 30), offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def fill(fd: int, offset: int, buffer: memoryview) -> int:
    """Read into a buffer from ``offset`` on; how many bytes there were before the file's end."""
    at = 0
    while at < len(buffer) and (count := os.preadv(fd, [buffer[at:]], offset + at)):
        at += count
    return at


def walk_members(path: Path) -> Iterator[Member]:
    """The regular members of the tar ``path`` in file order; errors as in ``walk_file``."""
    with path.open("rb") as file:
        yield from walk_file(file, path.name, os.fstat(file.fileno()).st_size)


def walk_file(file: BinaryIO, shard: str, end: int) -> Iterator[Member]:
    """The regular members of an open tar of ``end`` bytes in file order; moves the file's position.

    Raises ValueError, naming shard, sample and remedy, on a truncated, bit-flipped or zeroed header, data beyond the
    file's end, a missing end mark, data or too many zeros behind it, and on members that are no regular files or have
    unsafe names.
    """
    offset, start, place = 0, 0, f"{shard}: at its start"
    overrides: dict[str, str] = {}
    while (header := _read_header(file, offset, end, place)) is not None:
        extension = header.type in _EXTENSIONS
        name = header.name if extension else overrides.get("path", header.name)
        size = header.size if extension else int(overrides.get("size", header.size))
        data = offset + BLOCK
        if not extension:
            _check_member(shard, name, header.type)
            place = f"{shard}: sample {split_name(name)[0]!r}, member {name!r}"
        if size < 0 or data + size > end:
            raise ValueError(f"{place}: says {size} bytes at {data}, but the shard ends at {end}; {REPAIR}")
        offset = data + -(-size // BLOCK) * BLOCK
        if extension:
            overrides |= _read_extension(file, header, place)
            start = offset if header.type == tarfile.XGLTYPE else start
        else:
            yield Member(name, data, size, start)
            overrides, place = {}, f"{shard}: after sample {split_name(name)[0]!r}, member {name!r}"
            start = offset
    if overrides:
        raise ValueError(f"{place}: the end mark comes where a member was announced (zeroed bytes?); {REPAIR}")


def _read_header(file: BinaryIO, offset: int, end: int, place: str) -> tarfile.TarInfo | None:
    """The header at ``offset``, or None at a sound end of the archive."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        wanted = "the two zero blocks that end a tar" if not block else f"a whole header at byte {offset}"
        raise ValueError(f"{place}: the shard stops at byte {end} without {wanted} (truncated?); {REPAIR}")
    if block == ZEROS:
        _check_end(file, offset, end, place)
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(f"{place}: damaged tar header at byte {offset} ({error}); {REPAIR}") from error


def _check_end(file: BinaryIO, offset: int, end: int, place: str) -> None:
    if end < offset + 2 * BLOCK:
        raise ValueError(f"{place}: one zero block at byte {offset}, two end a tar (truncated?); {REPAIR}")
    file.seek(offset)
    while chunk := file.read(CHUNK):
        if chunk.strip(b"\0"):
            raise ValueError(
                f"{place}: an end mark at byte {offset}, but data behind it (a zeroed header, or joined tars); {REPAIR}"
            )
    if end - offset >= 2 * BLOCK + RECORD:
        raise ValueError(
            f"{place}: {end - offset} zero bytes from {offset} to the end, where a tar has fewer than "
            f"{2 * BLOCK + RECORD} (the rest was never written?); {REPAIR}"
        )


def _check_member(shard: str, name: str, kind: bytes) -> None:
    if kind not in _REGULAR:
        raise ValueError(
            f"{shard}: member {name!r} is a folder, link or device (tar type {kind!r}), expected regular files; "
            "write the shard again with the samples' files alone"
        )
    if name.startswith("/") or ".." in name.split("/") or _UNPRINTABLE.search(name):
        raise ValueError(
            f"{shard}: unsafe member name {name!r}, expected a relative UTF-8 path without '..' or controls; "
            "rename it and write the shard again"
        )
    if not all(split_name(name)):
        raise ValueError(
            f"{shard}: member {name!r} is no KEY.EXTENSION, so it belongs to no sample; rename it or leave it out"
        )


def _read_extension(file: BinaryIO, header: tarfile.TarInfo, place: str) -> dict[str, str]:
    """The path or size that a pax or GNU extension header gives the next member; the file stands behind the header."""
    if header.size > _MAX_EXTENSION_BYTES:
        raise ValueError(f"{place}: an extended tar header of {header.size} bytes; {REPAIR}")
    data = file.read(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    records = dict(_pax_records(data, place))
    if header.type in _PAX and not any(name.startswith("GNU.sparse") for name in records):
        size = records.get("size", "0")
        if not (size.isascii() and size.isdigit()):
            raise ValueError(f"{place}: an extended tar header gives the size {size!r}; {REPAIR}")
        return {name: records[name] for name in ("path", "size") if name in records}
    if {"path", "size"} & records.keys() or header.type in _PAX:
        raise ValueError(f"{place}: sparse files and global paths or sizes are not supported; write the shard again")
    return {}


def _pax_records(data: bytes, place: str) -> Iterator[tuple[str, str]]:
    """The records ``"LENGTH NAME=VALUE\\n"`` of a pax header."""
    at = 0
    while at < len(data):
        match = _PAX_RECORD.match(data, at)
        stop = at + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise ValueError(f"{place}: a malformed extended tar header; {REPAIR}")
        value = data[match.end() : stop - 1]
        yield match[2].decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")
        at = stop
