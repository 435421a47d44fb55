"""The built-in data: its language, its scenes, and the shards that hold them."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.shapes import CLASSES_FILE, write_shapes
from dydit_scale.data.shapes.language import (
    BACKGROUND,
    CATEGORIES,
    CLASSES,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Prompt,
    Subject,
    parse_caption,
    vocabulary,
)
from dydit_scale.data.shapes.scene import (
    CATEGORY_SHARES,
    Object,
    Scene,
    draw,
    make_class_scene,
    make_scene,
    place,
    random_prompt,
    shape_mask,
)
from dydit_scale.data.tar import walk_members
from dydit_scale.evaluation.shapes_judge import judge

GOLDEN = "8c36c16b8ac82dec270857ffeb0faf349816d166697c3b2ede08d63f2c97430b"
"""sha256 over the pictures at 32 pixels and the captions of scenes 0 to 99 of seed 0."""


def test_captions_read_back_to_their_meaning() -> None:
    rng = np.random.RandomState(0)
    seen: Counter[str] = Counter()
    for _ in range(4000):
        prompt = random_prompt(rng)
        assert parse_caption(prompt.caption) == prompt
        seen[prompt.category] += 1
    for category, share in CATEGORY_SHARES.items():
        assert abs(seen[category] / 4000 - share) < 0.03
    assert sum(CATEGORY_SHARES.values()) == pytest.approx(1)
    assert set(CATEGORY_SHARES) == set(CATEGORIES)


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("a circle", Prompt("single_object", (Subject("circle"),))),
        ("an orange ring", Prompt("colors", (Subject("ring", "orange"),))),
        ("a small orange ring", Prompt("colors", (Subject("ring", "orange", "small"),))),
        ("three crosses", Prompt("counting", (Subject("cross", count=3),))),
        ("a cross and a ring", Prompt("two_object", (Subject("cross"), Subject("ring")))),
        (
            "a red ring left of an orange ring",
            Prompt("position", (Subject("ring", "red"), Subject("ring", "orange")), "left of"),
        ),
        (
            "a red ring, a blue cross and a white circle",
            Prompt("attribute_binding", (Subject("ring", "red"), Subject("cross", "blue"), Subject("circle", "white"))),
        ),
    ],
)
def test_captions_say_what_they_mean(caption: str, prompt: Prompt) -> None:
    assert prompt.caption == caption
    assert parse_caption(caption) == prompt


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("", "cannot read ''"),
        ("a house", "cannot read 'a house'"),
        ("circle", "cannot read 'circle'"),
        ("a pink circle", "unknown word 'pink'"),
        ("a red blue circle", "unknown word 'blue'"),
        ("a red large circle", "expected 'a large red circle'"),
        ("a orange circle", "expected 'an orange circle'"),
        ("two circle", "expected 'two circles'"),
        ("a red red circle", "expected 'a red circle'"),
        ("a circle, a square", "expected 'a circle and a square'"),
        ("a ring above a cross above a circle", "expected 'a ring above a cross'"),
        ("a ring above a cross and a circle", "unknown word 'cross'"),
    ],
)
def test_other_captions_are_refused(caption: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_caption(caption)


def test_vocabulary_holds_every_word() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words)
    rng = np.random.RandomState(1)
    used = {word for _ in range(2000) for word in random_prompt(rng).caption.replace(",", " ,").split()}
    assert used == set(words)


DIAMETERS = {1: (0.34, 0.56), 2: (0.36, 0.42), 3: (0.32, 0.36)}
"""Of objects without a named size, by how many there are."""


def reach(thing: Object) -> float:
    return thing.diameter * (0.55 if thing.shape == "diamond" else 0.5)  # a diamond's tips lie further out


def check_objects(scene: Scene) -> None:
    subjects = [subject for subject in scene.prompt.subjects for _ in range(subject.count)]
    assert len(subjects) == len(scene.objects)
    for subject, thing in zip(subjects, scene.objects, strict=True):
        assert thing.shape == subject.shape
        assert subject.colour in (None, thing.colour)
        low, high = SIZES[subject.size] if subject.size else DIAMETERS[len(subjects)]
        assert low <= thing.diameter <= high
        margin = 0.04 + thing.diameter / 2
        assert margin <= thing.x <= 1 - margin and margin <= thing.y <= 1 - margin
    for number, one in enumerate(scene.objects):
        for other in scene.objects[:number]:
            gap = max(abs(one.x - other.x), abs(one.y - other.y)) - reach(one) - reach(other)
            assert gap > 0.04


def check_relation(scene: Scene) -> None:
    first, second = scene.objects
    dx, dy = first.x - second.x, first.y - second.y
    right, down = RELATIONS[str(scene.prompt.relation)]
    assert dx * right + dy * down > 0.2
    assert dx * right + dy * down > 1.3 * abs(dx * down + dy * right)


def test_scenes_fulfil_their_prompts() -> None:
    seen: Counter[str] = Counter()
    for number in range(1500):
        scene = make_scene(5, number)
        check_objects(scene)
        if scene.prompt.relation:
            check_relation(scene)
        else:
            assert all(after.x - before.x > 0.15 for before, after in pairwise(scene.objects))
            low = [thing.y > 0.5 for thing in scene.objects]
            assert len(low) < 3 or low == [False, True, False]
        seen[scene.prompt.category] += 1
    assert min(seen[category] for category in CATEGORIES) > 100


def test_objects_that_are_counted_have_one_colour() -> None:
    rng = np.random.RandomState(2)
    for _ in range(50):
        scene = place(random_prompt(rng, "counting"), rng)
        assert len({thing.colour for thing in scene.objects}) == 1


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        place(parse_caption("two large circles"), np.random.RandomState(0))


@pytest.mark.parametrize("seed", range(5))
def test_prompts_that_are_never_drawn_find_room_too(seed: int) -> None:
    for caption in ("a large red ring above a blue ring", "two small circles and a square"):
        scene = place(parse_caption(caption), np.random.RandomState(seed))
        assert judge(draw(scene, 64), caption).correct


def test_an_unknown_category_or_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="category 'cars'"):
        random_prompt(np.random.RandomState(0), "cars")
    with pytest.raises(ValueError, match="shape 'star'"):
        shape_mask("star", np.zeros(1), np.zeros(1))


def test_pictures_show_the_objects_and_nothing_else() -> None:
    for shape in SHAPES:
        scene = Scene(Prompt("single_object", (Subject(shape),)), (Object(shape, "red", 0.5, 0.5, 0.5),))
        picture = draw(scene, 64)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        middle = BACKGROUND if shape == "ring" else COLOURS["red"]
        assert tuple(picture[32, 32]) == middle
        at = (np.arange(64) + 0.5) / 64 - 0.5
        outside = np.maximum(abs(at)[None], abs(at)[:, None]) > 0.25 * 1.1 + 1 / 64
        assert (picture[outside] == BACKGROUND).all()
        # The covered area, in pixels, is that of the shape itself.
        cover = (picture[..., 0].astype(float) - BACKGROUND[0]) / (COLOURS["red"][0] - BACKGROUND[0])
        areas = {"circle": np.pi, "ring": 0.75 * np.pi, "square": 3.24, "diamond": 2.42, "triangle": 1.9}
        area = areas.get(shape, 4 * 0.68 - 0.68**2)
        assert cover.sum() == pytest.approx(area * 16**2, rel=0.02)


def test_scenes_follow_from_seed_and_number() -> None:
    assert make_scene(3, 7) == make_scene(3, 7)
    assert len({make_scene(seed, number) for seed in (3, 4) for number in range(50)}) == 100


def test_pictures_and_captions_stay_as_they_are() -> None:
    digest = hashlib.sha256()
    for number in range(100):
        scene = make_scene(0, number)
        digest.update(draw(scene, 32).tobytes())
        digest.update(scene.prompt.caption.encode())
    assert digest.hexdigest() == GOLDEN, (
        "another picture or caption: models trained on the old ones are judged on new ones"
    )


def test_shards_are_the_same_twice(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    indices = [write_shapes(f, samples=50, seed=3, samples_per_shard=20, progress=False) for f in folders]
    names = sorted(path.name for path in folders[0].glob("*.tar"))
    assert len(names) == 3
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert indices[0].digest == indices[1].digest
    assert [shard.count for shard in indices[0].shards] == [20, 20, 10]
    other = write_shapes(tmp_path / "other", samples=50, seed=4, samples_per_shard=20, progress=False)
    assert other.digest != indices[0].digest


def test_shards_do_not_depend_on_the_processes_that_draw(tmp_path: Path) -> None:
    for workers in (1, 3):
        write_shapes(
            tmp_path / str(workers), samples=300, side=16, samples_per_shard=140, workers=workers, progress=False
        )
    names = sorted(path.name for path in (tmp_path / "1").glob("*.tar"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_shards_hold_the_scenes(tmp_path: Path) -> None:
    index = write_shapes(tmp_path / "shards", samples=12, side=24, seed=9, samples_per_shard=5, progress=False)
    assert index.num_samples == 12
    parts: dict[str, bytes] = {}
    for shard in sorted((tmp_path / "shards").glob("*.tar")):
        data = shard.read_bytes()
        parts |= {m.name: data[m.offset : m.offset + m.size] for m in walk_members(shard)}
    assert len(parts) == 36
    for number in range(12):
        scene, key = make_scene(9, number), f"{number:06d}"
        assert parts[f"{key}.txt"].decode() == scene.prompt.caption
        assert (np.asarray(Image.open(io.BytesIO(parts[f"{key}.png"]))) == draw(scene, 24)).all()
        assert json.loads(parts[f"{key}.json"]) == json.loads(json.dumps(scene.as_dict()))


def test_classes_are_drawn_labelled_and_named(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    indices = [write_shapes(f, samples=60, seed=2, classes=True, progress=False) for f in folders]
    names = json.loads((folders[0] / CLASSES_FILE).read_text())
    assert len(names) == len(set(names)) == 48 and names[0] == "a red circle" and names[-1] == "a white ring"
    assert indices[0].digest == indices[1].digest
    (shard,) = folders[0].glob("*.tar")
    data = shard.read_bytes()
    assert data == (folders[1] / shard.name).read_bytes()
    parts = {m.name: data[m.offset : m.offset + m.size] for m in walk_members(shard)}
    labels = indices[0].labels
    assert labels is not None and labels.dtype == np.int64 and len(set(labels.tolist())) > 25
    for number in range(60):
        scene, label = make_class_scene(2, number)
        assert labels[number] == label == int(parts[f"{number:06d}.cls"])
        assert parts[f"{number:06d}.txt"].decode() == names[label] == CLASSES[label].phrase()
        (thing,) = scene.objects
        assert (thing.shape, thing.colour) == (CLASSES[label].shape, CLASSES[label].colour)
        assert max(abs(thing.x - 0.5), abs(thing.y - 0.5)) <= 0.04
        assert (np.asarray(Image.open(io.BytesIO(parts[f"{number:06d}.png"]))) == draw(scene, 32)).all()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"samples": 2.5}, "samples: expected an integer"),
        ({"samples": True}, "samples: expected an integer"),
        ({"side": 8}, "side: expected an integer of at least 16"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"samples_per_shard": 0}, "samples_per_shard: expected an integer of at least 1"),
        ({"frames": 0}, "frames: expected an integer of at least 1"),
        ({"frames": 4}, "frames of a clip: expected an integer of at least 8, got 4"),
        ({"frames": 8, "side": 33}, "side: expected an even number of pixels for clips, got 33"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path: Path, change: dict[str, int], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        write_shapes(tmp_path / "shards", **({"samples": 4} | change))
    assert not (tmp_path / "shards").exists()


def test_a_file_or_shards_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="got the file"):
        write_shapes(tmp_path / "file", samples=4)
    write_shapes(tmp_path / "shards", samples=4, progress=False)
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "shards").iterdir())
    with pytest.raises(ValueError, match="already holds shards"):
        write_shapes(tmp_path / "shards", samples=4, progress=False)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "shards").iterdir()) == before
