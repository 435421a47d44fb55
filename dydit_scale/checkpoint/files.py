"""Files that are on the disk when the call returns."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

_CHUNK = 1 << 22


def write_synced(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` and force it to the disk. OSError says in words when the disk is full."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"disk full while writing {_space(path.parent, len(data))}", str(path)) from error


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError if ``folder`` has not ``needed`` bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {_space(folder, needed)}; free some space or lower keep", str(folder))


def _space(folder: Path, needed: int) -> str:
    return f"{needed / 2**20:.1f} MiB needed, {shutil.disk_usage(folder).free / 2**20:.1f} MiB free"


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
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
