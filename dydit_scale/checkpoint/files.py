"""Files that are on the disk when the call returns."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 22
"""Bytes of one read or write."""


def write_synced(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` and force it to the disk. OSError says in words when the disk is full."""
    with explain_full_disk(path, len(data)), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def explain_full_disk(path: Path, needed: int) -> Iterator[None]:
    """Turn the OSError of a full disk into one that says how many bytes are needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"disk full while writing {_space(path.parent, needed)}", str(path)) from error


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError if ``folder`` has not ``needed`` bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {_space(folder, needed)}; free some space or lower keep", str(folder))


def _space(folder: Path, needed: int) -> str:
    return f"{needed / 2**20:.1f} MiB needed, {shutil.disk_usage(folder).free / 2**20:.1f} MiB free"


def file_digest(path: Path, tell: Callable[[int], object] = lambda done: None) -> str:
    """The sha256 of a file, in hex; ``tell`` hears how many bytes each read took."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            tell(len(chunk))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_synced(source: Path, target: Path) -> None:
    """Rename within one folder, atomically, and force it to the disk."""
    os.replace(source, target)
    sync_folder(target.parent)
