"""Shards on a web server: the batches of the local folder, whatever passing failures; lasting ones are told at once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from dydit_scale.data import remote
from dydit_scale.data.cache import FileCache, Wanted
from dydit_scale.data.encoded import EMPTY_FILE, ENCODERS_FILE, encoding_bytes, read_empty
from dydit_scale.data.files import SampleFiles
from dydit_scale.data.loader import Batch, DataConfig, Loader, make_loader, open_data
from dydit_scale.data.remote import RemoteError, RemoteFolder, is_url, redacted
from dydit_scale.data.shards import ShardIndex, build_index, load_index, write_shards
from dydit_scale.data.stream import open_stream
from tests.data.test_encoded import write_world
from tests.data.test_loader import assert_same, joined, samples, take
from tests.data.web_store import WebStore, serve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty samples in five shards."""
    return write_shards(samples(30, labels=True), tmp_path / "shards", samples_per_shard=7).folder


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebStore]:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(remote, "LONGEST_DELAY", 0.002)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 30)
    with serve(folder) as server:
        yield server


def loader(path: str, *, cache: str = "", workers: int = 0, cache_gib: float = 1.0) -> Loader:
    config = DataConfig(path=path, image_size=8, cache=cache, workers=workers, cache_gib=cache_gib)
    return make_loader(
        config, open_data(config), seed=5, rank=0, world_size=1, global_batch=8, micro_batch=4, consumed=0
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_the_batches_are_those_of_the_local_folder(
    folder: Path, store: WebStore, tmp_path: Path, cached: bool, workers: int
) -> None:
    # The parent asks the server, too, before its workers are forked.
    some = loader(store.url, cache=str(tmp_path / "cache") if cached else "", workers=workers)
    assert_same(joined(take(some, 12)), joined(take(loader(str(folder)), 12)))


def test_the_index_is_that_of_the_local_folder(folder: Path, store: WebStore, tmp_path: Path) -> None:
    local = load_index(folder)
    for cache in (None, FileCache(tmp_path / "cache", 1 << 20)):
        found = load_index(store.url + "/", cache)
        assert (found.digest, found.shards, found.place) == (local.digest, local.shards, store.url)
        assert all(map(np.array_equal, found.columns, local.columns)) and found.key(29) == local.key(29)
    del store.reads[:]
    load_index(store.url, FileCache(tmp_path / "cache", 1 << 20))
    assert store.reads == ["index.json"], "the arrays lie in the cache"


def test_a_sample_is_one_request(store: WebStore) -> None:
    files = SampleFiles(load_index(store.url))
    del store.reads[:]
    found = files.read(3)
    assert len(found.image) > 0 and found.caption == b"picture 0003"
    assert store.reads == ["shard-000000.tar"]


PASSING = ["503", "500", "429", "reset", "stall", "cut", "short"]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(folder: Path, store: WebStore, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.2)
    store.faults = [fault] * 8  # the client itself tries again once after a reset
    with pytest.warns(UserWarning, match=r"shard-000001\.tar: failed three times, trying on; last: \w"):
        data = RemoteFolder(store.url).read("shard-000001.tar", 100, 5000)
    assert data == (folder / "shard-000001.tar").read_bytes()[100:5100]
    assert store.reads == ["shard-000001.tar"] * 9


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_ends_at_the_deadline(store: WebStore, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    store.faults = [fault] * 10_000
    with warnings.catch_warnings(), pytest.raises(RemoteError, match=r"/shard-000001\.tar: cannot be read, tried \d+"):
        warnings.simplefilter("ignore")
        RemoteFolder(store.url).read("shard-000001.tar", 100, 5000)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403", "access denied or expired .*renew the credentials"),
        ("401", "access denied or expired"),
        ("400", "the request was refused"),
        ("whole", "answers no range requests"),
    ],
)
def test_what_lasts_is_told_at_once(store: WebStore, fault: str, message: str) -> None:
    store.faults = [fault]
    with pytest.raises(RemoteError, match=rf"{store.url}/shard-000001\.tar: .*{message}"):
        RemoteFolder(store.url).read("shard-000001.tar", 100, 5000)
    assert len(store.reads) == 1
    with pytest.raises(RemoteError, match=r"nothing\.tar: not found"):
        RemoteFolder(store.url).read("nothing.tar", 0, 1)
    with pytest.raises(RemoteError, match=r"shard-000001\.tar: it ends before the bytes asked for"):
        RemoteFolder(store.url).read("shard-000001.tar", 1 << 30, 1)


