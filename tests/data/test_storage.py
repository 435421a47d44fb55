"""Shards of an object store on this node: none downloaded over and over, none trusted once it is damaged."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dydit_scale.data import storage
from dydit_scale.data.cache import FileCache, Wanted
from dydit_scale.data.loader import DataConfig, Loader, make_loader, open_data
from dydit_scale.data.position import SampleOrder
from dydit_scale.data.shards import ShardIndex, load_index, write_shards
from dydit_scale.data.storage import IN_USE, CachedShards, CacheUse
from tests.data.test_loader import assert_same, joined, samples, take
from tests.data.web_store import WebStore, serve

BY_RANGES = r"are in use, so some shards are read by ranges; raise data\.cache_gib"


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """Thirty samples in five shards, in a local folder."""
    return write_shards(samples(30), tmp_path / "shards", samples_per_shard=7)


@pytest.fixture
def store(index: ShardIndex) -> Iterator[WebStore]:
    with serve(index.folder) as server:
        yield server


def loader(path: str, cache: Path | None = None, room: int = 1 << 20, **config: int) -> Loader:
    folder = str(cache) if cache else ""
    made = DataConfig(path=path, image_size=8, cache=folder, cache_gib=room / 2**30, **config)
    return make_loader(made, open_data(made), seed=5, rank=0, world_size=1, global_batch=8, micro_batch=4, consumed=0)


def room_for(index: ShardIndex, shards: int) -> int:
    return shards * max(shard.bytes for shard in index.shards) + 1


def cached_file(index: ShardIndex, cache: Path, number: int) -> Path:
    return cache / index.shards[number].sha256


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# --- too small a cache ----------------------------------------------------------------------------------------------


def test_with_room_for_two_of_five_mixed_shards_two_are_downloaded_and_the_others_read_by_ranges(
    index: ShardIndex, store: WebStore, tmp_path: Path
) -> None:
    some = loader(store.url, tmp_path / "cache", room_for(index, 2))
    with pytest.warns(UserWarning, match=BY_RANGES):
        got = joined(take(some, 20))
    assert_same(got, joined(take(loader(str(index.folder)), 20)))
    assert some.counts() == (0, 0, 2), "of 80 samples every shard has its share"


def cached_shards(index: ShardIndex, store: WebStore, cache: Path, room: int) -> CachedShards:
    remote = load_index(store.url).remote
    assert remote is not None
    return CachedShards(remote, index.shards, FileCache(cache, room))


def read(shards: CachedShards, index: ShardIndex, number: int) -> None:
    buffer = bytearray(100)
    shards.read(index.shards[number].name, 512, memoryview(buffer))
    assert buffer == (index.folder / index.shards[number].name).read_bytes()[512:612]


def test_the_shards_of_the_next_group_take_the_place_of_the_last_ones(
    index: ShardIndex, store: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "IN_USE", 20)
    shards = cached_shards(index, store, tmp_path / "cache", room_for(index, 2))
    for turn in range(60):
        read(shards, index, turn % 2)
    assert shards.take_use() == CacheUse(hits=0, misses=2)
    with pytest.warns(UserWarning, match=BY_RANGES):
        for turn in range(20):
            read(shards, index, 2 + turn % 2)
    assert shards.take_use() == CacheUse(), "the first ones may still be wanted"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(24):
            read(shards, index, 2 + turn % 2)
    assert shards.take_use() == CacheUse(hits=0, misses=2)
    assert not any(cached_file(index, tmp_path / "cache", number).exists() for number in (0, 1))
    shards.close()


def test_a_full_cache_is_asked_once_in_a_while_for_a_shard_that_had_no_room(
    index: ShardIndex, store: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = cached_shards(index, store, tmp_path / "cache", room_for(index, 1))
    asked = []
    open_file = FileCache.open
    monkeypatch.setattr(FileCache, "open", lambda self, wanted, c: asked.append(wanted) or open_file(self, wanted, c))
    monkeypatch.setattr(storage, "IN_USE", 20)
    with pytest.warns(UserWarning, match=BY_RANGES):
        for _ in range(20):
            read(shards, index, 0)
            read(shards, index, 1)
    assert len(asked) == 3, "once for the first shard, twice in 40 reads for the second"
    shards.close()


def test_no_shard_of_a_group_goes_unread_for_so_long_that_it_is_given_up() -> None:
    order = SampleOrder([200] * 48, seed=3)
    shards = np.array([order[position].shard for position in range(48 * 200)]).reshape(3, -1)
    gaps = [np.diff(np.flatnonzero(group == shard)) for group in shards for shard in np.unique(group)]
    assert len(gaps) == 48 and max(gap.max() for gap in gaps) < IN_USE


# --- a damaged cache ------------------------------------------------------------------------------------------------


def test_a_cached_shard_that_was_cut_off_is_downloaded_again(
    index: ShardIndex, store: WebStore, tmp_path: Path
) -> None:
    take(loader(store.url, tmp_path / "cache"), 12)
    for number in range(5):
        os.truncate(cached_file(index, tmp_path / "cache", number), 600)
    some = loader(store.url, tmp_path / "cache")
    assert_same(joined(take(some, 12)), joined(take(loader(str(index.folder)), 12)))
    assert some.counts() == (0, 0, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_changed_bytes_in_the_cache_are_downloaded_again_and_no_sample_is_bad(
    index: ShardIndex, store: WebStore, tmp_path: Path, workers: int, recwarn: pytest.WarningsRecorder
) -> None:
    take(loader(store.url, tmp_path / "cache"), 12)
    flipped = cached_file(index, tmp_path / "cache", 0)
    flip(flipped, index.record(3).image.offset + 5)
    some = loader(store.url, tmp_path / "cache", workers=workers)
    assert_same(joined(take(some, 12)), joined(take(loader(str(index.folder)), 12)))
    assert flipped.read_bytes() == (index.folder / "shard-000000.tar").read_bytes()
    bad, _, misses = some.counts()
    assert (bad, misses) == (0, 1), "the second worker finds what the first one downloaded"
    if not workers:  # those of other processes go to stderr
        (told,) = [str(w.message) for w in recwarn if "downloading it again" in str(w.message)]
        assert str(flipped) in told and "shard-000000.tar" in told and "image checksum (CRC32) differs" in told


def test_a_disk_that_damages_what_is_downloaded_makes_a_bad_sample_that_names_the_file(
    index: ShardIndex, store: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, path = FileCache.open, cached_file(index, tmp_path / "cache", 0)
    at = index.record(3).image.offset + 5
    wrong = bytes([(index.folder / "shard-000000.tar").read_bytes()[at] ^ 1])

    def damage(self: FileCache, wanted: Wanted, chunks: Callable[[], Iterator[bytes]]) -> int | None:
        fd = open_file(self, wanted, chunks)
        if path.exists():
            with path.open("r+b") as file:
                file.seek(at)
                file.write(wrong)
        return fd

    monkeypatch.setattr(FileCache, "open", damage)
    some = loader(store.url, tmp_path / "cache")
    with pytest.warns(
        UserWarning, match=rf"bad shard-000000\.tar sample '0003': image checksum.* read from {path}, downloaded twice"
    ):
        assert "0003" not in joined(take(some, 24)).keys
    assert some.counts()[2] == 6, "each shard, and this one once more"


def test_a_damaged_array_of_the_index_is_fetched_again(index: ShardIndex, store: WebStore, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 20)
    load_index(store.url, cache)
    files = [path for path in cache.folder.iterdir() if path.suffix != ".lock"]
    assert len(files) == 4
    for path in files:
        flip(path, path.stat().st_size - 1)
    assert load_index(store.url, cache).digest == index.digest
