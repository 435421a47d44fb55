"""Reading from object stores through fsspec: ranges of bytes, tried again until they are right or time is up.

A URL is never handed to a shell, and credentials are left to the store's own library, which takes them from the
environment: a URL goes into recipes, checkpoints and messages.
"""

from __future__ import annotations

import asyncio
import io
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "memory": "fsspec",
}
"""The protocols that are read, and what each needs installed."""
REQUEST_SECONDS = 60.0
"""How long one request may take."""
RETRY_SECONDS = 180.0
"""How long a request is tried again for."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 20.0
CHUNK = 8 << 20
"""Bytes of a request when a whole file is read."""

_T = TypeVar("_T")
_jitter = random.SystemRandom()  # leaves the seeded generators alone
_PASSING_STATUS = frozenset({408, 425, 429})
# What no second try mends.
_LASTING = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, ValueError)
_LASTING_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"})


def is_url(path: str) -> bool:
    """Whether a place of data is a URL, not a folder; ValueError, without its secrets, for one that is not read."""
    if "://" not in path and not path.startswith(("pipe:", "file:")):
        return False
    protocol = path.partition(":")[0]
    if "::" in path or protocol not in PACKAGES or "://" not in path:
        advice = "give the folder's plain path" if protocol == "file" else "copy the shards to one of these, or a disk"
        raise ValueError(f"data.path {redacted(path)}: expected a folder or one URL of {', '.join(PACKAGES)}; {advice}")
    parts = urlsplit(path)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"data.path {redacted(path)}: user names, '?' and '#' are not taken, since the path is kept in checkpoints "
            f"and reports; give credentials in the environment, as {PACKAGES[protocol]} reads them"
        )
    return True


def redacted(text: str) -> str:
    """A text with user names, queries and fragments taken out of its URLs, and commands out of its pipes."""
    text = re.sub(r"pipe:.*", "pipe:...", text, flags=re.DOTALL)
    return re.sub(r"(\w+://)(?:[^\s/'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


class RemoteError(ValueError):
    """A file of an object store that cannot be read; the message names it and says what to do."""


class Refusal(NamedTuple):
    """Why a request failed for good."""

    problem: str
    advice: str


@dataclass(frozen=True)
class RemoteFolder:
    """A folder (prefix) of an object store or web server. Safe to copy into other processes."""

    url: str

    def __post_init__(self) -> None:
        assert is_url(self.url), self.url
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of a file from ``offset`` on.

        What may pass (5xx, resets, timeouts, short answers) is tried again for ``RETRY_SECONDS``. Raises RemoteError,
        naming the file, at its end and at once on what will not: no such file, no access, a file that is shorter, a
        server without ranges, a package that is missing.
        """
        return self._persistently(name, lambda fs, path: _whole_range(fs, path, offset, size)) if size else b""

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """A file of ``size`` bytes, piece by piece; errors as in ``read``."""
        for offset in range(0, size, CHUNK):
            yield self.read(name, offset, min(CHUNK, size - offset))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none, or if the server does not tell. Other errors as in ``read``."""

        def ask(fs: Any, path: str) -> int | None:
            try:
                size: int | None = _call(fs, "info", path)["size"]
                return size
            except FileNotFoundError:
                return None

        return self._persistently(name, ask)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """``size`` of many files, several at a time."""
        names = list(names)
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(names, pool.map(self.size, names), strict=True))

    def shards(self) -> dict[str, int | None] | None:
        """Size of each ``*.tar`` by its name, sorted; None for a web server, which has no list to trust."""
        if self.url.startswith("http"):
            return None

        def ask(fs: Any, path: str) -> dict[str, int | None]:
            fs.invalidate_cache()
            listed = _call(fs, "ls", path, detail=True)
            sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}
            return {n: sizes[n] for n in sorted(sizes) if n.endswith(".tar") and not n.startswith(".")}

        return self._persistently("", ask)

    def _persistently(self, name: str, request: Callable[[Any, str], _T]) -> _T:
        place = f"{self.url}/{name}" if name else self.url
        began, delay, attempt = time.monotonic(), FIRST_DELAY, 1
        while True:
            try:
                # fsspec keeps its file systems apart by process, so nothing is kept here that a fork would break.
                fs, root = fsspec.url_to_fs(self.url)
                return request(fs, f"{root.rstrip('/')}/{name}" if name else root)
            except (AssertionError, AttributeError, LookupError, TypeError):
                raise  # a mistake of ours, or of a client
            # The clients' errors share no base: aiohttp's and botocore's are no OSError.
            except Exception as error:
                refusal = _refusal(error, self.url)
                if refusal is not None:
                    raise RemoteError(f"{place}: {refusal.problem}; {refusal.advice}") from None
                reason = f"{type(error).__name__}: {redacted(str(error))}".rstrip(": ")
            delay = min(2 * delay, LONGEST_DELAY)
            wait = _jitter.uniform(0, delay)
            if time.monotonic() + wait - began > RETRY_SECONDS:
                raise RemoteError(
                    f"{place}: cannot be read, tried {attempt} times in {time.monotonic() - began:.0f} s; last: "
                    f"{reason}. Is the store reachable and sound? Resume when it is"
                )
            if attempt == 3:
                warnings.warn(f"{place}: failed three times, trying on; last: {reason}", stacklevel=3)
            time.sleep(wait)
            attempt += 1


class RangeFile(io.RawIOBase):
    """A remote file as a seekable one to read; wrap it in ``io.BufferedReader`` with a large buffer."""

    def __init__(self, folder: RemoteFolder, name: str, size: int) -> None:
        self._read, self._size, self._at = partial(folder.read, name), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._read(self._at, count)
        self._at += count
        return count


class _WrongLength(Exception):
    """An answer with fewer bytes than asked for."""


class _NoRanges(Exception):
    """An answer with more bytes than asked for."""


def _call(fs: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """A method of a file system, within ``REQUEST_SECONDS`` where it can be stopped."""
    if fs.async_impl:
        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=REQUEST_SECONDS, **kwargs)
    return getattr(fs, method)(*args, **kwargs)


def _whole_range(fs: Any, path: str, offset: int, size: int) -> bytes:
    data: bytes = _call(fs, "cat_file", path, start=offset, end=offset + size)
    if len(data) < size:
        raise _WrongLength(f"{len(data)} bytes came, expected {size} from {offset} on")
    if len(data) > size:
        raise _NoRanges(f"{len(data)} bytes came, expected {size} from {offset} on")
    return data


def _refusal(error: Exception, url: str) -> Refusal | None:
    """What to say of an error that lasts; None if it may pass."""
    package = PACKAGES[url.partition(":")[0]]
    status = getattr(error, "status", None) or getattr(error, "code", None)
    text = f"{type(error).__name__}: {redacted(str(error))}".rstrip(": ")
    if isinstance(error, ImportError):
        return Refusal(f"needs {package}, which cannot be imported ({error})", f"run `pip install {package}`")
    if isinstance(error, _NoRanges):
        return Refusal(f"the server answers no range requests ({error})", "use a server that does")
    if isinstance(error, FileNotFoundError):
        return Refusal("not found", "restore it, or correct data.path")
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _LASTING_NAMES:
        return Refusal(
            f"access denied or expired ({text})", f"renew the credentials in the environment, as {package} reads them"
        )
    if status == 416:
        return Refusal(f"it ends before the bytes asked for ({text})", "upload it again from its source")
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
    # A timeout derives from OSError or from Exception by version; neither is among the lasting ones.
    if refused or (isinstance(error, _LASTING) and not isinstance(error, asyncio.TimeoutError)):
        return Refusal(f"the request was refused ({text})", "correct data.path, or the store's settings")
    return None
