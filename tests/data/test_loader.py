"""Batches: the same stream for every number of ranks and workers, from any position, with bad samples replaced."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dydit_scale.data.loader import Batch, DataConfig, Loader, make_loader
from dydit_scale.data.reader import MAX_SUBSTITUTES
from dydit_scale.data.shards import ShardIndex, build_index, load_index, write_shards
from dydit_scale.diffusion.randomness import keyed_seed

COUNT = 30


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(count: int, labels: bool = False) -> Iterator[dict[str, bytes | str]]:
    for number in range(count):
        yield {"__key__": f"{number:04d}", "png": png(number), "txt": f"picture {number:04d}"} | (
            {"cls": str(number % 7)} if labels else {}
        )


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """Thirty samples in five shards."""
    return write_shards(samples(COUNT), tmp_path / "shards", samples_per_shard=7)


def loader(
    index: ShardIndex,
    *,
    seed: int = 5,
    rank: int = 0,
    world_size: int = 1,
    global_batch: int = 8,
    micro_batch: int = 4,
    consumed: int = 0,
    quarantine: Path | None = None,
    **config: float,
) -> Loader:
    return make_loader(
        DataConfig(path=str(index.folder), **{"image_size": 8, **config}),
        index,
        seed=seed,
        rank=rank,
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=micro_batch,
        consumed=consumed,
        quarantine=quarantine,
    )


def take(some: Loader, count: int) -> list[Batch]:
    return list(islice(iter(some), count))


def joined(batches: list[Batch]) -> Batch:
    labels, picture_labels = (
        None if values[0] is None else torch.cat(values)
        for values in ([batch.labels for batch in batches], [batch.picture_labels for batch in batches])
    )
    return Batch(
        torch.cat([batch.positions for batch in batches]),
        torch.cat([batch.pixels for batch in batches]),
        tuple(chain.from_iterable(batch.captions for batch in batches)),
        tuple(chain.from_iterable(batch.keys for batch in batches)),
        labels,
        tuple(chain.from_iterable(batch.picture_captions for batch in batches)),
        picture_labels,
    )


def cut(batch: Batch, count: int) -> Batch:
    return Batch(*(part if part is None or isinstance(part, int) else part[:count] for part in batch))


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.pixels, other.pixels)
    assert (one.captions, one.keys) == (other.captions, other.keys)
    assert one.picture_captions == other.picture_captions
    for name in ("labels", "picture_labels"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b)


def change(index: ShardIndex, sample: int, part: str) -> None:
    """Invert one byte of a sample, as a disk might after indexing."""
    place = getattr(index.record(sample), part)
    with (index.folder / index.shards[index.shard_of(sample)].name).open("r+b") as file:
        at = place.offset + place.bytes // 2
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


def test_batches_hold_the_samples(index: ShardIndex) -> None:
    batches = take(loader(index, caption_dropout=0), 8)
    for batch in batches:
        assert isinstance(batch, Batch)
        assert (batch.positions.dtype, batch.pixels.dtype, batch.pixels.shape) == (
            torch.int64,
            torch.float32,
            (4, 3, 8, 8),
        )
        for row, key in enumerate(batch.keys):
            pixels = np.random.RandomState(int(key)).randint(0, 256, (8, 8, 3), dtype=np.uint8)
            assert torch.equal(
                ((batch.pixels[row] + 1) * 127.5).round(), torch.from_numpy(pixels).float().movedim(2, 0)
            )
            assert batch.captions[row] == f"picture {key}"
    assert joined(batches).positions.tolist() == list(range(32))
    assert sorted(joined(batches).keys[:COUNT]) == [f"{number:04d}" for number in range(COUNT)]
    assert joined(batches).keys[:COUNT] != tuple(f"{number:04d}" for number in range(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_read_what_one_reads(index: ShardIndex, workers: int) -> None:
    steps = 10
    reference = joined(take(loader(index, caption_dropout=0.3), 2 * steps))
    ranks = [
        take(loader(index, rank=rank, world_size=2, micro_batch=2, caption_dropout=0.3, workers=workers), 2 * steps)
        for rank in range(2)
    ]
    in_order = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert_same(joined(in_order), reference)
    assert len(reference.keys) == 80 > 2 * COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_exactly(index: ShardIndex, workers: int) -> None:
    reference = joined(take(loader(index), 20))
    for consumed in (8, 24, 37):
        # More is prefetched than was trained on; only the position counts.
        first = joined(take(loader(index, workers=workers), 10))
        second = joined(take(loader(index, consumed=consumed, global_batch=4, workers=workers), 10))
        resumed = joined([cut(first, consumed), cut(second, 80 - consumed)])
        assert_same(resumed, cut(reference, len(resumed.keys)))


def test_random_plans_of_stops_and_world_sizes_give_one_order(index: ShardIndex) -> None:
    """Each plan trains some steps on some ranks, loses some of them, and resumes on others."""
    reference = joined(take(loader(index), 30))
    plans = np.random.RandomState(1)
    for _ in range(6):
        consumed, read = 0, []
        while consumed < 72:
            world_size = int(plans.choice([1, 2, 4]))
            steps, lost = int(plans.randint(1, 4)), int(plans.randint(0, 2))
            ranks = [
                take(
                    loader(index, rank=rank, world_size=world_size, micro_batch=1, consumed=consumed),
                    steps * 8 // world_size,
                )
                for rank in range(world_size)
            ]
            kept = steps - min(lost, steps - 1)
            read += [batch for together in zip(*ranks, strict=True) for batch in together][: 8 * kept]
            consumed += 8 * kept
        got = joined(read)
        assert got.positions.tolist() == list(range(consumed))
        assert_same(got, cut(reference, consumed))
        counts = Counter(got.keys)
        assert set(counts.values()) <= {consumed // COUNT, -(-consumed // COUNT)} and len(counts) == COUNT


class Leg(NamedTuple):
    """What one start of an elastic run does before it is killed."""

    world_size: int
    micro_batch: int
    accumulation: int
    committed: int
    """Steps in the last checkpoint."""
    lost: int
    """Steps after it."""


LEGS = st.builds(
    Leg, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), committed=st.integers(0, 3), lost=st.integers(0, 2)
)


@settings(max_examples=25, deadline=None)
@given(shards=st.lists(st.integers(1, 7), min_size=1, max_size=5), legs=st.lists(LEGS, min_size=1, max_size=4))
def test_committed_steps_of_an_elastic_run_read_what_one_rank_reads(shards: list[int], legs: list[Leg]) -> None:
    total = sum(shards)
    with TemporaryDirectory() as folder:
        index = write_sizes(Path(folder), shards)
        keys: list[str] = []
        for world_size, micro_batch, accumulation, committed, lost in legs:
            batch = {"world_size": world_size, "micro_batch": micro_batch}
            step, count = world_size * micro_batch * accumulation, (committed + lost) * accumulation
            ranks = [
                take(loader(index, rank=rank, **batch, global_batch=step, consumed=len(keys)), count)
                for rank in range(world_size)
            ]
            read = [key for together in zip(*ranks, strict=True) for one in together for key in one.keys]
            assert len(read) == (committed + lost) * step
            keys += read[: committed * step]
        uninterrupted = take(loader(index, micro_batch=1, global_batch=1), len(keys))
    assert keys == [key for batch in uninterrupted for key in batch.keys]
    counts = Counter(keys)
    assert {counts[f"{number:04d}"] for number in range(total)} <= {len(keys) // total, -(-len(keys) // total)}


def write_sizes(folder: Path, sizes: list[int]) -> ShardIndex:
    """A folder of shards that hold so many samples each."""
    found = samples(sum(sizes))
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{number}.tar"), encoder=False) as writer:
            for sample in islice(found, size):
                writer.write({**sample, "txt": str(sample["txt"]).encode()})
    return build_index(folder, progress=False)


def test_prefetching_more_or_less_reads_the_same(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = joined(take(loader(index), 10))
    for workers, factor in ((1, 1), (1, 7), (3, 1), (3, 5)):
        loaders = []

        def fetching(*args: Any, made: list[Any] = loaders, ahead: int = factor, **options: Any) -> DataLoader:
            made.append(DataLoader(*args, **options, prefetch_factor=ahead))
            return made[-1]

        monkeypatch.setattr("dydit_scale.data.loader.DataLoader", fetching)
        assert_same(joined(take(loader(index, workers=workers), 10)), reference)
        (made,) = loaders
        assert (made.num_workers, made.prefetch_factor) == (workers, factor)


def test_iterating_twice_begins_at_the_same_position(index: ShardIndex) -> None:
    some = loader(index, consumed=16)
    assert_same(joined(take(some, 3)), joined(take(some, 3)))


def test_global_randomness_is_left_alone(index: ShardIndex) -> None:
    before = torch.get_rng_state()
    take(loader(index), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_changes_order_and_dropout(index: ShardIndex) -> None:
    one, other = (joined(take(loader(index, seed=seed, caption_dropout=0.5), 8)) for seed in (1, 2))
    assert one.keys != other.keys
    assert [not caption for caption in one.captions] != [not caption for caption in other.captions]


def test_caption_dropout_has_the_right_share_and_extremes(index: ShardIndex) -> None:
    def dropped(share: float, count: int = 4) -> float:
        captions = joined(take(loader(index, caption_dropout=share, global_batch=200, micro_batch=200), count)).captions
        return sum(not caption for caption in captions) / len(captions)

    assert dropped(0.0, 1) == 0
    assert dropped(1.0, 1) == 1
    # Three standard deviations of a mean over 800 draws.
    assert abs(dropped(0.25) - 0.25) < 3 * (0.25 * 0.75 / 800) ** 0.5


def test_labels_come_with_captions_and_are_dropped_with_them(tmp_path: Path) -> None:
    index = write_shards(samples(COUNT, labels=True), tmp_path / "labelled", samples_per_shard=7)
    got = joined(take(loader(index, caption_dropout=0.4), 16))
    assert got.labels is not None and got.labels.dtype == torch.int64
    expected = [int(key) % 7 if caption else -1 for key, caption in zip(got.keys, got.captions, strict=True)]
    assert got.labels.tolist() == expected
    assert 10 < expected.count(-1) < 45
    plain = write_shards(samples(COUNT), tmp_path / "plain", samples_per_shard=7)
    without = joined(take(loader(plain, caption_dropout=0.4), 16))
    assert without.labels is None and without.captions == got.captions


def test_labels_alone_will_do(tmp_path: Path) -> None:
    some = [{"__key__": f"{n}", "png": png(n), "cls": f"{n}"} for n in range(6)]
    del some[4]["cls"]
    some[4]["txt"] = "four"
    got = joined(take(loader(write_shards(some, tmp_path / "shards", samples_per_shard=6), caption_dropout=0), 3))
    assert got.labels is not None
    for key, caption, label in zip(got.keys, got.captions, got.labels.tolist(), strict=True):
        assert (caption, label) == (("four", -1) if key == "4" else ("", int(key)))


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_shards(samples(20), tmp_path / "many", samples_per_shard=1)
    reference = joined(take(loader(index), 10))
    monkeypatch.setattr("dydit_scale.data.storage.MAX_OPEN_SHARDS", 2)
    some = loader(index)
    batches, most = [], 0
    for batch in islice(iter(some), 10):
        batches.append(batch)
        most = max(most, len(some._reader._sources[0]._files._shards._open))
    assert_same(joined(batches), reference)
    assert most == 2
    assert len(some._reader._sources[0]._files._shards._open) == 0, "a closed iterator leaves files open"


# --- bad samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["image", "caption"])
def test_changed_bytes_are_substituted_counted_and_named(
    index: ShardIndex, tmp_path: Path, part: str, workers: int
) -> None:
    sound = joined(take(loader(index, caption_dropout=0), 16))
    change(index, 11, part)
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    with pytest.warns(UserWarning) as warned:
        batches = take(loader(index, caption_dropout=0, workers=workers, quarantine=quarantine), 16)
    got = joined(batches)
    hit = [position for position in range(64) if sound.keys[position] == "0011"]
    assert len(hit) >= 2
    for position in range(64):
        if position in hit:
            candidates = (keyed_seed(5, "substitute", position, k) % COUNT for k in range(9))
            expected = f"{next(sample for sample in candidates if sample != 11):04d}"
            assert (got.keys[position], got.captions[position]) == (expected, f"picture {expected}")
        else:
            assert got.keys[position] == sound.keys[position]
            assert torch.equal(got.pixels[position], sound.pixels[position])
    assert got.positions.tolist() == list(range(64))
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 1, "a bad sample is named once, not in every epoch"
    assert f"bad shard-000001.tar sample '0011': {part} checksum (CRC32) differs" in messages[0]
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(line["rank"], line["position"], line["shard"], line["key"]) for line in lines] == [
        (0, hit[0], "shard-000001.tar", "0011")
    ]


def test_substitutes_do_not_depend_on_ranks(index: ShardIndex) -> None:
    for sample in (2, 3, 11, 12, 13, 29):
        change(index, sample, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = joined(take(loader(index), 10))
        ranks = [take(loader(index, rank=rank, world_size=2), 10) for rank in range(2)]
    assert_same(cut(joined(list(chain.from_iterable(zip(*ranks, strict=True)))), 40), reference)


def test_bad_samples_of_the_index_are_substituted(tmp_path: Path) -> None:
    some = list(samples(12))
    some[3] = {"__key__": "0003", "png": png(3)}
    some[7]["png"] = b"no picture"
    index = write_shards(some, tmp_path / "shards", samples_per_shard=5)
    assert sorted(index.bad) == [3, 7]
    with pytest.warns(UserWarning) as warned:
        batches = take(loader(index, bad_samples=2), 6)
    assert not {"0003", "0007"} & set(joined(batches).keys)
    assert len(warned) == 2
    with pytest.raises(ValueError, match=r"2 bad samples, more than the budget of 1 .*'0003': caption missing.*'0007'"):
        loader(index, bad_samples=1)


def test_sample_beyond_a_shrunk_shard_is_bad(index: ShardIndex) -> None:
    shard = index.folder / index.shards[4].name
    shard.write_bytes(shard.read_bytes()[: index.record(29).image.offset + 5])
    with pytest.warns(UserWarning, match=r"sample '0029': image has 5 bytes, expected \d+: the shard was cut off"):
        keys = joined(take(loader(index), 8)).keys
    assert "0029" not in keys


@pytest.mark.parametrize("workers", [0, 2])
def test_beyond_the_budget_is_an_error(index: ShardIndex, tmp_path: Path, workers: int) -> None:
    order = [int(key) for key in joined(take(loader(index), 8)).keys[:COUNT]]
    worst = order[5], order[14], order[22]
    for sample in worst:
        change(index, sample, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = loader(index, bad_samples=3, workers=workers)
        assert some.counts() == (0, 0, 0)
        assert len(take(some, 20)) == 20 and some.counts() == (3, 0, 0)
        batches = iter(loader(index, bad_samples=2, workers=workers))
        with pytest.raises(ValueError) as caught:
            list(islice(batches, 20))
    message = str(caught.value)
    assert f"{index.folder}: 3 bad samples, more than the budget of 2 (data.bad_samples); first: " in message
    assert all(f"sample '{sample:04d}': image checksum" in message for sample in worst)
    assert "run `dydit data index" in message


@pytest.mark.parametrize("damage", ["vanished", "all bad"])
def test_errors_in_workers_arrive_with_their_message(index: ShardIndex, damage: str) -> None:
    if damage == "vanished":
        for shard in index.shards:
            (index.folder / shard.name).unlink()
        expected = "the shard cannot be opened any more"
    else:
        for sample in range(COUNT):
            change(index, sample, "caption")
        expected = f"at position 0 is bad and so are {MAX_SUBSTITUTES} substitutes; first: shard-00000"
    messages = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match=expected) as caught:
            take(loader(index, workers=workers), 1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "Traceback" not in messages[0]


def test_picture_that_this_pillow_cannot_read_is_bad(tmp_path: Path) -> None:
    """The index may come from a machine whose image library takes what this one does not."""
    some = list(samples(6))
    some[2]["png"] = b"no picture"
    folder = write_shards(some, tmp_path / "shards", samples_per_shard=6).folder
    index = load_index(folder)
    index.bad.clear()
    with pytest.warns(UserWarning, match=r"sample '0002': broken image .*no PNG, JPEG or WebP picture"):
        assert "0002" not in joined(take(loader(index), 2)).keys
    assert sorted(build_index(folder).bad) == [2]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "global_batch", "micro_batch", "message"),
    [
        (4, 10, 1, r"global batch of 10 cannot be split over 4 ranks; with micro-batches of 1 take 8 or 12$"),
        (4, 10, 2, r"with micro-batches of 2 take 8 or 16$"),
        (8, 4, 1, r"with micro-batches of 1 take 8$"),
        (2, 12, 4, r"share of 6 .*micro-batches of 4; take micro-batches of 3 or 6, or a global batch of 8 or 16$"),
        (1, 4, 8, r"share of 4 .*micro-batches of 8; take micro-batches of 4, or a global batch of 8$"),
        (2, 0, 1, r"at least 1.*got 0, 1 and 0"),
        (1, 4, 0, r"at least 1.*got 4, 0 and 0"),
    ],
)
def test_batches_that_do_not_divide_name_those_that_do(
    index: ShardIndex, world_size: int, global_batch: int, micro_batch: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader(index, world_size=world_size, global_batch=global_batch, micro_batch=micro_batch)


def test_the_named_batches_work(index: ShardIndex) -> None:
    for world_size, global_batch, micro_batch in [(4, 8, 2), (4, 16, 2), (8, 8, 1), (2, 12, 3), (2, 12, 6), (2, 16, 4)]:
        batches = loader(index, world_size=world_size, global_batch=global_batch, micro_batch=micro_batch)
        assert len(next(iter(batches)).captions) == micro_batch


def test_rank_and_position_are_checked(index: ShardIndex) -> None:
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            loader(index, rank=rank, world_size=2)
    with pytest.raises(ValueError, match=r"got 8, 4 and -1"):
        loader(index, consumed=-1)


@pytest.mark.parametrize(
    "setting",
    [
        {"path": ""},
        {"image_size": 0},
        {"caption_dropout": 1.1},
        {"workers": -1},
        {"bad_samples": -1},
        {"frames": 0},
        {"fps": 0.0, "frames": 8},
        {"fps": float("nan"), "frames": 8},
        {"fps": 8.0, "frames": 8, "frame_stride": 2},
        {"images_per_clip": -1},
        {"images_per_clip": 2},
    ],
)
def test_settings_are_checked(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"data.{next(iter(setting))}"):
        DataConfig(**{"path": "x", **setting})