def test_a_failing_store_stops_the_loader_by_name(store: WebStore) -> None:
    batches = iter(loader(store.url))
    store.faults = ["403"]
    with pytest.raises(ValueError, match=r"/shard-00000\d\.tar: access denied or expired"):
        next(batches)


def test_changed_bytes_are_a_bad_sample(store: WebStore) -> None:
    some = loader(store.url)
    index = load_index(store.url)
    image = index.record(3).image
    path = store.folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[image.offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"bad shard-000000\.tar sample '0003': image checksum"):
        assert "0003" not in joined(take(some, 8)).keys


# --- encoded data ---------------------------------------------------------------------------------------------------


def encoded_batches(path: str, cache: str = "", workers: int = 0) -> list[Batch]:
    config = DataConfig(path=path, cache=cache, workers=workers, image_size=12, buckets=True, bucket_step=4)
    data = open_data(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one sample is bad
        some = make_loader(config, data, seed=5, rank=0, world_size=1, global_batch=8, micro_batch=4, consumed=0)
        return take(some, 6)


@pytest.mark.parametrize(("cached", "workers"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_encoded_batches_are_those_of_the_local_folder(
    store: WebStore, tmp_path: Path, cached: bool, workers: int
) -> None:
    folder = build_index(write_world(store.folder / "encoded")).folder
    cache = str(tmp_path / "cache") if cached else ""
    reference = encoded_batches(str(folder))
    for ours, theirs in zip(encoded_batches(f"{store.url}/encoded", cache, workers), reference, strict=True):
        assert ours.encoded is not None and theirs.encoded is not None
        assert (ours.keys, ours.captions) == (theirs.keys, theirs.captions)
        torch.testing.assert_close(ours.encoded, theirs.encoded, atol=0, rtol=0)


def test_what_lies_beside_encoded_shards_is_read_from_the_store(store: WebStore) -> None:
    local = build_index(write_world(store.folder / "encoded"))
    url = f"{store.url}/encoded"
    found = load_index(url)
    assert (found.encoding, found.digest) == (local.encoding, local.digest) and found.encoding is not None
    empty, expected = (read_empty(index.home, found.encoding) for index in (found, local))
    assert empty.keys() == expected.keys() and all(torch.equal(empty[name], expected[name]) for name in empty)
    with pytest.raises(ValueError, match=r"/encoded: encoded data have an index; .*set data\.mode=indexed"):
        open_stream(url)
    (local.folder / EMPTY_FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{url}/empty\.safetensors: it does not belong to encoders\.json"):
        read_empty(found.home, found.encoding)
    (local.folder / EMPTY_FILE).unlink()
    with pytest.raises(ValueError, match=rf"{url}/empty\.safetensors: no such file"):
        read_empty(found.home, found.encoding)
    path = local.folder / ENCODERS_FILE
    path.write_bytes(encoding_bytes(replace(found.encoding, encoders={"vae": "w"})))
    with pytest.raises(ValueError, match=r"its index cannot be used \(encoders\.json does not belong to index\.json"):
        load_index(url)
    path.unlink()
    with pytest.raises(ValueError, match=r"encoders\.json does not belong to index\.json"):
        load_index(url)
    path.write_bytes(encoding_bytes(found.encoding))
    store.faults = ["", "403"]
    with pytest.raises(RemoteError, match=r"/encoded/encoders\.json: access denied or expired"):
        load_index(url)


def test_shards_of_another_size_or_missing_are_named(folder: Path, store: WebStore) -> None:
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.truncate(1000)
    (folder / "shard-000003.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar has 1000 bytes, expected \d+; shard-000003\.tar is miss"):
        load_index(store.url)


def test_an_index_that_is_not_whole_is_refused(folder: Path, store: WebStore) -> None:
    content = json.loads((folder / "index.json").read_text())
    content["arrays"]["index-samples.npy"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its index cannot be used .*index-samples.npy.*its SHA-256 is another"):
        load_index(store.url)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"holds no index\.json .*run `dydit data index` on the shards' local folder"):
        load_index(store.url)
    with pytest.raises(ValueError, match="index the shards' local folder and upload all of it"):
        build_index(store.url)


def test_a_store_with_a_list_of_files_is_compared_with_it(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/data/shapes", recursive=True)
    try:
        assert load_index("memory://data/shapes").digest == load_index(folder).digest
        assert_same(joined(take(loader("memory://data/shapes"), 8)), joined(take(loader(str(folder)), 8)))
        memory.pipe("/data/shapes/more.tar", b"x")
        with pytest.raises(ValueError, match=r"^memory://data/shapes: .* more\.tar is not in the index"):
            load_index("memory://data/shapes")
    finally:
        memory.rm("/data", recursive=True)


@pytest.mark.parametrize(
    "path",
    [
        "pipe:curl https://host/a.tar",
        "file:/data/shards",
        "file:///data/shards",
        "ftp://host/shards",
        "simplecache::s3://bucket/shards",
        "s3://bucket/shards::file://b",
        "https://user:word@host/shards",
        "https://host/shards?signature=word",
        "s3://key:word@bucket/shards",
    ],
)
def test_other_urls_are_refused_without_their_secrets(path: str) -> None:
    with pytest.raises(ValueError, match=r"data\.path ") as refused:
        DataConfig(path=path)
    assert "word" not in str(refused.value) and "curl" not in str(refused.value)


def test_urls_and_folders_are_told_apart() -> None:
    assert all(
        map(is_url, ("s3://bucket/a", "gs://a/b", "hf://datasets/a/b@main/c", "https://host:80/a", "memory://a"))
    )
    assert not any(map(is_url, ("/data/shards", "shards", "a:b", "C:\\data")))


def test_messages_keep_no_secrets() -> None:
    text = "403, message='no', url='https://me:word@host/a/b.tar?X-Signature=word&b=1#word' and s3://word@bucket/x"
    assert redacted(text) == "403, message='no', url='https://host/a/b.tar' and s3://bucket/x"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec, "url_to_fs", fail)
    with pytest.raises(RemoteError, match=r"s3://bucket/a/index\.json: needs s3fs, .*run `pip install s3fs`"):
        load_index("s3://bucket/a")


def test_a_cache_is_for_urls_alone() -> None:
    with pytest.raises(ValueError, match=r"data\.cache /fast: /data/shards is local already"):
        DataConfig(path="/data/shards", cache="/fast")
    with pytest.raises(ValueError, match=r"data\.cache_gib must be positive, got 0"):
        DataConfig(path="s3://bucket/a", cache_gib=0)


def test_a_cache_smaller_than_a_shard_is_refused_before_reading(store: WebStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.cache_gib .*shard-00000\d\.tar alone has"):
        loader(store.url, cache=str(tmp_path / "cache"), cache_gib=9000 / 2**30)


def test_a_cache_full_of_shards_in_use_reads_on_by_ranges(folder: Path, store: WebStore, tmp_path: Path) -> None:
    index = load_index(folder)
    arrays = sum((folder / name).stat().st_size for name in ARRAYS)
    room = max(arrays, 2 * max(shard.bytes for shard in index.shards)) + 1
    cache = FileCache(tmp_path / "cache", room)
    used = load_index(store.url, cache)
    held = [cache.open(remote_shard(used, number), lambda n=number: [chunk(folder, n)]) for number in (0, 1)]
    assert all(fd is not None for fd in held)
    with pytest.warns(UserWarning, match=r"are in use, so some shards are read by ranges; raise data\.cache_gib"):
        got = joined(take(loader(store.url, cache=str(tmp_path / "cache"), cache_gib=room / 2**30), 8))
    assert_same(got, joined(take(loader(str(folder)), 8)))
    for fd in held:
        os.close(fd)


ARRAYS = ("index-samples.npy", "index-sizes.npy", "index-key-ends.npy", "index-keys.npy", "index-labels.npy")


def remote_shard(index: ShardIndex, number: int) -> Wanted:
    shard = index.shards[number]
    return Wanted(name=shard.name, size=shard.bytes, sha256=shard.sha256)


def chunk(folder: Path, number: int) -> bytes:
    return (folder / f"shard-{number:06d}.tar").read_bytes()


@pytest.mark.slow
def test_shards_in_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        s3 = fsspec.filesystem("s3")
        s3.mkdir("bucket")
        s3.put(str(folder), "bucket/a b/shapes", recursive=True)
        url = "s3://bucket/a b/shapes"
        reference = joined(take(loader(str(folder)), 8))
        for cache, workers in (("", 0), ("", 2), (str(tmp_path / "cache"), 2)):
            assert_same(joined(take(loader(url, cache=cache, workers=workers), 8)), reference)
        with pytest.raises(ValueError, match=r"s3://nowhere/shapes: holds no index\.json"):
            load_index("s3://nowhere/shapes")
        with pytest.raises(RemoteError, match=r"nothing\.tar: not found"):
            RemoteFolder(url).read("nothing.tar", 0, 1)
        s3.rm("bucket/a b/shapes/shard-000002.tar")
        with pytest.raises(ValueError, match=r"shard-000002\.tar is missing"):
            load_index(url)
    finally:
        server.stop()
