"""Shards that were damaged before or after they were indexed: an error or a substitute, never fewer samples."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit_scale.data.loader import BadDataError, DataConfig, Loader, make_loader
from dydit_scale.data.shards import ShardIndex, build_index, load_index, write_shards
from tests.data.test_shards import (
    DAMAGES,
    flip_header_bit,
    header_at,
    png,
    samples,
    stored,
    write_tar,
    zero_a_header,
)

VICTIM = "shard-000001.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of ten samples, indexed. The victim's keys begin where those of ``DAMAGES`` do."""
    folder = tmp_path / "shards"
    for number, first in enumerate((100, 0, 200)):
        write_shards(samples(10, first), tmp_path / str(first), samples_per_shard=10, progress=False)
        folder.mkdir(exist_ok=True)
        shutil.move(tmp_path / str(first) / "shard-000000.tar", folder / f"shard-{number:06d}.tar")
    build_index(folder, progress=False)
    return folder


def garbage(data: bytes) -> bytes:
    return np.random.RandomState(0).bytes(len(data))


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def emptied(data: bytes) -> bytes:
    return b""


def unwritten_tail(data: bytes) -> bytes:
    """A file of the right size whose end never reached the disk."""
    at = header_at(data, "000003.png")
    return data[:at] + bytes(len(data) - at)


BEFORE: list[tuple[Callable[[bytes], bytes], str]] = [
    *DAMAGES,
    (garbage, "at its start: damaged tar header at byte 0"),
    (zeroed, "at its start: .* zero bytes from 0 to the end"),
    (emptied, "at its start: the shard stops at byte 0"),
    (unwritten_tail, r"after sample '000002', member '000002.txt': \d+ zero bytes from \d+ to the end"),
]


@pytest.mark.parametrize(("damage", "message"), BEFORE, ids=[damage.__name__ for damage, _ in BEFORE])
def test_damage_before_indexing_is_named_or_left_out(
    folder: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    whole = load_index(folder)
    (folder / VICTIM).write_bytes(damage((folder / VICTIM).read_bytes()))
    with pytest.raises(ValueError, match=f"^{VICTIM}: {message}"):
        build_index(folder, progress=False)
    index = build_index(folder, bad_shards=1, progress=False)
    assert list(index.broken) == [VICTIM] and index.num_samples == 20
    for sample in range(20):
        theirs = sample if sample < 10 else sample + 10
        assert index.key(sample) == whole.key(theirs)
        assert stored(index, sample, "image") == stored(whole, theirs, "image")


# --- after indexing -------------------------------------------------------------------------------------------------


def loader(index: ShardIndex, bad_samples: int = 100) -> Loader:
    config = DataConfig(path=str(index.folder), image_size=8, caption_dropout=0, bad_samples=bad_samples)
    return make_loader(config, index, seed=3, rank=0, world_size=1, global_batch=10, micro_batch=10, consumed=0)


def first_epoch(some: Loader) -> list[tuple[str, str, int]]:
    """Key, caption and the red of each picture."""
    batches = list(islice(iter(some), 3))
    red = [round((float(pixels[0, 0, 0]) + 1) * 127.5) for batch in batches for pixels in batch.pixels]
    return [*zip((k for b in batches for k in b.keys), (c for b in batches for c in b.captions), red, strict=True)]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (damage, rf"{VICTIM} has \d+ bytes, expected \d+")
        for damage, _ in DAMAGES
        if damage not in (zero_a_header, flip_header_bit)
    ]
    + [(emptied, f"{VICTIM} has 0 bytes"), (None, f"{VICTIM} is missing")],
)
def test_another_size_is_seen_before_reading(folder: Path, damage: Callable[[bytes], bytes] | None, fault: str) -> None:
    data = (folder / VICTIM).read_bytes()
    if damage is None:
        (folder / VICTIM).unlink()
    else:
        (folder / VICTIM).write_bytes(damage(data))
    with pytest.raises(ValueError, match=rf"the shards are not those that were indexed: {fault}"):
        load_index(folder)


def replaced(data: bytes) -> bytes:
    """The same names with other pictures."""
    other = data
    for number in range(10):
        assert len(png(number)) == len(png(number + 50))
        other = other.replace(png(number), png(number + 50))
    return other


def flip_in_picture(data: bytes) -> bytes:
    at = header_at(data, "000004.png") + 512 + 45
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def flip_in_caption(data: bytes) -> bytes:
    return data.replace(b"picture 4", b"pictuse 4")


def zero_in_picture(data: bytes) -> bytes:
    at = header_at(data, "000004.png") + 512
    return data[:at] + bytes(64) + data[at + 64 :]


