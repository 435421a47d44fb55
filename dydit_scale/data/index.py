"""The index of a folder of shards: where each sample's bytes lie, their checksums, and a digest of it all.

On disk it is ``index.json`` beside the shards plus four arrays, and one more each where there are labels or clips. The
arrays are mapped, and only the pages that were looked at lately count as memory. They are renamed into place first and
``index.json``, which holds their SHA-256, last: a torn index is seen when it is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shlex
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dydit_scale.data.cache import FileCache, Wanted
from dydit_scale.data.encoded import ENCODERS_FILE, Encoding, encoding_digest, find_encoding
from dydit_scale.data.records import PLACES, SAMPLE, SIZES, Columns, Record, pack, unpack_record, unpacked
from dydit_scale.data.remote import RemoteError, RemoteFolder, is_url

INDEX_FILE = "index.json"
SAMPLES_FILE = "index-samples.npy"
KEYS_FILE = "index-keys.npy"
LABELS_FILE = "index-labels.npy"
FRAMES_FILE = "index-frames.npy"
SECONDS_FILE = "index-seconds.npy"
SIZES_FILE = "index-sizes.npy"
KEY_ENDS_FILE = "index-key-ends.npy"
FORMAT = "dydit-index-v2"
FORMAT_1 = "dydit-index-v1"
"""Held all samples written out as ``records.SAMPLE``; the digest still counts them so."""

_OPTIONAL = {name: np.dtype(kind) for name, kind in ((LABELS_FILE, "<i8"), (FRAMES_FILE, "<i4"), (SECONDS_FILE, "<f8"))}


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard as it was when it was indexed."""

    name: str
    """File name inside the folder."""
    bytes: int
    """File size."""
    sha256: str
    """Of the whole file, in hex."""
    count: int
    """Samples in the shard, bad ones included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """All samples of a folder of shards, numbered shard by shard in the order of ``shards``."""

    folder: Path
    """Where the shards are; of shards in an object store, where their index is kept."""
    shards: tuple[ShardInfo, ...]
    """In the order of their names."""
    digest: str
    """SHA-256 (hex) over all that defines the samples: shard names and counts, places, checksums, keys, bad ones."""
    columns: Columns
    """Where the samples lie, and their sizes; read-only."""
    key_bytes: np.ndarray
    """uint8: all keys in UTF-8, one after the other; ``columns.key_ends`` says where each ends."""
    bad: dict[int, str]
    """Samples that were unusable when indexed, and why."""
    broken: dict[str, str] = field(default_factory=dict)
    """Shards that were left out because their tar is broken, and why."""
    labels: np.ndarray | None = None
    """int64 [num_samples], -1 for samples without one; None if no sample has a label."""
    frames: np.ndarray | None = None
    """int32 [num_samples], 0 for pictures; None if no sample is a clip."""
    encoding: Encoding | None = None
    """How the samples were encoded; None for pictures and clips."""
    seconds: np.ndarray | None = None
    """float64 [num_samples], how long each clip lasts: 0 for pictures and for clips whose frames' times do not rise;
    None if no sample is a clip, and in indexes that were made before there was ``data.fps``."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many members of each extension are no part of a sample and are never read."""
    remote: RemoteFolder | None = None
    """The object store that holds the shards, if one does."""
    cache: FileCache | None = None
    """Where whole shards of the object store are kept on this node; None reads them by ranges."""

    @property
    def home(self) -> Path | RemoteFolder:
        """Where the shards are, and what lies beside them."""
        return self.remote or self.folder

    @property
    def place(self) -> str:
        """Where the shards are, for messages."""
        return str(self.home)

    @property
    def num_samples(self) -> int:
        """Samples in all shards, bad ones included."""
        return len(self.columns.places)

    @cached_property
    def starts(self) -> list[int]:
        """[shards + 1], the number of each shard's first sample, and the end."""
        return list(accumulate((shard.count for shard in self.shards), initial=0))

    @property
    def good(self) -> np.ndarray:
        """bool [num_samples], which samples are not bad."""
        good = np.ones(self.num_samples, dtype=bool)
        good[list(self.bad)] = False
        return good

    @property
    def has_caption(self) -> np.ndarray:
        """bool [num_samples]; encoded samples count as having one."""
        return np.asarray(self.columns.places["caption_gap"] != 0)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect_right(self.starts, sample) - 1

    def record(self, sample: int) -> Record:
        """Where a sample's files lie in its shard."""
        return unpack_record(self.columns.places[sample])

    def key(self, sample: int) -> str:
        """A sample's key."""
        ends = self.columns.key_ends
        start = ends[sample - 1] if sample else 0
        return self.key_bytes[start : ends[sample]].tobytes().decode()

    def name(self, sample: int) -> str:
        """A sample as messages name it: shard and key."""
        return f"{self.shards[self.shard_of(sample)].name} sample {self.key(sample)!r}"

    def release(self) -> None:
        """Give back the pages of the mapped arrays; they are mapped again when they are looked at."""
        for array in _arrays(self).values():
            owner: Any = array
            while isinstance(owner, np.ndarray):
                owner = owner.base
            if isinstance(owner, mmap.mmap):
                owner.madvise(mmap.MADV_DONTNEED)


