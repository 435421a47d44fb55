"""Shards without an index: endless, shuffled, the same again; what is wrong is named; nothing is executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch

from dydit_scale.data import stream
from dydit_scale.data.loader import BadDataError, DataConfig, Loader, make_loader, open_data
from dydit_scale.data.shards import write_shards
from dydit_scale.data.stream import open_stream
from tests.data.test_loader import assert_same, joined, png, samples, take
from tests.data.test_shards import write_tar
from tests.data.web_store import serve

COUNT = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty samples in five shards, without an index."""
    index = write_shards(samples(COUNT, labels=True), tmp_path / "shards", samples_per_shard=7)
    for path in index.folder.glob("index*"):
        path.unlink()
    return index.folder


def loader(
    path: Path | str, *, rank: int = 0, world_size: int = 1, consumed: int = 0, seed: int = 5, **config: float
) -> Loader:
    made = DataConfig(path=str(path), mode="stream", **{"image_size": 8, **config})
    return make_loader(
        made, open_data(made), seed=seed, rank=rank, world_size=world_size, global_batch=8,
        micro_batch=4 // world_size, consumed=consumed,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_samples_at_the_usual_positions(folder: Path, workers: int) -> None:
    got = joined(take(loader(folder, caption_dropout=0.3, workers=workers), 80))
    assert got.positions.tolist() == list(range(320))
    assert set(got.keys) == {f"{number:04d}" for number in range(COUNT)} and len(set(got.keys[:20])) > 10
    indexed = write_shards(samples(COUNT, labels=True), folder / "indexed", samples_per_shard=7)
    config = DataConfig(path=str(indexed.folder), image_size=8, caption_dropout=0.3)
    plain = make_loader(config, indexed, seed=5, rank=0, world_size=1, global_batch=8, micro_batch=4, consumed=0)
    reference = joined(take(plain, 80))
    by_key = {key: reference.pixels[row] for row, key in enumerate(reference.keys)}
    assert got.labels is not None
    for row, key in enumerate(got.keys):
        assert torch.equal(got.pixels[row], by_key[key])
        # Dropout goes by position, so it is that of the indexed reader.
        dropped = reference.captions[row] == ""
        assert got.captions[row] == ("" if dropped else f"picture {key}")
        assert int(got.labels[row]) == (-1 if dropped else int(key) % 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_again_and_another_after_a_resume_or_with_a_seed(folder: Path, workers: int) -> None:
    some = loader(folder, workers=workers)
    first = joined(take(some, 10))
    assert_same(joined(take(some, 10)), first)
    assert joined(take(loader(folder, workers=workers, consumed=8), 10)).keys != first.keys
    assert joined(take(loader(folder, workers=workers, seed=6), 10)).keys != first.keys
    assert joined(take(loader(folder, workers=workers, consumed=8), 2)).positions.tolist() == list(range(8, 16))


def test_ranks_and_workers_draw_differently_at_positions_of_their_own(folder: Path) -> None:
    ranks = [joined(take(loader(folder, rank=rank, world_size=2, workers=2), 20)) for rank in range(2)]
    assert sorted(chain.from_iterable(got.positions.tolist() for got in ranks)) == list(range(80))
    assert ranks[0].keys != ranks[1].keys
    rows = torch.arange(40).reshape(20, 2)
    odd, even = ([ranks[0].keys[row] for row in rows[start::2].flatten()] for start in (0, 1))
    assert odd != even


def test_shards_may_be_named_with_braces_on_disk_and_on_the_web(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHUFFLED", 50)
    names = ("shard-000001.tar", "shard-000002.tar")
    assert open_stream(f"{folder}/shard-{{000001..000002}}.tar").shards == names
    reference = joined(take(loader(f"{folder}/shard-{{000001..000002}}.tar"), 6))
    assert set(reference.keys) <= {f"{number:04d}" for number in range(7, 21)}
    with serve(folder) as store:
        assert_same(joined(take(loader(f"{store.url}/shard-{{000001..000002}}.tar"), 6)), reference)
        with pytest.raises(ValueError, match=r"found no shards .*name them with braces: data\.path=http.*\{000000\.\."):
            open_stream(store.url)
        missing = loader(f"{store.url}/shard-{{000007..000008}}.tar")
        with pytest.raises(ValueError, match=r"shard-00000[78]\.tar: not found"):
            take(missing, 1)


def test_a_missing_shard_stops_it_by_name(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
        path.unlink()
    (folder / "shard-9.tar").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"shard-9\.tar"):
        take(loader(folder), 1)


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (self.path,)

    path = ""


def test_other_files_are_passed_over_unread(tmp_path: Path) -> None:
    Canary.path = str(tmp_path / "executed")
    evil = pickle.dumps(Canary())
    names = ("pkl", "pyd", "pickle", "pth", "pt", "gz", "png.gz")
    write_tar(
        tmp_path / "a.tar",
        [("1.png", png(1)), ("1.txt", b"one"), *((f"1.{name}", evil) for name in names), ("1.json", b"[]")],
    )
    got = joined(take(loader(tmp_path, caption_dropout=0), 2))
    assert got.keys == ("1",) * 8 and got.captions == ("one",) * 8
    assert not (tmp_path / "executed").exists()
    with (tmp_path / "a.tar").open("rb") as file:
        (found,) = stream._read_shard(file, "a.tar")
    assert set(found.files) == {"png", "txt", "json"}


def broken() -> Iterator[tuple[str, list[tuple[str, bytes]], str]]:
    yield "two pictures", [("2.png", png(2)), ("2.jpg", png(2)), ("2.txt", b"x")], "2 images, expected one of"
    yield "no caption", [("2.png", png(2))], "neither caption nor label"
    yield "not a picture", [("2.png", b"\x80\x04."), ("2.txt", b"x")], "broken image"
    yield (
        "a long caption",
        [("2.png", png(2)), ("2.txt", bytes(1 << 21))],
        r"\.txt of 2097152 bytes, more than the limit",
    )
    yield "one key twice", [("2.png", png(2)), ("2.png", png(2)), ("2.txt", b"x")], "'png' twice"


@pytest.mark.parametrize(("files", "message"), [c[1:] for c in broken()], ids=[c[0] for c in broken()])
def test_bad_samples_are_named_once_and_passed_over(
    tmp_path: Path, files: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("1.txt", b"one"), *files])
    with pytest.warns(UserWarning, match=rf"bad a\.tar sample '2': {message}") as told:
        got = joined(take(loader(tmp_path), 4))
    assert set(got.keys) == {"1"} and len(told) == 1
    with (
        pytest.warns(UserWarning, match="bad"),
        pytest.raises(BadDataError, match=r"1 bad samples, more than the budget of 0"),
    ):
        take(loader(tmp_path, bad_samples=0), 4)


@pytest.mark.parametrize("cut", [-1024, -1500])
def test_a_damaged_shard_gives_what_is_whole_and_is_named(folder: Path, cut: int) -> None:
    path = folder / "shard-000001.tar"
    end = len(path.read_bytes().rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(path.read_bytes()[: end + (0 if cut == -1024 else -300)])
    with pytest.warns(
        UserWarning, match=r"bad shard-000001\.tar sample '0013': left out with all behind it: .*trunc|ends"
    ):
        got = joined(take(loader(folder), 60))
    assert {f"{number:04d}" for number in range(7, 13)} <= set(got.keys)


def test_nothing_but_bad_samples_ends_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("2.png", b"x"), ("2.txt", b"x")])
    with pytest.raises(ValueError, match=r"101 bad samples in a row; first: a\.tar sample '2': broken image"):
        take(loader(tmp_path), 1)


def test_shards_without_samples_are_named_and_nothing_else_ends_it(folder: Path) -> None:
    write_tar(folder / "empty.tar", [])
    with pytest.warns(UserWarning, match=r"bad empty\.tar sample '': the shard holds no samples") as told:
        got = joined(take(loader(folder), 60))
    assert len(told) == 1 and len(set(got.keys)) == COUNT
    for path in folder.glob("shard-*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"101 bad samples in a row; first: empty\.tar sample '': the shard holds"):
        take(loader(folder), 1)


def test_what_needs_an_index_is_refused() -> None:
    for change in ({"frames": 4}, {"path": "s3://bucket/a", "cache": "/fast"}):
        with pytest.raises(ValueError, match=r"data\.mode stream reads one folder of pictures .* and keeps no shards"):
            DataConfig(**{"path": "shards", "mode": "stream", **change})
    with pytest.raises(ValueError, match=r"data\.mode must be indexed or stream, got 'webdataset'"):
        DataConfig(path="shards", mode="webdataset")
