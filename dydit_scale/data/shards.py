"""Shards: write samples as webdataset tars, and index a folder of such tars.

Readers never open a tar as a stream: they go by the index, so what is wrong with a shard is found while indexing it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from tqdm import tqdm

from dydit_scale.data.decode import (
    CAPTION_EXTENSION,
    FIELDS_EXTENSION,
    IMAGE_EXTENSIONS,
    LABEL_EXTENSION,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    BadSampleError,
    decode_caption,
    decode_fields,
    decode_image,
    decode_label,
)
from dydit_scale.data.encoded import (
    ENTRY_EXTENSION,
    MAX_ENTRY_BYTES,
    MAX_TENSOR_BYTES,
    TENSORS_EXTENSION,
    Encoding,
    check_tensors,
    decode_entry,
    decode_tensors,
    find_encoding,
    read_empty,
)
from dydit_scale.data.foreign import ForeignIndexError, agreeing_indexes
from dydit_scale.data.gather import SCANNED, Gatherer, ScannedShard, slice_index
from dydit_scale.data.index import (
    INDEX_FILE,
    ShardIndex,
    ShardInfo,
    explain_unwritten,
    file_sha256,
    find_shards,
    load_index,
    read_index,
    save_index,
)
from dydit_scale.data.processes import Advance, run_jobs
from dydit_scale.data.remote import is_url
from dydit_scale.data.tar import REPAIR, Member, read_at, split_name, walk_members
from dydit_scale.data.video import MAX_VIDEO_BYTES, VIDEO_EXTENSIONS, MissingPackageError, scan_clip

__all__ = ["ShardIndex", "ShardInfo", "build_index", "index_folder", "load_index", "write_shards"]

READ_EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, CAPTION_EXTENSION, LABEL_EXTENSION, FIELDS_EXTENSION)
"""All that is read of a sample that is not encoded; the bytes of other members are never looked at."""


def write_shards(
    samples: Iterable[dict[str, bytes | str]], out: Path | str, *, samples_per_shard: int, progress: bool = True
) -> ShardIndex:
    """Write samples as ``out/shard-000000.tar``, ... and index them; the same samples give the same bytes.

    Args:
        samples: ``{"__key__": "000001", "png": bytes, "txt": caption, ...}``; strings are written in UTF-8.
        out: a folder without shards; all shards appear in it at the end, or none.
        samples_per_shard: the last shard may hold fewer.
        progress: show a bar on a terminal.

    Raises ValueError when ``out`` holds shards or an index already, there are no samples, or a key is unfit for a tar.
    """
    out = Path(out)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    out.mkdir(parents=True, exist_ok=True)
    held = sorted(path.name for path in (*out.glob("*.tar"), *out.glob(INDEX_FILE)))
    if held:
        raise ValueError(
            f"{out}: already holds shards ({', '.join(held[:5])}); choose another folder, or remove them first"
        )
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=out))
    try:
        _write_tars(samples, aside, samples_per_shard, progress)
        build_index(aside, progress=progress)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == INDEX_FILE):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(aside)
    return load_index(out)


def _write_tars(
    samples: Iterable[dict[str, bytes | str]], folder: Path, samples_per_shard: int, progress: bool
) -> None:
    pattern = f"{folder.resolve()}/".replace("%", "%%") + "shard-%06d.tar"
    limits = {"maxcount": samples_per_shard, "maxsize": float("inf")}
    with webdataset.ShardWriter(pattern, **limits, encoder=False, mtime=0, verbose=0) as writer:
        for sample in tqdm(samples, desc="writing shards", unit="sample", disable=None if progress else True):
            _check_key(sample.get("__key__"))
            writer.write({k: v.encode() if isinstance(v, str) and k != "__key__" else v for k, v in sample.items()})
        if not writer.total:
            raise ValueError("no samples to write: the source is empty")


def _check_key(key: object) -> None:
    if not isinstance(key, str) or split_name(f"{key}.txt") != (key, "txt") or key.endswith("/"):
        raise ValueError(
            f'sample key {key!r}: expected a name under "__key__" without dots, since its first dot would end it'
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Indexed:
    """What ``dydit data index`` did."""

    index: ShardIndex
    reused: int
    """Shards whose part of the old index was kept."""
    foreign: dict[str, int]
    """By tool: shards beside which an index file of another tool was found to agree."""


def build_index(folder: Path | str, *, bad_shards: int = 0, progress: bool = True) -> ShardIndex:
    """The index of ``index_folder``, made in this process."""
    return index_folder(folder, bad_shards=bad_shards, progress=progress).index


def index_folder(
    folder: Path | str, *, bad_shards: int = 0, workers: int = 1, update: bool = False, progress: bool = True
) -> Indexed:
    """Index the ``*.tar`` files of ``folder``: a strict walk, then a checksum and a trial decode of every sample.

    The tars stay as they are; ``index.json`` and its arrays are written beside them, the same for any number of
    workers. A sample holds one picture or clip, and a caption (``.txt``), a label (``.cls``) or both; what has no file
    of its own may stand in a ``.json`` under "caption" ("captions" if there are several) and "label". Samples without
    them, or with broken ones, stay in the index as ``bad``, with the reason. Members with other extensions are counted
    as ``ignored`` and never read. Where the folder has an ``encoders.json``, its samples are encoded ones (see
    encoded.py).

    Args:
        bad_shards: How many broken tars to leave out; they are named in the index as ``broken``.
        workers: Processes that read and decode.
        update: Keep what the index that is there says of shards with an unchanged SHA-256; the others are scanned.

    Raises ValueError naming shard and sample on a damaged or truncated tar, a shard without samples, members that are
    no regular files or have unsafe names, once there are more of them than ``bad_shards``; on a key that comes twice;
    on an index file of another tool that does not describe its shard; on a folder that cannot be written, before
    anything is read, and on a full disk, which leaves an index that is there as it is; and on a folder without shards,
    saying what to run. MissingPackageError where there are clips and no PyAV.
    """
    if is_url(str(folder)):
        raise ValueError(f"{folder}: index the shards' local folder and upload all of it, index included")
    folder = Path(folder)
    encoding = find_encoding(folder)
    if encoding is not None:
        read_empty(folder, encoding)
    paths = find_shards(folder)
    old = _old_index(folder) if update else None
    if old is not None and (
        old.encoding != encoding or (encoding is None and old.frames is not None and old.seconds is None)
    ):
        old = None  # it says of clips what an index of an earlier version did, which is less
    numbers = {} if old is None else {shard.name: number for number, shard in enumerate(old.shards)}
    known = [None if old is None or path.name not in numbers else old.shards[numbers[path.name]] for path in paths]
    results = run_jobs(
        partial(_index_shard, encoding=encoding),
        list(zip(paths, known, strict=True)),
        workers=min(workers, len(paths)),
        total_bytes=sum(path.stat().st_size for path in paths),
        title="indexing",
        progress=progress,
    )
    broken: dict[str, str] = {}
    foreign: Counter[str] = Counter()
    reused = 0
    with explain_unwritten(folder), Gatherer(folder) as gatherer, closing(results):
        for path, found in zip(paths, results, strict=True):
            if isinstance(found, str):
                broken[path.name] = found
                _check_budget(broken, bad_shards)
                continue
            if isinstance(found, _Unchanged):
                assert old is not None
                reused += 1
                found = slice_index(old, numbers[path.name])._replace(foreign=found.foreign, ignored=found.ignored)
            gatherer.add(found)
            foreign.update(found.foreign)
        if len(broken) == len(paths):
            raise ValueError(f"{folder}: every shard is broken: {'; '.join(broken.values())}")
        save_index(gatherer.index(broken, encoding))
    return Indexed(index=load_index(folder), reused=reused, foreign=dict(foreign))


class _Unchanged(NamedTuple):
    """A shard that the old index describes."""

    foreign: tuple[str, ...]
    ignored: dict[str, int]


def _old_index(folder: Path) -> ShardIndex | None:
    try:
        return read_index(folder)
    except ValueError:
        return None


def _index_shard(
    job: tuple[Path, ShardInfo | None], advance: Advance, encoding: Encoding | None
) -> ScannedShard | _Unchanged | str:
    """What a shard holds, or that it is as known, or why it is broken."""
    path, known = job
    try:
        size, sha256 = path.stat().st_size, file_sha256(path)
        if known is not None and known.sha256 == sha256:
            advance(size)
            return _Unchanged(agreeing_indexes(path, sha256), _count_ignored(path, encoding))
        keys, rows, bad = _scan_whole(path, encoding, advance)
        info = ShardInfo(name=path.name, bytes=size, sha256=sha256, count=len(rows))
        return ScannedShard(info, rows, keys, bad, agreeing_indexes(path, sha256), _count_ignored(path, encoding))
    except (MissingPackageError, ForeignIndexError):
        raise
    except OSError as error:
        return f"{path.name}: cannot be read ({error}); {REPAIR}"
    except ValueError as error:
        return str(error)


def _count_ignored(path: Path, encoding: Encoding | None) -> dict[str, int]:
    """Members that are no part of a sample, by extension; encoded samples may have none."""
    extensions = (split_name(member.name)[1] for member in walk_members(path))
    return {} if encoding is not None else dict(Counter(name for name in extensions if name not in READ_EXTENSIONS))


def _scan_whole(path: Path, encoding: Encoding | None, advance: Advance) -> tuple[bytes, np.ndarray, dict[int, str]]:
    """Keys, records and bad rows of a shard."""
    keys: list[bytes] = []
    rows: list[np.ndarray] = []
    bad: dict[int, str] = {}
    told = 0
    for key, row, reason in _scan_shard(path, encoding):
        keys.append(key.encode())
        rows.append(row)
        if reason is not None:
            bad[len(rows) - 1] = reason
        end = int(row["image_offset"] + row["image_bytes"])
        if end > told:
            advance(end - told)
            told = end
    if not rows:
        raise ValueError(f"{path.name}: holds no samples; remove it, or {REPAIR}")
    advance(path.stat().st_size - told)
    scanned = np.stack(rows)
    scanned["key_end"] = np.cumsum([len(key) for key in keys])
    return b"".join(keys), scanned, bad


def _check_budget(broken: dict[str, str], bad_shards: int) -> None:
    if len(broken) > bad_shards:
        hint = f" ({len(broken)} broken shards, {bad_shards} allowed by --bad-shards)" if bad_shards else ""
        raise ValueError("; ".join(broken.values()) + hint)


def _scan_shard(path: Path, encoding: Encoding | None) -> Iterator[tuple[str, np.ndarray, str | None]]:
    """Key, index record and, if bad, the reason for each sample: consecutive members with the same key."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for key, group in groupby(walk_members(path), key=lambda member: split_name(member.name)[0]):
            members: dict[str, Member] = {}
            for member in group:
                extension = split_name(member.name)[1]
                if extension in members:
                    raise ValueError(
                        f"{path.name}: sample {key!r} holds {extension!r} twice (two samples with one key?); rename one"
                    )
                members[extension] = member
            if key in seen:
                raise ValueError(
                    f"{path.name}: sample {key!r} comes twice, with other samples between; give the second another "
                    "key or, if its files belong together, write the shard again in the order of the files' names"
                )
            seen.add(key)
            row = np.zeros((), SCANNED)
            yield key, row, _scan_sample(file.fileno(), members, row, (path.name, key), encoding)