SAME_SIZE: list[tuple[Callable[[bytes], bytes], int]] = [
    (replaced, 10),
    (garbage, 10),
    (zeroed, 10),
    (unwritten_tail, 7),
    (flip_in_picture, 1),
    (flip_in_caption, 1),
    (zero_in_picture, 1),
]


@pytest.mark.parametrize(("damage", "count"), SAME_SIZE, ids=[damage.__name__ for damage, _ in SAME_SIZE])
def test_other_bytes_are_substituted_counted_and_budgeted(
    folder: Path, damage: Callable[[bytes], bytes], count: int
) -> None:
    index = load_index(folder)
    sound = first_epoch(loader(index))
    assert sorted(sound) == sorted((index.key(n), f"picture {int(index.key(n))}", int(index.key(n))) for n in range(30))
    data = (folder / VICTIM).read_bytes()
    assert len(damage(data)) == len(data) and damage(data) != data
    (folder / VICTIM).write_bytes(damage(data))
    with pytest.warns(UserWarning, match=r"checksum \(CRC32\) differs") as warned:
        found = first_epoch(loader(load_index(folder), bad_samples=count))
    assert len(warned) == count
    assert all(sample in sound for sample in found), "a damaged sample was used"
    assert sum(one != other for one, other in zip(sound, found, strict=True)) == count
    with warnings.catch_warnings(), pytest.raises(BadDataError, match=f"{count} bad samples, more than the budget of"):
        warnings.simplefilter("ignore")
        first_epoch(loader(load_index(folder), bad_samples=count - 1))


def test_damage_to_headers_alone_harms_no_reader(folder: Path) -> None:
    sound = first_epoch(loader(load_index(folder)))
    data = (folder / VICTIM).read_bytes()
    at = header_at(data, "000004.png")
    (folder / VICTIM).write_bytes(data[:at] + bytes(512) + data[at + 512 :])
    assert first_epoch(loader(load_index(folder))) == sound


# --- any bytes ------------------------------------------------------------------------------------------------------

FILES = [
    (f"{key}.{extension}", data)
    for key in "abc"
    for extension, data in (("png", png(ord(key), (40, 40)) + bytes(900)), ("txt", f"caption {key}".encode()))
]


def edited(data: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(data)
    for at, new in edits:
        changed[at : at + len(new)] = new[: len(data) - at]
    return bytes(changed)


def touched(data: bytes, other: bytes) -> set[str]:
    """Keys of the samples any byte of which, headers and padding included, differs."""
    bounds = [header_at(data, f"{key}.png") for key in "abc"] + [header_at(data, "c.txt") + 1024]
    return {key for key, (a, b) in zip("abc", pairwise(bounds), strict=True) if data[a:b] != other[a:b]}


WORDS = st.one_of(
    st.binary(min_size=1, max_size=3),
    st.integers(1, 1500).map(bytes),
    st.sampled_from(
        [b"7", b"0000000", b"5", b"2", b"\x80", b"\xff" * 12, b"x", b"L", b"g", b"S", b"../", b"ustar  \0"]
    ),
)
PLACES = st.one_of(
    st.integers(0, 10239), st.sampled_from([n * 512 + m for n in range(16) for m in (0, 100, 124, 148, 156)])
)


@settings(derandomize=True, deadline=None, max_examples=250, database=None)
@given(edits=st.lists(st.tuples(PLACES, WORDS), min_size=1, max_size=2), end=st.integers(-8, 10240))
def test_edited_bytes_make_an_error_or_spare_the_other_samples(edits: list[tuple[int, bytes]], end: int) -> None:
    with TemporaryDirectory() as name:
        shard = Path(name) / "a.tar"
        write_tar(shard, FILES)
        data = shard.read_bytes()
        assert len(data) == 10240
        # Now and then it is cut off too.
        changed = edited(data, edits)[: end if end % 3 == 0 and end > 0 else None]
        shard.write_bytes(changed)
        try:
            index = build_index(Path(name), progress=False)
        except ValueError as error:
            assert str(error).startswith("a.tar: ")
            assert changed != data
            return
        assert index.num_samples >= 3, "fewer samples without a word"
        hit = touched(data, changed)
        found = {index.key(number): number for number in range(index.num_samples)}
        for key in {"a", "b", "c"} - hit:
            number = found[key]
            assert number not in index.bad
            assert stored(index, number, "image") == dict(FILES)[f"{key}.png"]
            assert stored(index, number, "caption") == dict(FILES)[f"{key}.txt"]
