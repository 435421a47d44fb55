"""Index files that other tools keep beside a shard, held against the shard itself.

Nothing is read by them; but they say what the shard was when it was made, so one that disagrees tells of a change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dydit_scale.data.tar import BLOCK, Member, split_name, walk_members

ENERGON, WEBSHART = "energon", "webshart"
MAX_INDEX_BYTES = 1 << 30


class ForeignIndexError(ValueError):
    """Another tool's index file does not describe its shard; the message names shard and member."""


def agreeing_indexes(path: Path, sha256: str) -> tuple[str, ...]:
    """The tools whose index files lie beside the shard ``path``; each was compared with all that a walk of it finds.

    Energon's is ``NAME.tar.idx``: where each sample begins and where the last one ends. That of webshart (and hfutils)
    is ``NAME.json``: each member's place and size, and often the shard's size and SHA-256; a JSON file without
    "files" is taken for something else. ForeignIndexError if one disagrees.
    """
    checks: dict[str, tuple[Path, Callable[[Path, Path, list[Member], str], bool]]] = {
        ENERGON: (path.with_name(f"{path.name}.idx"), _check_energon),
        WEBSHART: (path.with_suffix(".json"), _check_webshart),
    }
    present = {tool: pair for tool, pair in checks.items() if pair[0].is_file()}
    members = list(walk_members(path)) if present else []
    return tuple(tool for tool, (file, check) in present.items() if check(path, file, members, sha256))


def _check_energon(path: Path, file: Path, members: list[Member], sha256: str) -> bool:
    """Little-endian 64-bit offsets: of each sample's first header, and of the end mark."""
    data = _content(path, file)
    if len(data) % 8:
        raise _disagreement(path, file, f"has {len(data)} bytes, no multiple of 8")
    firsts = list(_firsts_of_samples(members))
    last = members[-1]
    expected = [*(member.header for member in firsts), last.offset + -(-last.size // BLOCK) * BLOCK]
    found = np.frombuffer(data, "<u8").tolist()
    for member, place, told in zip(firsts, expected, found, strict=False):
        if told != place:
            raise _disagreement(path, file, f"has {told} for the start of member {member.name!r}, which is at {place}")
    if len(found) != len(expected):
        raise _disagreement(path, file, f"lists {len(found) - 1} samples, expected {len(firsts)}")
    if found[-1] != expected[-1]:
        raise _disagreement(path, file, f"ends at {found[-1]}, the last member {last.name!r} at {expected[-1]}")
    return True


def _firsts_of_samples(members: Iterable[Member]) -> Iterable[Member]:
    key = None
    for member in members:
        if split_name(member.name)[0] != key:
            yield member
        key = split_name(member.name)[0]


def _check_webshart(path: Path, file: Path, members: list[Member], sha256: str) -> bool:
    try:
        content = json.loads(_content(path, file))
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict) or not isinstance(content.get("files"), (dict, list)):
        return False
    size, told = path.stat().st_size, content.get("filesize")
    if told not in (None, 0, size):
        raise _disagreement(path, file, f"says the shard has {told} bytes, but it has {size}")
    listed = _listed_members(path, file, content["files"])
    for member in members:
        place, entry = (member.offset, member.size), listed.pop(member.name, None)
        if entry != place:
            what = "does not list" if entry is None else f"has (offset, length) {entry} for"
            raise _disagreement(path, file, f"{what} member {member.name!r}, which lies at {place}")
    if listed:
        raise _disagreement(path, file, f"lists member {min(listed)!r}, which is not in the shard")
    if content.get("hash_lfs") not in (None, "", sha256):
        raise _disagreement(path, file, f"has hash_lfs {content['hash_lfs']!r}, but the shard's SHA-256 is {sha256}")
    return True


def _listed_members(path: Path, file: Path, files: dict[str, Any] | Sequence[Any]) -> dict[str, tuple[Any, Any]]:
    """Offset and length by name; the fields have had several names."""
    pairs = files.items() if isinstance(files, dict) else ((None, entry) for entry in files)
    listed = {}
    for name, entry in pairs:
        if not isinstance(entry, dict):
            raise _disagreement(path, file, f"holds {entry!r} where a member's offset and length belong")
        for alias in ("path", "fname", "filename"):
            name = entry.get(alias) if name is None else name
        listed[str(name)] = (entry.get("offset"), entry.get("length", entry.get("size")))
    return listed


def _content(path: Path, file: Path) -> bytes:
    if file.stat().st_size > MAX_INDEX_BYTES:
        raise _disagreement(path, file, f"has more bytes than the limit of {MAX_INDEX_BYTES}")
    return file.read_bytes()


def _disagreement(path: Path, file: Path, what: str) -> ForeignIndexError:
    return ForeignIndexError(
        f"{path.name}: {file.name} {what}. The shard was changed since, or the file belongs to another: restore the "
        f"shard, or remove {file.name} if the shard is right"
    )
