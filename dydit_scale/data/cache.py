"""A folder on a node's own disk that keeps files of an object store for all processes of the node.

Files are named by their SHA-256, so what lies there was whole and right when it came, whoever asks for it. One of
another size is fetched anew, and ``drop`` is for one whose bytes were found to be damaged. One process downloads, under
a lock that the system releases if it is killed; the others wait for it. A file's time of change is set whenever the
file is opened and says which was not used for longest; times of access are not relied upon.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file as it must be."""

    name: str
    """For messages: where it comes from."""
    size: int
    """In bytes."""
    sha256: str
    """In hex."""


@dataclass(frozen=True)
class FileCache:
    """Files by content in ``folder``, together at most ``limit`` bytes; those not used for longest go first."""

    folder: Path
    limit: int

    def open(self, wanted: Wanted, chunks: Callable[[], Iterable[bytes]]) -> int | None:
        """A descriptor of the file, downloaded from ``chunks`` if it is not there; closing it ends its use.

        A sound file in use, by any process, is never removed. None if it is not there and there is no room for it,
        because all that lies there is in use. Raises ValueError where the disk is full or cannot be written, the
        download has another size or SHA-256, or on what ``chunks`` raises.
        """
        path, part = self.path(wanted), self.folder / f"{wanted.sha256}.part"
        with self._explained(wanted):
            self.folder.mkdir(parents=True, exist_ok=True)
            if (fd := _open_used(path, wanted.size)) is not None:
                return fd
            with self._locked(wanted):
                if (fd := _open_used(path, wanted.size)) is not None:
                    return fd
                path.unlink(missing_ok=True)  # cut off
                part.unlink(missing_ok=True)  # of a process that was killed
                fd = self._reserve(part, wanted.size)
                if fd is not None:
                    _fill(fd, part, wanted, chunks)
                    os.replace(part, path)
                return fd

    def drop(self, wanted: Wanted, fd: int) -> None:
        """End the use of a file that is damaged, and remove it unless another process has replaced it already."""
        path = self.path(wanted)
        try:
            with self._explained(wanted), self._locked(wanted), suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    path.unlink()
        finally:
            os.close(fd)

    def path(self, wanted: Wanted) -> Path:
        """Where a file lies, if it does."""
        return self.folder / wanted.sha256

    def _locked(self, wanted: Wanted) -> AbstractContextManager[None]:
        return _locked(self.folder / f"{wanted.sha256}.lock")

    @contextmanager
    def _explained(self, wanted: Wanted) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free space or lower data.cache_gib" if full else "choose another data.cache"
            raise ValueError(f"cache {self.folder}: {wanted.name} cannot be kept ({error}); {advice}") from error

    def _reserve(self, part: Path, size: int) -> int | None:
        """A new file of ``size`` bytes, in use; files that are not give way to it."""
        with _locked(self.folder / "room.lock"):
            held = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    if not entry.name.endswith(".lock"):
                        held.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
            excess = sum(size for _, size, _ in held) + size - self.limit
            for _, freed, path in sorted(held):
                if excess > 0 and _remove_unused(path):
                    excess -= freed
            if excess > 0:
                return None
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                if size:
                    os.posix_fallocate(fd, 0, size)
            except BaseException:
                _discard(fd, part)
                raise
            return fd


def _fill(fd: int, part: Path, wanted: Wanted, chunks: Callable[[], Iterable[bytes]]) -> None:
    """Download into a reserved file; the file is gone if that fails."""
    try:
        digest, at = hashlib.sha256(), 0
        for chunk in chunks():
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
        if at != wanted.size or digest.hexdigest() != wanted.sha256:
            what = f"{at} bytes came, expected {wanted.size}" if at != wanted.size else "its SHA-256 is another"
            raise ValueError(
                f"{wanted.name}: not the file that was indexed ({what}); upload it again from its source, or index its "
                "folder again if the change is meant"
            )
        os.fsync(fd)
    except BaseException:
        _discard(fd, part)
        raise


def _discard(fd: int, part: Path) -> None:
    part.unlink(missing_ok=True)
    os.close(fd)


def _open_used(path: Path, size: int) -> int | None:
    """A descriptor with a shared lock, which keeps the file from being removed; None if there is none of that size."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    status = os.fstat(fd)
    # It may have been removed between the two calls.
    if status.st_nlink == 0 or status.st_size != size:
        os.close(fd)
        return None
    os.utime(fd)
    return fd


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process uses it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes that lock ``path``; lock files stay, since removing one would part those who wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
