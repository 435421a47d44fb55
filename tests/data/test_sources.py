"""Batches of several sizes and from several sources: the same stream whoever reads it, and no batch of two kinds."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dydit_scale.data.buckets import Bucket, config_buckets, nearest_bucket
from dydit_scale.data.config import DataConfig, SourceConfig
from dydit_scale.data.dataset import DataSet, load_data
from dydit_scale.data.decode import decode_image, image_tensor
from dydit_scale.data.index import ShardIndex
from dydit_scale.data.loader import BadDataError, Batch, make_loader
from dydit_scale.data.shards import write_shards
from dydit_scale.data.video import encode_mp4
from tests.data.test_loader import assert_same, change, joined, png

SIDES = [(16, 16)] * 4 + [(32, 8), (20, 13), (9, 30), (14, 22)]
BUCKETS = {"buckets": True, "bucket_step": 4, "max_aspect": 4.0, "bucket_batch": 4}


def picture(number: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sides(number: int) -> tuple[int, int]:
    """Width and height of a picture."""
    return SIDES[number % len(SIDES)]


def write_pictures(folder: Path, count: int = 43) -> ShardIndex:
    samples = ({"__key__": f"{n:04d}", "png": picture(n, *sides(n)), "txt": f"picture {n:04d}"} for n in range(count))
    return write_shards(samples, folder, samples_per_shard=3, progress=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Forty-three pictures of several sizes in fifteen shards."""
    return write_pictures(tmp_path_factory.mktemp("sizes") / "shards")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Five labelled pictures."""
    samples = ({"__key__": f"s{n}", "png": png(n), "cls": str(n)} for n in range(5))
    return write_shards(samples, tmp_path_factory.mktemp("squares") / "shards", samples_per_shard=2, progress=False)


def bucketed(index: ShardIndex, **changes: object) -> DataConfig:
    return DataConfig(**{"path": str(index.folder), "image_size": 16, "caption_dropout": 0.2, **BUCKETS, **changes})


def mixed(*indexes: ShardIndex, weights: tuple[float, ...] = (0.75, 0.25), **changes: object) -> DataConfig:
    named = zip(indexes, weights, strict=True)
    sources = tuple(SourceConfig(path=str(index.folder), weight=weight) for index, weight in named)
    return bucketed(indexes[0], path="", sources=sources, **changes)


def batches(
    config: DataConfig, count: int, *, rank: int = 0, world_size: int = 1, micro_batch: int = 4, consumed: int = 0,
    global_batch: int = 8, quarantine: Path | None = None,
) -> list[Batch]:  # fmt: skip
    loader = make_loader(
        config, load_data(config), seed=5, rank=rank, world_size=world_size, global_batch=global_batch,
        micro_batch=micro_batch, consumed=consumed, quarantine=quarantine,
    )  # fmt: skip
    return list(islice(iter(loader), count))


def in_turn(ranks: list[list[Batch]]) -> list[Batch]:
    return list(chain.from_iterable(zip(*ranks, strict=True)))


def one_by_one(many: list[Batch]) -> list[Batch]:
    """Micro-batches of one sample, which can be compared whatever their sizes."""

    def part(batch: Batch, n: int) -> Batch:
        fields = (value if value is None or isinstance(value, int) else value[n : n + 1] for value in batch)
        return Batch(*fields)

    return [part(batch, n) for batch in many for n in range(len(batch.keys))]


# --- buckets --------------------------------------------------------------------------------------------------------


def test_micro_batches_are_of_one_size_and_hold_the_pictures(pictures: ShardIndex) -> None:
    config = bucketed(pictures, caption_dropout=0)
    sizes = config_buckets(config)
    assert sizes == ((32, 8), (20, 12), (16, 16), (12, 20), (8, 32))
    seen = Counter()
    for batch in batches(config, 60):
        for key, pixels, caption in zip(batch.keys, batch.pixels, batch.captions, strict=True):
            width, height = sides(int(key))
            size = sizes[nearest_bucket(width, height, sizes)]
            image = decode_image(picture(int(key), width, height))
            assert torch.equal(pixels, image_tensor(image, *size))
            assert caption == f"picture {key}"
            seen[size] += 1
    assert set(seen) == set(sizes)


def test_picture_covers_its_size_and_is_cropped_at_the_centre() -> None:
    ramp = np.zeros((10, 40, 3), np.uint8)
    ramp[...] = np.arange(40)[None, :, None]
    wide = image_tensor(Image.fromarray(ramp), 10, 20)
    assert ((wide + 1) * 127.5).round()[0, 0].tolist() == list(range(10, 30))
    tall = image_tensor(Image.fromarray(ramp.transpose(1, 0, 2)), 20, 10)
    assert torch.equal(tall, wide.transpose(1, 2))
    half = image_tensor(Image.fromarray(ramp), 5, 20)
    assert half.shape == (3, 5, 20) and half[0].std(0).max() < 1e-6
    assert torch.equal(image_tensor(Image.fromarray(ramp), 10, 40)[0, 0], torch.arange(40) / 127.5 - 1)


@pytest.mark.parametrize("source", ["buckets", "mixture"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_does_not_depend_on_who_reads_it(
    pictures: ShardIndex, squares: ShardIndex, source: str, workers: int
) -> None:
    config = bucketed(pictures) if source == "buckets" else mixed(pictures, squares)
    reference = one_by_one(batches(config, 40))
    assert len({tuple(one.pixels.shape) for one in reference}) == 5
    other = DataConfig(**{**config.__dict__, "workers": workers})
    for world_size, micro_batch in ((2, 4), (4, 2), (8, 1)):
        count = 40 * 4 // micro_batch // world_size
        ranks = [batches(other, count, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(2)]
        for rank, read in enumerate(ranks):
            own = [n for n in range(160) if n // micro_batch % world_size == rank]
            for one, n in zip(one_by_one(read), own, strict=True):
                assert_same(one, reference[n])
                assert one.source == reference[n].source
    for consumed in (8, 36, 104):
        resumed = one_by_one(batches(other, 10, consumed=consumed))
        for one, expected in zip(resumed, reference[consumed:], strict=False):
            assert_same(one, expected)


def test_random_plans_of_stops_and_world_sizes_give_one_order(pictures: ShardIndex, squares: ShardIndex) -> None:
    config = mixed(pictures, squares)
    reference = batches(config, 60)
    keys = [key for batch in reference for key in batch.keys]
    plans = np.random.RandomState(2)
    for _ in range(5):
        consumed, read = 0, []
        while consumed < 160:
            world_size, micro_batch = int(plans.choice([1, 2, 4])), int(plans.choice([1, 2, 4]))
            global_batch = world_size * micro_batch * int(plans.randint(1, 3)) * (4 // micro_batch)
            steps, lost = int(plans.randint(1, 4)), int(plans.randint(0, 2))
            count = steps * global_batch // world_size // micro_batch
            options = {"world_size": world_size, "micro_batch": micro_batch, "global_batch": global_batch}
            ranks = [batches(config, count, rank=rank, consumed=consumed, **options) for rank in range(world_size)]
            kept = max(1, steps - lost) * global_batch
            read += [key for batch in in_turn(ranks) for key in batch.keys][:kept]
            consumed += kept
        assert read[:160] == keys[:160]


def test_a_step_may_hold_an_end_of_an_epoch_or_several(pictures: ShardIndex, squares: ShardIndex) -> None:
    """Fewer samples than a global batch, fewer shards than ranks: the counts are exact nevertheless."""
    plain = DataConfig(path=str(squares.folder), image_size=8)
    ranks = [batches(plain, 3, rank=rank, world_size=8, micro_batch=2, global_batch=16) for rank in range(8)]
    counts = Counter(key for batch in in_turn(ranks) for key in batch.keys)
    assert sum(counts.values()) == 48 and set(counts.values()) == {9, 10} and len(counts) == 5
    config = bucketed(pictures, bucket_batch=64)  # more than there are samples
    counts = Counter(key for batch in batches(config, 1, global_batch=64, micro_batch=64) for key in batch.keys)
    members = [n for n in range(43) if bucket_of(n, config) == bucket_of(int(next(iter(counts))), config)]
    assert sorted(map(int, counts)) == members
    assert set(counts.values()) <= {64 // len(members), -(-64 // len(members))}


def bucket_of(number: int, config: DataConfig) -> Bucket:
    sizes = config_buckets(config)
    return sizes[nearest_bucket(*sides(number), sizes)]


def test_substitutes_come_from_the_bucket_if_it_has_a_good_one(tmp_path: Path) -> None:
    index = write_pictures(tmp_path / "shards")
    config = bucketed(index)
    sound = one_by_one(batches(config, 60))
    for sample in (4, 12):  # of five of their size
        change(index, sample, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = one_by_one(batches(config, 60))
        again = one_by_one(batches(config, 30, rank=1, world_size=2))
    hits = 0
    for one, expected in zip(got, sound, strict=True):
        assert one.pixels.shape == expected.pixels.shape
        if expected.keys[0] in ("0004", "0012"):
            hits += 1
            assert one.keys[0] not in ("0004", "0012")
            assert bucket_of(int(one.keys[0]), config) == bucket_of(4, config)
        else:
            assert one.keys == expected.keys
    assert hits > 4
    for one, n in zip(again, [n for n in range(240) if n // 4 % 2], strict=True):
        assert_same(one, got[n])


def test_the_only_sample_of_a_bucket_is_replaced_by_one_of_another(tmp_path: Path) -> None:
    index = write_shards(
        ({"__key__": f"{n}", "png": picture(n, *((16, 16) if n else (32, 8))), "txt": "x"} for n in range(6)),
        tmp_path / "shards", samples_per_shard=6, progress=False,
    )  # fmt: skip
    change(index, 0, "image")
    with pytest.warns(UserWarning, match="sample '0': image checksum"):
        got = batches(bucketed(index), 12)
    wide = [batch for batch in got if batch.pixels.shape[2:] == (8, 32)]
    assert wide and "0" not in {key for batch in wide for key in batch.keys}


def test_bad_samples_of_the_index_do_not_stand_alone_in_a_bucket(tmp_path: Path) -> None:
    some = [{"__key__": f"{n}", "png": picture(n, 16, 16), "txt": "x"} for n in range(5)]
    some.append({"__key__": "5", "png": picture(5, 32, 8)})
    index = write_shards(some, tmp_path / "shards", samples_per_shard=6, progress=False)
    assert index.bad.keys() == {5}
    with pytest.warns(UserWarning, match="sample '5': caption missing"):
        got = batches(bucketed(index), 12)
    assert {tuple(batch.pixels.shape[2:]) for batch in got} == {(16, 16)}


def test_micro_batches_that_would_hold_two_sizes_are_refused(pictures: ShardIndex, squares: ShardIndex) -> None:
    for config in (bucketed(pictures, bucket_batch=6), mixed(pictures, squares, bucket_batch=6, buckets=False)):
        with pytest.raises(
            ValueError, match=r"bucket_batch 6: .* micro-batches of 4, .* set data.bucket_batch=12 .* of 1, 2, 3, 6$"
        ):
            batches(config, 1)
        assert batches(config, 1, micro_batch=3, global_batch=3)
        with pytest.raises(ValueError, match=r"after 4 samples, micro-batches of 3 .* divide 2 "):
            batches(config, 1, micro_batch=3, global_batch=3, consumed=4)
    assert batches(bucketed(pictures, bucket_batch=6, buckets=False), 1), "of one size all micro-batches will do"


# --- mixtures -------------------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight(pictures: ShardIndex, squares: ShardIndex) -> None:
    got = batches(mixed(pictures, squares), 80)
    assert Counter(batch.source for batch in got) == {0: 60, 1: 20}
    for batch in got:
        assert all(key.startswith("s") == (batch.source == 1) for key in batch.keys)
        assert (batch.labels is None) == (batch.source == 0), "one source has labels"
    counts = Counter(key for batch in got if batch.source == 1 for key in batch.keys)
    assert set(counts.values()) == {16} and len(counts) == 5
    plain = [key for batch in batches(mixed(pictures, squares, buckets=False), 80) for key in batch.keys]
    counts = Counter(key for key in plain if not key.startswith("s"))
    assert len(counts) == 43 and set(counts.values()) == {240 // 43, 240 // 43 + 1}


def test_sources_of_equal_size_are_not_read_in_step(pictures: ShardIndex) -> None:
    got = batches(mixed(pictures, pictures, weights=(1, 1), buckets=False), 20)
    orders = [[key for batch in got if batch.source == source for key in batch.keys] for source in (0, 1)]
    assert len(orders[0]) == len(orders[1]) == 40 and orders[0] != orders[1]


def test_one_source_is_as_a_path(pictures: ShardIndex) -> None:
    alone = DataConfig(path="", sources=(SourceConfig(path=str(pictures.folder), weight=3),), image_size=16)
    plain = DataConfig(path=str(pictures.folder), image_size=16)
    assert_same(joined(batches(alone, 20)), joined(batches(plain, 20)))
    assert load_data(alone).digest == load_data(plain).digest == pictures.digest


def test_digest_and_count_are_of_all_sources_in_their_order(pictures: ShardIndex, squares: ShardIndex) -> None:
    both, turned = DataSet((pictures, squares)), DataSet((squares, pictures))
    assert both.num_samples == 48
    assert len({both.digest, turned.digest, pictures.digest, squares.digest}) == 4
    assert load_data(mixed(pictures, squares)).digest == both.digest


def test_each_source_has_its_own_budget_of_bad_samples(tmp_path: Path) -> None:
    one, other = write_pictures(tmp_path / "one", 8), write_pictures(tmp_path / "other", 8)
    for index in (one, other):
        for sample in (1, 2):
            change(index, sample, "image")
    quarantine = tmp_path / "quarantine.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = mixed(one, other, buckets=False, bad_samples=2)
        assert len(batches(config, 40, quarantine=quarantine)) == 40
        with pytest.raises(BadDataError, match="2 bad samples, more than the budget of 1"):
            batches(mixed(one, other, buckets=False, bad_samples=1), 40)
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted((line["folder"], line["key"]) for line in lines) == [
        (str(folder), key) for folder in (one.folder, other.folder) for key in ("0001", "0002")
    ]


def test_pictures_beside_clips_by_weight(tmp_path: Path, pictures: ShardIndex) -> None:
    pytest.importorskip("av")

    def clips() -> Iterator[dict[str, bytes | str]]:
        for number in range(4):
            frames = np.full((6, 16, 32 if number % 2 else 16, 3), 40 * number, np.uint8)
            yield {"__key__": f"c{number}", "mp4": encode_mp4(frames, 8), "txt": "clip"}

    moving = write_shards(clips(), tmp_path / "clips", samples_per_shard=2, progress=False)
    sources = (
        SourceConfig(path=str(moving.folder), weight=1, images_per_clip=1),
        SourceConfig(path=str(pictures.folder), weight=2, frames=1),
    )
    config = DataConfig(sources=sources, image_size=16, frames=4, **BUCKETS)
    shapes = Counter((batch.source, *batch.pixels.shape) for batch in batches(config, 30))
    assert sum(count for (source, *_), count in shapes.items() if source == 0) == 10
    assert {shape for shape in shapes if shape[0] == 0} == {(0, 4, 5, 3, 16, 16), (0, 4, 5, 3, 12, 20)}
    assert {shape[:3] for shape in shapes if shape[0] == 1} == {(1, 4, 3)}
    assert [part.frames for part in config.split()] == [4, 1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, "data.path, data.sources: expected one folder of shards or a list of them, got neither"),
        ({"path": "x", "sources": [{"path": "y"}]}, r"got both \(path 'x' and 1 sources\)"),
        ({"sources": [{"path": "x"}, {"path": "y", "frames": 0}]}, r"data.sources\[1\]: data.frames .* got 0 and 1"),
        ({"sources": [{"path": "x", "images_per_clip": 1}]}, r"data.sources\[0\]: data.images_per_clip is 1"),
        ({"sources": [{"path": ""}]}, "path is empty"),
        ({"sources": [{"path": "x", "weight": 0.0}]}, "weight must be a positive number, got 0.0; leave out"),
        ({"sources": [{"path": "x", "weight": float("inf")}]}, "weight must be a positive number, got inf"),
    ],
)
def test_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources = tuple(SourceConfig(**source) for source in setting.pop("sources", ()))
        DataConfig(sources=sources, **setting)


# --- captions -------------------------------------------------------------------------------------------------------


def test_of_several_captions_each_has_its_turn(tmp_path: Path) -> None:
    texts = {
        "a": {"captions": ["one ", "two", "three"]}, "b": {"caption": ["four", "five"]}, "c": {"caption": "six"},
        "d": {"captions": "seven", "caption": "unread"}, "e": {"captions": [], "caption": "eight"},
    }  # fmt: skip
    some = [{"__key__": key, "png": png(1), "json": json.dumps(text)} for key, text in texts.items()]
    some += [{"__key__": "f", "png": png(1), "txt": "nine", "json": '{"captions": ["unread"]}'}]
    some += [{"__key__": "g", "png": png(1), "json": '{"captions": []}'}]
    some += [{"__key__": "h", "png": png(1), "json": '{"captions": ["x", 1]}'}]
    index = write_shards(some, tmp_path / "shards", samples_per_shard=5, progress=False)
    assert index.bad.keys() == {6, 7} and 'no string under "captions", nor a list of them' in index.bad[7]
    config = DataConfig(path=str(index.folder), image_size=8, caption_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = joined(batches(config, 100))
        ranks = joined(in_turn([batches(config, 50, rank=rank, world_size=2) for rank in range(2)]))
    assert_same(got, ranks)
    found = Counter(zip(got.keys, got.captions, strict=True))
    assert {key: {text for k, text in found if k == key} for key in "abcdef"} == {
        "a": {"one", "two", "three"}, "b": {"four", "five"}, "c": {"six"}, "d": {"seven"}, "e": {"eight"},
        "f": {"nine"},
    }  # fmt: skip
    times = [found["a", text] for text in ("one", "two", "three")]
    # Four standard deviations of a third of the draws.
    assert all(abs(count - sum(times) / 3) < 4 * (sum(times) * 2 / 9) ** 0.5 for count in times)