def _scan_sample(
    fd: int, members: dict[str, Member], row: np.ndarray, place: tuple[str, str], encoding: Encoding | None
) -> str | None:
    """Fill the index record of the sample at ``place`` (shard, key); the reason if the sample is bad."""
    row["label"] = -1
    try:
        if encoding is None:
            _scan_media(fd, members, row)
            _scan_texts(fd, members, row)
        else:
            _scan_encoded(fd, members, row, place, encoding)
    except BadSampleError as error:
        return str(error)
    return None


def _scan_media(fd: int, members: dict[str, Member], row: np.ndarray) -> None:
    """The picture or clip: decoded as a trial."""
    found = [extension for extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) if extension in members]
    if len(found) != 1:
        text = f"two images ({', '.join(found)})" if found else f"image missing (found: {', '.join(sorted(members))})"
        raise BadSampleError(f"{text}, expected one of {', '.join((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))}")
    member = members[found[0]]
    if found[0] in VIDEO_EXTENSIONS:
        data = _read(fd, "video", member, MAX_VIDEO_BYTES)
        row["frames"], row["width"], row["height"], row["seconds"] = scan_clip(data)
    else:
        data = _read(fd, "image", member, MAX_IMAGE_BYTES)
        row["width"], row["height"] = decode_image(data).size
    _note(row, "image", member, data)


