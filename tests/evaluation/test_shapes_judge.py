"""The judge agrees with scenes whose content is known, sound or spoilt; evaluation captions are balanced."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dydit_scale.data.shapes.language import (
    BACKGROUND,
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Prompt,
    Subject,
    parse_caption,
)
from dydit_scale.data.shapes.scene import Object, Scene, draw, make_scene, place
from dydit_scale.evaluation.prompts import CAPTIONS, evaluation_prompts
from dydit_scale.evaluation.shapes_judge import judge, read_scene, score

SEED = 77
SCENES = 150

Spoiler = Callable[[np.ndarray, np.random.RandomState], np.ndarray]


@cache
def scenes() -> tuple[Scene, ...]:
    return tuple(make_scene(SEED, number) for number in range(SCENES))


@cache
def pictures(side: int) -> tuple[np.ndarray, ...]:
    return tuple(draw(scene, side) for scene in scenes())


def clean(picture: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return picture


def noisy(picture: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.clip(np.round(picture + rng.normal(0, 6, picture.shape)), 0, 255).astype(np.uint8)


def blurred(picture: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(0.5)))


def as_jpeg(picture: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def dimmed(picture: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.round(picture * 0.9).astype(np.uint8)


@pytest.mark.parametrize(
    ("spoil", "side", "count", "least"),
    [
        (clean, 32, SCENES, 1.0),
        (clean, 64, 50, 1.0),
        (noisy, 32, 100, 0.98),
        (blurred, 32, 100, 0.98),
        (as_jpeg, 32, 100, 0.98),
        (dimmed, 32, 60, 0.98),
    ],
)
def test_true_pictures_pass(spoil: Spoiler, side: int, count: int, least: float) -> None:
    rng = np.random.RandomState(0)
    verdicts = [
        judge(spoil(picture, rng), scene.prompt.caption)
        for scene, picture in zip(scenes()[:count], pictures(side), strict=False)
    ]
    wrong = [(number, verdict.reason) for number, verdict in enumerate(verdicts) if not verdict.correct]
    assert len(wrong) <= (1 - least) * count, wrong
    assert {verdict.category for verdict in verdicts} == set(CATEGORIES)


def test_reading_gives_back_every_object() -> None:
    count = 0
    for scene, picture in zip(scenes()[:50], pictures(64), strict=False):
        found = read_scene(picture)
        assert len(found) == len(scene.objects)
        for thing in scene.objects:
            nearest = min(found, key=lambda f: np.hypot(f.x - thing.x, f.y - thing.y))
            assert (nearest.shape, nearest.colour) == (thing.shape, thing.colour)
            assert max(abs(nearest.x - thing.x), abs(nearest.y - thing.y)) < 0.01
            assert abs(nearest.diameter - thing.diameter) < 0.02
            assert nearest.confidence > 0.9
            count += 1
    assert count > 75


def is_true(prompt: Prompt, objects: tuple[Object, ...]) -> bool:
    """What the judge should find, from the objects themselves."""
    border = (SIZES["small"][1] + SIZES["large"][0]) / 2
    wanted = [subject for subject in prompt.subjects for _ in range(subject.count)]
    return len(wanted) == len(objects) and any(
        all(
            thing.shape == subject.shape
            and subject.colour in (None, thing.colour)
            and subject.size in (None, "large" if thing.diameter > border else "small")
            for subject, thing in zip(wanted, order, strict=True)
        )
        and (prompt.relation is None or lies(order[0], prompt.relation, order[1]))
        for order in permutations(objects)
    )


def lies(first: Object, relation: str, second: Object) -> bool:
    x, y = first.x - second.x, first.y - second.y
    along = {"left of": -x, "right of": x, "above": -y, "below": y}[relation]
    return along > 0.1 and along > (abs(y) if relation in ("left of", "right of") else abs(x))


def test_a_caption_counts_only_where_it_is_true() -> None:
    outcomes: Counter[bool] = Counter()
    for number, (scene, picture) in enumerate(zip(scenes()[:60], pictures(32), strict=False)):
        for shift in range(1, 4):
            prompt = scenes()[(number + shift) % SCENES].prompt
            truth = is_true(prompt, scene.objects)
            verdict = judge(picture, prompt.caption)
            assert verdict.correct is truth, (scene, prompt.caption, verdict.reason)
            outcomes[truth] += 1
    assert outcomes[False] > 150


def recoloured(scene: Scene, rng: np.random.RandomState) -> Scene | None:
    if scene.prompt.category not in ("colors", "position", "attribute_binding"):
        return None
    first, *others = scene.objects
    colour = rng.choice([c for c in COLOURS if c != first.colour])
    return replace(scene, objects=(replace(first, colour=str(colour)), *others))


def with_one_gone(scene: Scene, rng: np.random.RandomState) -> Scene | None:
    return replace(scene, objects=scene.objects[1:])


def with_one_more(scene: Scene, rng: np.random.RandomState) -> Scene | None:
    diameter = 0.24
    for _ in range(400):
        x, y = rng.uniform(0.14, 0.86, size=2)
        if all(max(abs(x - o.x), abs(y - o.y)) > (o.diameter + diameter) / 2 + 0.04 for o in scene.objects):
            more = Object(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), diameter, float(x), float(y))
            return replace(scene, objects=(*scene.objects, more))
    return None


def swapped(scene: Scene, rng: np.random.RandomState) -> Scene | None:
    if scene.prompt.category != "position":
        return None
    first, second = scene.objects
    return replace(scene, objects=(replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)))


def with_another_shape(scene: Scene, rng: np.random.RandomState) -> Scene | None:
    first, *others = scene.objects
    shape = rng.choice([s for s in SHAPES if s not in [o.shape for o in scene.objects]])
    return replace(scene, objects=(replace(first, shape=str(shape)), *others))


def resized(scene: Scene, rng: np.random.RandomState) -> Scene | None:
    size = scene.prompt.subjects[0].size
    if size is None:
        return None
    other = "large" if size == "small" else "small"
    thing = replace(scene.objects[0], diameter=sum(SIZES[other]) / 2, x=0.5, y=0.5)
    return replace(scene, objects=(thing,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (recoloured, "expected"),
        (with_one_gone, "expected"),
        (with_one_more, "expected"),
        (swapped, " is not "),
        (with_another_shape, "expected"),
        (resized, "of diameter"),
    ],
)
def test_changed_scenes_fail(change: Callable[[Scene, np.random.RandomState], Scene | None], reason: str) -> None:
    rng = np.random.RandomState(1)
    changed = [other for scene in scenes() if (other := change(scene, rng)) is not None]
    assert len(changed) >= 8
    for scene in changed[:60]:
        verdict = judge(draw(scene, 32), scene.prompt.caption)
        assert not verdict.correct, scene
        assert reason in verdict.reason, (scene, verdict.reason)


@pytest.mark.parametrize("side", [32, 64])
def test_blank_and_noise_never_pass(side: int) -> None:
    rng = np.random.RandomState(2)
    fields = [np.full((side, side, 3), colour) for colour in [BACKGROUND, (0, 0, 0), *COLOURS.values()]]
    fields += [rng.randint(0, 256, (side, side, 3)) for _ in range(4)]
    fields += [rng.normal(128, sigma, (side, side, 3)).clip(0, 255) for sigma in (5, 20, 60)]
    fields += [np.kron(rng.randint(0, 256, (side // 8, side // 8, 3)), np.ones((8, 8, 1))) for _ in range(3)]
    captions = evaluation_prompts(36, seed=0)
    for number, field in enumerate(fields):
        first = 3 * (number % 12)  # captions that follow each other are of different categories
        verdicts = [judge(field.astype(np.uint8), caption) for caption in captions[first : first + 3]]
        assert not any(verdict.correct for verdict in verdicts), verdicts


def paint(*objects: Object, side: int = 32) -> np.ndarray:
    return draw(Scene(Prompt("single_object", (Subject("circle"),)), objects), side)


def test_touching_objects_of_two_colours_are_two() -> None:
    picture = paint(Object("square", "red", 0.32, 0.3, 0.5), Object("circle", "yellow", 0.32, 0.3 + 0.3, 0.5))
    assert {(f.shape, f.colour) for f in read_scene(picture)} == {("square", "red"), ("circle", "yellow")}
    assert judge(picture, "a red square left of a yellow circle").correct


def test_what_has_no_shape_or_colour_is_named() -> None:
    blob = paint(Object("circle", "red", 0.3, 0.4, 0.5), Object("circle", "red", 0.3, 0.6, 0.5))
    assert [f.shape for f in read_scene(blob)] == [None]
    assert judge(blob, "a red circle").reason == "cannot read red blob"
    grey = np.where(paint(Object("circle", "white", 0.5, 0.5, 0.5)) > 128, 128, BACKGROUND).astype(np.uint8)
    assert [(f.shape, f.colour) for f in read_scene(grey)] == [("circle", None)]
    assert judge(grey, "a circle").reason == "cannot read oddly coloured circle"


def test_a_ghost_is_an_object() -> None:
    ring = paint(Object("ring", "cyan", 0.3, 0.3, 0.3))
    both = paint(Object("ring", "cyan", 0.3, 0.3, 0.3), Object("cross", "red", 0.3, 0.7, 0.7))
    faint = np.where(both == ring, ring, 0.6 * ring + 0.4 * both).astype(np.uint8)
    assert judge(ring, "a cyan ring").correct
    assert judge(faint, "a cyan ring").reason == "cannot read oddly coloured cross"
    assert not judge(faint, "a red cross and a cyan ring").correct


def test_specks_are_no_objects_but_small_things_are() -> None:
    picture = paint(Object("ring", "cyan", 0.5, 0.6, 0.6))
    picture[2:4, 2:4] = COLOURS["red"]
    assert judge(picture, "a cyan ring").correct
    picture[2:6, 2:6] = COLOURS["red"]
    assert judge(picture, "a cyan ring").reason == "cannot read red blob"


def test_relation_needs_a_clear_offset_in_its_direction() -> None:
    caption = "a red circle above a blue square"
    blue = Object("square", "blue", 0.3, 0.5, 0.7)
    assert judge(paint(Object("circle", "red", 0.3, 0.5, 0.3), blue), caption).correct
    assert judge(paint(Object("circle", "red", 0.3, 0.2, 0.36), blue), caption).correct
    assert not judge(paint(Object("circle", "red", 0.3, 0.2, 0.45), blue), caption).correct
    reason = judge(paint(Object("circle", "red", 0.3, 0.2, 0.69), blue), caption).reason
    assert reason == "red circle is not above blue square: it lies at (-0.30, -0.01) from it, y down"
    assert set(RELATIONS) == {"left of", "right of", "above", "below"}


def test_objects_are_paired_whatever_their_order() -> None:
    green, red = Object("cross", "green", 0.3, 0.3, 0.3), Object("cross", "red", 0.34, 0.7, 0.7)
    assert judge(paint(green, red), "a cross and a green cross").correct
    assert judge(paint(green, red), "a red cross and a green cross").correct
    assert not judge(paint(green, red), "a red cross and a cyan cross").correct
    assert judge(paint(green, red), "a red cross and a cyan cross").reason == "expected cyan cross, found green cross"


def test_score_weighs_categories_alike() -> None:
    ring, nothing = paint(Object("ring", "red", 0.4, 0.5, 0.5)), paint()
    right, wrong = ([ring], ["a ring"]), ([nothing] * 3, ["a red ring", "a red ring", "two rings"])
    scores = score(right[0] + [ring] + wrong[0], right[1] + ["a red ring"] + wrong[1])
    assert scores["categories"] == {"single_object": 1.0, "counting": 0.0, "colors": pytest.approx(1 / 3)}
    assert scores["overall"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert scores["counts"] == {
        "single_object": 1,
        "two_object": 0,
        "counting": 1,
        "colors": 3,
        "position": 0,
        "attribute_binding": 0,
    }
    assert json.loads(json.dumps(scores)) == scores


def test_wrong_arguments_are_refused() -> None:
    picture = paint()
    with pytest.raises(ValueError, match="got 1 and 2"):
        score([picture], ["a ring", "a ring"])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])
    with pytest.raises(ValueError, match="uint8"):
        read_scene(picture.astype(np.float32))
    with pytest.raises(ValueError, match="side, side"):
        read_scene(picture[:, :16])
    with pytest.raises(ValueError, match="cannot read 'a house'"):
        judge(picture, "a house")


def test_evaluation_prompts_are_balanced_and_repeat_only_what_has_run_out() -> None:
    captions = evaluation_prompts(252, 5)
    by_category = {c: [x for x in captions if parse_caption(x).category == c] for c in CATEGORIES}
    assert {c: len(x) for c, x in by_category.items()} == dict.fromkeys(CATEGORIES, 42)
    assert {c: len(set(x)) for c, x in by_category.items()} == {c: min(42, CAPTIONS[c]) for c in CATEGORIES}
    assert evaluation_prompts(252, 5) == captions
    assert evaluation_prompts(50, 5) == captions[:50]
    assert evaluation_prompts(252, 6) != captions
    with pytest.raises(ValueError, match="1 or more"):
        evaluation_prompts(0, 0)


def test_evaluation_prompts_can_be_drawn() -> None:
    for caption in evaluation_prompts(60, 1):
        scene = place(parse_caption(caption), np.random.RandomState(0))
        assert judge(draw(scene, 32), caption).correct


def test_numbers_of_captions_are_right() -> None:
    assert CAPTIONS["position"] == 6720 and CAPTIONS["attribute_binding"] == 42000
    captions = evaluation_prompts(6 * 200, 0)
    for category in CATEGORIES[:4]:
        drawn = [caption for caption in captions if parse_caption(caption).category == category]
        assert len(set(drawn)) == CAPTIONS[category]
        times = Counter(drawn).values()
        assert max(times) - min(times) <= 1
