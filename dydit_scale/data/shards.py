"""Shards: write samples as webdataset tars, and index a folder of such tars.

Readers never open a tar as a stream: they go by the index, so what is wrong with a shard is found while indexing it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from numpy.lib.recfunctions import repack_fields
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
from dydit_scale.data.index import (
    INDEX_FILE,
    SAMPLE,
    ShardIndex,
    ShardInfo,
    compute_digest,
    file_sha256,
    find_shards,
    load_index,
    save_index,
)
from dydit_scale.data.remote import is_url
from dydit_scale.data.tar import REPAIR, Member, read_at, split_name, walk_members
from dydit_scale.data.video import MAX_VIDEO_BYTES, VIDEO_EXTENSIONS, MissingPackageError, scan_clip

__all__ = ["ShardIndex", "ShardInfo", "build_index", "load_index", "write_shards"]

_SCANNED = np.dtype([*SAMPLE.descr, ("frames", "<i4"), ("label", "<i8")])
"""What a scan finds of a sample; frames and labels become arrays of their own."""


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


def build_index(folder: Path | str, *, bad_shards: int = 0, progress: bool = True) -> ShardIndex:
    """Index the ``*.tar`` files of ``folder``: a strict walk, then a checksum and a trial decode of every sample.

    The tars stay as they are; ``index.json`` and its arrays are written beside them.
    A sample holds one picture or clip, and a caption (``.txt``), a label (``.cls``) or both; what has no file of its
    own may stand in a ``.json`` under "caption" and "label". Samples without them, or with broken ones, stay in the
    index as ``bad``, with the reason.

    Args:
        bad_shards: How many broken tars to leave out; they are named in the index as ``broken``.

    Raises ValueError naming shard and sample on a damaged or truncated tar, a shard without samples, members that are
    no regular files or have unsafe names, once there are more of them than ``bad_shards``; on a key that comes twice;
    and on a folder without shards, saying what to run. MissingPackageError where there are clips and no PyAV.
    """
    if is_url(str(folder)):
        raise ValueError(f"{folder}: index the shards' local folder and upload all of it, index included")
    folder = Path(folder)
    shards: list[ShardInfo] = []
    scanned: list[Scanned] = []
    broken: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path in tqdm(find_shards(folder), desc="indexing", unit="shard", disable=None if progress else True):
        try:
            found = _whole_shard(path)
        except MissingPackageError:
            raise
        except ValueError as error:
            broken[path.name] = str(error)
            _check_budget(broken, bad_shards)
            continue
        for sample in found:
            if owners.setdefault(sample.key, path.name) != path.name:
                raise ValueError(
                    f"{path.name}: sample {sample.key!r} is also in {owners[sample.key]}; keys must differ, rename one"
                )
        scanned += found
        shards.append(ShardInfo(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path), count=len(found)))
    if not scanned:
        raise ValueError(f"{folder}: every shard is broken: {'; '.join(broken.values())}")
    rows = np.stack([sample.row for sample in scanned])
    rows["key_end"] = np.cumsum([len(sample.key.encode()) for sample in scanned])
    index = ShardIndex(
        folder=folder,
        shards=tuple(shards),
        digest="",
        samples=repack_fields(rows[list(SAMPLE.names or ())]),
        key_bytes=np.frombuffer("".join(sample.key for sample in scanned).encode(), np.uint8),
        bad={n: sample.reason for n, sample in enumerate(scanned) if sample.reason is not None},
        broken=broken,
        labels=rows["label"].copy() if (rows["label"] >= 0).any() else None,
        frames=rows["frames"].copy() if rows["frames"].any() else None,
    )
    index = replace(index, digest=compute_digest(index))
    save_index(index)
    return index


class Scanned(NamedTuple):
    """One sample as found in its tar."""

    key: str
    row: np.ndarray
    """A record of ``_SCANNED``."""
    reason: str | None
    """Why it is bad, if it is."""


def _whole_shard(path: Path) -> list[Scanned]:
    found = [Scanned(*sample) for sample in _scan_shard(path)]
    if not found:
        raise ValueError(f"{path.name}: holds no samples; remove it, or {REPAIR}")
    return found


def _check_budget(broken: dict[str, str], bad_shards: int) -> None:
    if len(broken) > bad_shards:
        hint = f" ({len(broken)} broken shards, {bad_shards} allowed by --bad-shards)" if bad_shards else ""
        raise ValueError("; ".join(broken.values()) + hint)


def _scan_shard(path: Path) -> Iterator[tuple[str, np.ndarray, str | None]]:
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
            row = np.zeros((), _SCANNED)
            yield key, row, _scan_sample(file.fileno(), members, row)


def _scan_sample(fd: int, members: dict[str, Member], row: np.ndarray) -> str | None:
    """Fill a sample's index record; the reason if the sample is bad."""
    row["label"] = -1
    try:
        _scan_media(fd, members, row)
        _scan_texts(fd, members, row)
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
        row["frames"], row["width"], row["height"] = scan_clip(data)
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
        if text is None and found.caption is not None:
            row["caption_is_json"] = True
            _note(row, "caption", fields, data)
        if label is None and found.label is not None:
            row["label"] = found.label
    if not row["caption_offset"] and row["label"] < 0:
        raise BadSampleError(
            "caption missing, and label: neither .txt nor .cls, and "
            + ("no .json" if fields is None else 'the .json holds no string under "caption" nor integer under "label"')
        )


def _read(fd: int, part: str, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise BadSampleError(f"{part} of {member.size} bytes, more than the limit of {limit}")
    return read_at(fd, member.offset, member.size)


def _note(row: np.ndarray, part: str, member: Member, data: bytes) -> None:
    row[f"{part}_offset"], row[f"{part}_bytes"], row[f"{part}_crc"] = member.offset, member.size, zlib.crc32(data)