def _scan_texts(fd: int, members: dict[str, Member], row: np.ndarray) -> None:
    """Caption and label, of which one will do."""
    text, label, fields = (members.get(name) for name in (CAPTION_EXTENSION, LABEL_EXTENSION, FIELDS_EXTENSION))
    if text is not None:
        data = _read(fd, "caption", text, MAX_CAPTION_BYTES)
        decode_caption(data)
        _note(row, "caption", text, data)
    if label is not None:
        row["label"] = decode_label(_read(fd, "label", label, MAX_LABEL_BYTES))
    if fields is not None and (text is None or label is None):
        data = _read(fd, "caption", fields, MAX_CAPTION_BYTES)
        found = decode_fields(data)
        if text is None and found.captions:
            row["caption_is_json"] = True
            _note(row, "caption", fields, data)
        if label is None and found.label is not None:
            row["label"] = found.label
    if not row["caption_offset"] and row["label"] < 0:
        raise BadSampleError(
            "caption missing, and label: neither .txt nor .cls, and "
            + ("no .json" if fields is None else 'the .json holds no string under "caption" nor integer under "label"')
        )


def _scan_encoded(
    fd: int, members: dict[str, Member], row: np.ndarray, place: tuple[str, str], encoding: Encoding
) -> None:
    """Entry and tensors: loaded as a trial."""
    entry_file, tensor_file = (members.get(name) for name in (ENTRY_EXTENSION, TENSORS_EXTENSION))
    if entry_file is None or members.keys() - {ENTRY_EXTENSION, TENSORS_EXTENSION}:
        raise BadSampleError(
            f"{', '.join(sorted(members))} in an encoded sample, expected {ENTRY_EXTENSION} and {TENSORS_EXTENSION}"
        )
    entry_data = _read(fd, "entry", entry_file, MAX_ENTRY_BYTES)
    entry = decode_entry(entry_data)
    row["width"], row["height"], row["frames"] = entry.source.width, entry.source.height, entry.frames
    row["label"], row["caption_is_json"] = entry.label, True
    _note(row, "caption", entry_file, entry_data)
    if (entry.source.shard, entry.source.key) != place:
        raise BadSampleError(f"the entry is of {entry.source.shard} sample {entry.source.key!r}: renamed or moved")
    if entry.bad is not None:
        raise BadSampleError(entry.bad)
    if [entry.height, entry.width] not in encoding.sizes:
        raise BadSampleError(f"{entry.height} x {entry.width} pixels were encoded, which encoders.json does not name")
    if tensor_file is None:
        raise BadSampleError(f"no {TENSORS_EXTENSION} beside the entry")
    data = _read(fd, "encoded sample", tensor_file, MAX_TENSOR_BYTES)
    check_tensors(data, entry_data, decode_tensors(data, entry, encoding), encoding)
    _note(row, "image", tensor_file, data)


def _read(fd: int, part: str, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise BadSampleError(f"{part} of {member.size} bytes, more than the limit of {limit}")
    return read_at(fd, member.offset, member.size)


def _note(row: np.ndarray, part: str, member: Member, data: bytes) -> None:
    row[f"{part}_offset"], row[f"{part}_bytes"], row[f"{part}_crc"] = member.offset, member.size, zlib.crc32(data)
