"""The cache of a node: one download for all processes, nothing half, nothing in use removed."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dydit_scale.data import cache as cache_module
from dydit_scale.data import remote
from dydit_scale.data.cache import FileCache, Wanted
from dydit_scale.data.remote import RemoteFolder
from tests.data.web_store import WebStore, serve

SIZE = 50_000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def wanted(number: int) -> Wanted:
    return Wanted(name=f"{number}.tar", size=SIZE, sha256=hashlib.sha256(content(number)).hexdigest())


def fetch(cache: FileCache, number: int) -> int | None:
    return cache.open(wanted(number), lambda: [content(number)])


def must_lie_there(cache: FileCache, number: int) -> int:
    fd = cache.open(wanted(number), lambda: pytest.fail("fetched again"))
    assert fd is not None
    return fd


def held(cache: FileCache) -> set[int]:
    names = {wanted(number).sha256: number for number in range(10)}
    return {names[path.name] for path in cache.folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WebStore]:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "3.tar").write_bytes(content(3))
    with serve(tmp_path / "store") as server:
        yield server


class Other:
    """Another process that opens file 3, tells how much it read, and uses the file until it is told to end."""

    def __init__(self, store: WebStore, folder: Path) -> None:
        # Forked, because a fresh process imports for seconds.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self._run, args=(store.url, folder, theirs), daemon=True)
        self.process.start()

    @staticmethod
    def _run(url: str, folder: Path, pipe: Connection) -> None:
        remote.CHUNK = 20_000
        pipe.send("ready")
        fd = FileCache(folder, 10**9).open(wanted(3), lambda: RemoteFolder(url).chunks("3.tar", SIZE))
        assert fd is not None
        pipe.send(len(os.read(fd, 2 * SIZE)))
        pipe.recv()

    def tells(self) -> object:
        assert self.pipe.poll(60), "it says nothing"
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()
        assert self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def test_what_is_fetched_once_lies_there(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "a" / "cache", 10 * SIZE)
    fd = fetch(cache, 1)
    assert fd is not None and os.pread(fd, 2 * SIZE, 0) == content(1)
    os.close(fd)
    os.close(must_lie_there(cache, 1))
    assert held(cache) == {1}


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", SIZE)
    os.close(fetch(cache, 1) or -1)
    os.truncate(cache.path(wanted(1)), SIZE - 1)
    fd = fetch(cache, 1)
    assert fd is not None and os.pread(fd, 2 * SIZE, 0) == content(1)
    os.close(fd)


def test_what_is_dropped_is_fetched_again_and_what_replaced_it_stays(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2 * SIZE)
    first, second = fetch(cache, 1), fetch(cache, 1)
    assert first is not None and second is not None
    cache.drop(wanted(1), first)
    assert held(cache) == set() and os.pread(second, SIZE, 0) == content(1), "still open elsewhere"
    os.close(fetch(cache, 1) or -1)
    cache.drop(wanted(1), second)
    os.close(must_lie_there(cache, 1))


@pytest.mark.launch
def test_two_processes_fetch_a_file_once(store: WebStore, tmp_path: Path) -> None:
    store.faults = ["stall"]
    both = [Other(store, tmp_path / "cache") for _ in range(2)]
    assert [other.tells() for other in both] == ["ready", "ready"]
    assert store.waiting.wait(60)
    store.go_on.set()
    assert [other.tells() for other in both] == [SIZE, SIZE]
    assert store.reads == ["3.tar"] * 3, "three chunks, each asked for once"
    for other in both:
        other.end()


@pytest.mark.launch
def test_a_process_killed_while_it_fetches_leaves_nothing_to_be_taken_for_whole(
    store: WebStore, tmp_path: Path
) -> None:
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    store.faults = ["", "", "stall"]
    killed = Other(store, cache.folder)
    assert store.waiting.wait(60)
    waits = Other(store, cache.folder)
    assert waits.tells() == "ready"
    assert not (cache.folder / wanted(3).sha256).exists()
    killed.kill()
    assert waits.tells() == SIZE, "the lock of the dead one holds nobody up"
    fd = must_lie_there(cache, 3)
    assert os.pread(fd, 2 * SIZE, 0) == content(3)
    os.close(fd)
    assert held(cache) == {3}
    waits.end()


def test_what_a_killed_process_left_gives_way(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2 * SIZE)
    cache.folder.mkdir()
    left = cache.folder / f"{wanted(5).sha256}.part"
    left.write_bytes(bytes(2 * SIZE))
    fd = fetch(cache, 1)
    assert fd is not None and not left.exists()
    os.close(fd)


def test_the_file_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 3 * SIZE)
    for number in (1, 2, 3):
        os.close(fetch(cache, number) or -1)
        os.utime(cache.folder / wanted(number).sha256, (number, number))
    os.close(must_lie_there(cache, 1))
    os.close(fetch(cache, 4) or -1)
    assert held(cache) == {1, 3, 4}


def test_a_file_in_use_is_never_removed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2 * SIZE)
    first, second = fetch(cache, 1), fetch(cache, 2)
    assert first is not None and second is not None
    assert fetch(cache, 3) is None and held(cache) == {1, 2}
    os.close(second)
    third = fetch(cache, 3)
    assert third is not None and held(cache) == {1, 3}
    assert os.pread(first, SIZE, 0) == content(1)
    os.close(first)
    os.close(third)


@pytest.mark.launch
def test_a_file_that_another_process_uses_is_never_removed(store: WebStore, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", SIZE)
    other = Other(store, cache.folder)
    assert [other.tells(), other.tells()] == ["ready", SIZE]
    assert fetch(cache, 1) is None and held(cache) == {3}
    other.end()
    fd = fetch(cache, 1)
    assert fd is not None and held(cache) == {1}
    os.close(fd)


@pytest.mark.parametrize(
    ("data", "message"),
    [(content(2), "its SHA-256 is another"), (content(1)[:-1], f"{SIZE - 1} bytes came, expected {SIZE}")],
)
def test_a_file_other_than_the_indexed_one_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    with pytest.raises(ValueError, match=rf"1\.tar: not the file that was indexed \({message}\)"):
        cache.open(wanted(1), lambda: [data])
    assert held(cache) == set()
    os.close(fetch(cache, 1) or -1)


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield content(1)[:100]
        raise ValueError("the store is gone")

    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    with pytest.raises(ValueError, match="the store is gone"):
        cache.open(wanted(1), broken)
    assert held(cache) == set()


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free space or lower data.cache_gib"), (errno.EACCES, "choose another")]
)
def test_a_full_disk_is_told_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=rf"cache .*cache: 1\.tar cannot be kept .*{advice}"):
        cache.open(wanted(1), lambda: pytest.fail("fetched"))
    assert held(cache) == set()


def test_chunks_join_to_the_file(store: WebStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dydit_scale.data.remote.CHUNK", 20_000)
    chunks = list(RemoteFolder(store.url).chunks("3.tar", SIZE))
    assert [len(chunk) for chunk in chunks] == [20_000, 20_000, 10_000] and b"".join(chunks) == content(3)
