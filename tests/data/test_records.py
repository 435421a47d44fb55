"""What an index keeps of a sample: nothing is lost, and little room is taken."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit_scale.data import files as files_module
from dydit_scale.data import index as index_module
from dydit_scale.data import records
from dydit_scale.data.index import FORMAT_1, load_index, read_index
from dydit_scale.data.records import SAMPLE, Columns, pack, unpack, unpack_record
from dydit_scale.data.shards import ShardIndex, build_index, index_folder, write_shards
from tests.data.test_loader import assert_same, joined, loader, samples, take

BLOCKS = st.integers(1, 1 << 40)
BYTES = st.one_of(st.integers(1, 2000), st.integers(1, 1 << 34))


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[int, ...]:
    """Places of a picture and a caption, either in front, as they may lie in a tar; either may be missing."""
    sizes = {"image": draw(BYTES), "caption": draw(st.one_of(st.just(0), BYTES))}
    order = draw(st.sampled_from([("image",), ("caption",), ("image", "caption"), ("caption", "image"), ()]))
    at, places = draw(BLOCKS), {"image": (0, 0, 0), "caption": (0, 0, 0)}
    for part in order:
        places[part] = (at * 512, sizes[part], draw(st.integers(0, 2**32 - 1)))
        at += -(-sizes[part] // 512) + draw(st.integers(1, 1 << 20))
    return (*places["image"], *places["caption"], draw(st.integers(0, 1)), draw(st.integers(0, 65536)), 7)


def rows_of(found: Iterable[tuple[int, ...]]) -> np.ndarray:
    rows = [(*one, number) for number, one in enumerate(found, 1)]
    return np.array(rows, SAMPLE)


@settings(deadline=None, max_examples=200)
@given(st.lists(laid_out(), min_size=1, max_size=8))
def test_places_come_back_as_they_were(found: list[tuple[int, ...]]) -> None:
    rows = rows_of(found)
    columns = pack(rows)
    assert (unpack(columns) == rows).all()
    for place, row in zip(columns.places, rows, strict=True):
        assert [*unpack_record(place).image, *unpack_record(place).caption] == list(row.item()[:6])


def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([(512 * n, n, n, 0, 0, 0, 0, n, n) for n in range(1, 300)])
    whole = pack(rows)
    monkeypatch.setattr(records, "_ROWS", 64)
    parts = pack(rows)
    assert all((one == other).all() and one.dtype == other.dtype for one, other in zip(whole, parts, strict=True))
    assert (np.concatenate(list(records.unpacked(parts))) == rows).all()


def test_a_sample_of_usual_sizes_takes_twenty_bytes() -> None:
    """Latents behind their entries, pictures before their captions, and bad ones of which only the entry is there."""
    rows = rows_of([
        (1 << 33, 200_000, 2**32 - 1, (1 << 33) - 1536, 900, 1, 1, 2048, 1024),
        (512, 70_000, 5, 512 + 70_144 + 512, 40_000, 2**32 - 1, 0, 4000, 3000),
        (0, 0, 0, 1 << 34, 700, 9, 1, 0, 0),
    ])  # fmt: skip
    columns = pack(rows)
    assert columns.places.dtype.itemsize <= 20 and columns.sizes.dtype.itemsize == 4
    assert (unpack(columns) == rows).all()


# --- in an index ----------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_shards(samples(30, labels=True), tmp_path / "shards", samples_per_shard=7)


def write_version_1(index: ShardIndex) -> None:
    """As the first version wrote it."""
    samples = unpack(index.columns)
    for name in ("index-samples.npy", "index-sizes.npy", "index-key-ends.npy"):
        (index.folder / name).unlink()
    np.save(index.folder / "index-samples.npy", samples)
    arrays = ("index-samples.npy", "index-keys.npy", "index-labels.npy")
    content = {
        "format": FORMAT_1, "digest": index.digest, "shards": [asdict(shard) for shard in index.shards],
        "arrays": {name: index_module.file_sha256(index.folder / name) for name in arrays}, "bad": [],
    }  # fmt: skip
    (index.folder / "index.json").write_text(json.dumps(content))


def test_an_index_of_the_first_version_is_read(index: ShardIndex) -> None:
    reference = joined(take(loader(index), 8))
    write_version_1(index)
    found = load_index(index.folder)
    assert found.digest == index.digest, "a resume compares it"
    assert all(map(np.array_equal, found.columns, index.columns))
    assert_same(joined(take(loader(found), 8)), reference)
    done = index_folder(index.folder, update=True, progress=False)
    assert done.reused == len(index.shards) and done.index.digest == index.digest
    assert json.loads((index.folder / "index.json").read_text())["format"] == "dydit-index-v2"
    assert isinstance(np.load(index.folder / "index-sizes.npy"), np.ndarray)


@pytest.mark.parametrize("name", ["index-samples.npy", "index-sizes.npy", "index-key-ends.npy"])
def test_arrays_of_another_form_are_refused(index: ShardIndex, name: str) -> None:
    path = index.folder / name
    held = np.load(path)
    for wrong in (held[:-1], held.astype([(f"f{n}", "<f8") for n in range(len(held.dtype.names or "1"))])):
        np.save(path, wrong)
        content = json.loads((index.folder / "index.json").read_text())
        content["arrays"][name] = index_module.file_sha256(path)
        (index.folder / "index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"records of .*, expected 30 of"):
            read_index(index.folder)


def test_the_index_gives_its_pages_back(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    release = ShardIndex.release
    monkeypatch.setattr(ShardIndex, "release", lambda self: given_back.append(release(self)))
    monkeypatch.setattr(files_module, "LOOKED_AT", 10)
    reference = joined(take(loader(index), 4))
    assert len(given_back) == 1
    found = load_index(index.folder)
    assert len(given_back) == 2, "all of it was read for the digest"
    assert_same(joined(take(loader(found), 4)), reference)


def test_mapped_columns_are_those_of_the_files(index: ShardIndex) -> None:
    build_index(index.folder, progress=False)
    found = load_index(index.folder)
    assert all(isinstance(column.base, np.memmap) for column in found.columns)
    with pytest.raises(ValueError, match="read-only"):
        Columns(*found.columns).key_ends[0] = 1