def compute_digest(index: ShardIndex) -> str:
    """What ``index.digest`` must be; a copy of the shards elsewhere, or with other times in their headers, has the
    same."""
    shards = [[shard.name, shard.count] for shard in index.shards]
    header = {"format": FORMAT_1, "shards": shards, "bad": sorted(index.bad)}
    if index.encoding is not None:
        header["encoding"] = encoding_digest(index.encoding)
    digest = hashlib.sha256(json.dumps(header).encode())
    for rows in unpacked(index.columns):
        digest.update(rows.view(np.uint8).data)
    for name, array in _arrays(index).items():
        if name == KEYS_FILE or name in _OPTIONAL:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    """The arrays that an index has, by the files that hold them."""
    places, sizes, key_ends = index.columns
    arrays = {SAMPLES_FILE: places, SIZES_FILE: sizes, KEY_ENDS_FILE: key_ends, KEYS_FILE: index.key_bytes}
    optional = {LABELS_FILE: index.labels, FRAMES_FILE: index.frames, SECONDS_FILE: index.seconds}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def find_shards(folder: Path) -> list[Path]:
    """The ``*.tar`` files of a folder by name; ValueError, saying what to run, where there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of shards; {_how_to_get_shards(folder)}")
    packed = sorted(
        p.name for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"))
    )
    if packed:
        raise ValueError(
            f"{folder}: compressed shards ({', '.join(packed[:5])}) cannot be read at random; unpack them to .tar"
        )
    shards = sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))
    odd = [p.name for p in shards if not p.is_file()]
    if odd:
        raise ValueError(f"{folder}: no regular files, or links to none: {', '.join(odd[:5])}; remove or rename them")
    if not shards:
        raise ValueError(f"{folder}: holds no shards (*.tar); {_how_to_get_shards(folder)}")
    return shards


def save_index(index: ShardIndex) -> None:
    """Write an index beside its shards: all of it aside first, then renamed, ``index.json`` last."""
    with tempfile.TemporaryDirectory(prefix=".index-", dir=index.folder) as aside:
        hashes = {}
        for name, array in _arrays(index).items():
            _write_synced(Path(aside, name), partial(np.save, arr=array, allow_pickle=False))
            hashes[name] = file_sha256(Path(aside, name))
        content = {
            "format": FORMAT,
            "digest": index.digest,
            "shards": [asdict(shard) for shard in index.shards],
            "arrays": hashes,
            "broken": index.broken,
            "ignored": index.ignored,
            "bad": [{"sample": s, "name": index.name(s), "reason": reason} for s, reason in sorted(index.bad.items())],
        }
        if index.encoding is not None:
            content["encoding"] = encoding_digest(index.encoding)
        text = json.dumps(content, indent=1, ensure_ascii=False).encode()
        _write_synced(Path(aside, INDEX_FILE), lambda file: file.write(text))
        for name in (*hashes, INDEX_FILE):
            os.replace(Path(aside, name), index.folder / name)
    for name in _OPTIONAL.keys() - hashes.keys():
        (index.folder / name).unlink(missing_ok=True)


@contextmanager
def explain_unwritten(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk, or of a folder that cannot be written, into a ValueError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"{folder}: the disk is full ({error}), so no index was written; free some space, room for the index "
                "three times, and run it again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(
                f"{folder}: no index can be written beside the shards ({error}); index a folder of links to them: "
                f"mkdir LINKS && ln -s {shlex.quote(str(folder.resolve()))}/* LINKS && dydit data index LINKS"
            ) from error
        raise


def load_index(folder: Path | str, cache: FileCache | None = None) -> ShardIndex:
    """The index of ``folder``, checked against the shards there by name and size.

    Args:
        folder: a local folder, or the URL of one in an object store.
        cache: keeps the index and the shards of an object store on this node.

    Raises ValueError that says what to run: on a folder without shards, a missing or torn index, and, naming
    every shard concerned, on shards that are missing, of another size, or not in the index; and on what
    ``remote.is_url`` and ``RemoteFolder`` refuse.
    """
    if is_url(str(folder)):
        return _load_remote(RemoteFolder(str(folder)), cache)
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        count = len(find_shards(folder))
        raise ValueError(f"{folder}: {count} shards but no {INDEX_FILE}; {_how_to_index(folder)}")
    try:
        index = read_index(folder)
    except ValueError as error:
        raise ValueError(f"{folder}: torn or foreign index ({error}); {_how_to_index(folder)}") from error
    _check_shards(index, changed_shards(folder, index.shards, index.broken))
    return index


def read_index(folder: Path) -> ShardIndex:
    """The index of ``folder`` without a look at the shards; ValueError if it is missing, torn or foreign."""

    def verified(name: str, sha256: str) -> Path:
        if file_sha256(folder / name) != sha256:
            raise ValueError(f"{name} does not belong to {INDEX_FILE}")
        return folder / name

    try:
        return _read_index(folder, (folder / INDEX_FILE).read_bytes(), verified, find_encoding(folder))
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)) from error


def _load_remote(remote: RemoteFolder, cache: FileCache | None) -> ShardIndex:
    """The index of an object store; its arrays are mapped from the cache, or from files that are gone once mapped."""
    size = remote.size(INDEX_FILE)
    if size is None:
        raise ValueError(
            f"{remote}: holds no {INDEX_FILE} (or does not tell its size); run `dydit data index` on the shards' local "
            "folder and upload all of it"
        )
    text = remote.read(INDEX_FILE, 0, size)
    encoding = find_encoding(remote) if b'"encoding":' in text else None
    with tempfile.TemporaryDirectory() as passing, ExitStack() as in_use:
        folders = [*([cache] if cache else []), FileCache(Path(passing), sys.maxsize)]

        def fetched(name: str, sha256: str) -> Path:
            length = remote.size(name)
            if length is None:
                raise ValueError(f"{remote}/{name} is missing")
            wanted = Wanted(name=f"{remote}/{name}", size=length, sha256=sha256)

            def chunks() -> Iterator[bytes]:
                return _with_bar(name, length, remote.chunks(name, length))

            for files in folders:  # a cache can be full of what is in use
                fd = files.open(wanted, chunks)
                if fd is not None and file_sha256(files.path(wanted)) != sha256:  # damaged since it came
                    files.drop(wanted, fd)
                    fd = files.open(wanted, chunks)
                if fd is not None:
                    in_use.callback(os.close, fd)
                    return files.path(wanted)
            raise AssertionError("a folder without a limit has room")

        try:
            index = _read_index(folders[0].folder, text, fetched, encoding)
        except RemoteError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{remote}: its index cannot be used ({error}); upload it again from the local folder, all its files"
            ) from error
    index = replace(index, remote=remote, cache=cache)
    listed = remote.shards()
    sizes = remote.sizes(shard.name for shard in index.shards) if listed is None else listed
    _check_shards(index, _changed(index.shards, index.broken, sizes))
    return index


def _with_bar(name: str, size: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    with tqdm(total=size, desc=f"fetching {name}", unit="B", unit_scale=True, disable=None) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _read_index(
    folder: Path, text: bytes, path_of: Callable[[str, str], Path], encoding: Encoding | None
) -> ShardIndex:
    """The index that ``text`` describes; ``path_of(file name, SHA-256)`` tells where each array lies, verified."""
    content = json.loads(text.decode("utf-8"))
    if content["format"] not in (FORMAT, FORMAT_1):
        raise ValueError(f"{INDEX_FILE} has format {content['format']!r}, expected {FORMAT!r}")
    if content.get("encoding") != (None if encoding is None else encoding_digest(encoding)):
        raise ValueError(f"{ENCODERS_FILE} does not belong to {INDEX_FILE}")
    shards = tuple(ShardInfo(**shard) for shard in content["shards"])
    if any(Path(shard.name).name != shard.name for shard in shards):
        raise ValueError(f"shard names with folders: {[shard.name for shard in shards][:3]}")
    required = [SAMPLES_FILE, KEYS_FILE, *([SIZES_FILE, KEY_ENDS_FILE] if content["format"] == FORMAT else [])]
    arrays = {}
    for name in (*required, *(_OPTIONAL.keys() & content["arrays"].keys())):
        mapped = np.load(path_of(name, content["arrays"][name]), mmap_mode="r", allow_pickle=False)
        # A plain view of the mapped file: np.memmap itself makes every record that is read several times dearer.
        arrays[name] = mapped.view(np.ndarray)
    index = ShardIndex(
        folder=folder,
        shards=shards,
        digest=content["digest"],
        columns=_columns(arrays, sum(shard.count for shard in shards), content["format"]),
        key_bytes=arrays[KEYS_FILE],
        bad={int(entry["sample"]): str(entry["reason"]) for entry in content["bad"]},
        broken={str(name): str(reason) for name, reason in content.get("broken", {}).items()},
        labels=arrays.get(LABELS_FILE),
        frames=arrays.get(FRAMES_FILE),
        encoding=encoding,
        seconds=arrays.get(SECONDS_FILE),
        ignored={str(extension): int(count) for extension, count in content.get("ignored", {}).items()},
    )
    if compute_digest(index) != index.digest:
        raise ValueError("its digest does not match its content")
    index.release()  # all was touched for the digest
    return index


def _columns(arrays: Mapping[str, np.ndarray], count: int, form: str) -> Columns:
    """The arrays of all samples; ValueError if one has another form. Those of version 1 are held in memory."""
    for name, dtype in _OPTIONAL.items():
        if name in arrays and (arrays[name].dtype, arrays[name].shape) != (dtype, (count,)):
            raise ValueError(f"{name} holds {arrays[name].dtype} {list(arrays[name].shape)}, expected one a sample")
    samples = arrays[SAMPLES_FILE]
    if form == FORMAT_1:
        if samples.dtype != SAMPLE or samples.shape != (count,):
            raise ValueError(f"{samples.shape} samples of {samples.dtype}, expected {count} of {SAMPLE}")
        return pack(samples)
    columns = Columns(samples, arrays[SIZES_FILE], arrays[KEY_ENDS_FILE])
    for array, names in zip(columns, (PLACES, SIZES, None), strict=True):
        fields = [array.dtype[name] for name in array.dtype.names] if array.dtype.names else [array.dtype]
        if array.shape != (count,) or array.dtype.names != names or any(field.kind not in "iu" for field in fields):
            raise ValueError(f"{array.shape} records of {array.dtype}, expected {count} of {names or 'integers'}")
    return columns


def changed_shards(folder: Path, shards: Iterable[ShardInfo], broken: Iterable[str]) -> list[str]:
    """What of ``shards``, and of those known to be ``broken``, is no more as it was, by names and sizes.

    A stat each, so that a run stops before its first step.
    """
    present = (path for path in folder.glob("*.tar") if not path.name.startswith("."))
    sizes = {path.name: path.stat().st_size if path.is_file() else None for path in present}
    return _changed(shards, broken, sizes)


def _changed(shards: Iterable[ShardInfo], broken: Iterable[str], present: Mapping[str, int | None]) -> list[str]:
    """``present``: the sizes of what is there; None for what is no shard."""
    wrong = []
    known = set(broken)
    for shard in shards:
        known.add(shard.name)
        size = present.get(shard.name)
        if size is None:
            wrong.append(f"{shard.name} is missing")
        elif size != shard.bytes:
            wrong.append(f"{shard.name} has {size} bytes, expected {shard.bytes}")
    return wrong + [f"{name} is not in the index" for name in sorted(present) if name not in known]


def _check_shards(index: ShardIndex, wrong: list[str]) -> None:
    if wrong:
        change = _how_to_index(index.folder) if index.remote is None else "index the local folder again and upload it"
        raise ValueError(
            f"{index.place}: the shards are not those that were indexed: {'; '.join(wrong)}. Restore them, "
            f"or, if the change is meant, {change} (which makes it another data set)"
        )


def _write_synced(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file, in hex; ``advance`` is told the bytes of each part read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _how_to_index(folder: Path) -> str:
    return f"run `dydit data index {folder}`"


def _how_to_get_shards(folder: Path) -> str:
    return f"make some with `dydit data shapes {folder}`, or put .tar shards there and {_how_to_index(folder)}"
