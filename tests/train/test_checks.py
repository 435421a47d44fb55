from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dydit_scale.data.shards import ShardIndex, load_index
from dydit_scale.train.checks import check_data
from dydit_scale.train.recipe import Recipe
from tests.families.journey import family_recipe, write_world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    for family in ("flux", "dit", "latte", "latte-classes"):
        write_world(folder / family, family)
    return folder


def _parts(worlds: Path, family: str) -> tuple[Recipe, ShardIndex]:
    return family_recipe(worlds / family, family, "none"), load_index(worlds / family / "shards")


def _without_captions(index: ShardIndex) -> ShardIndex:
    places = index.columns.places.copy()
    places["caption_gap"] = 0
    return replace(index, columns=index.columns._replace(places=places))


@pytest.mark.parametrize("family", ["flux", "dit"])
def test_data_that_fit_pass(worlds: Path, family: str) -> None:
    check_data(*_parts(worlds, family))


def test_clips_for_a_model_of_pictures_are_refused(worlds: Path) -> None:
    recipe, index = _parts(worlds, "flux")
    clips = replace(recipe, data=replace(recipe.data, frames=8))
    with pytest.raises(ValueError, match=r"data\.frames 8: FluxPipeline makes pictures"):
        check_data(clips, index)


def test_clips_of_another_length_are_refused(worlds: Path) -> None:
    for family, known in (("latte", (1, 8)), ("latte-classes", (8,))):
        recipe, index = _parts(worlds, family)
        for frames in (1, 4, 8):
            data = replace(recipe.data, frames=frames, images_per_clip=0)
            refused = pytest.raises(ValueError, match=rf"data\.frames {frames}: the model of .* makes clips of 8; set")
            with nullcontext() if frames in known else refused:
                check_data(replace(recipe, data=data), index)


def test_rectangles_for_a_model_of_squares_are_refused(worlds: Path) -> None:
    refused = pytest.raises(ValueError, match=r"data\.buckets: DyDiTPipeline makes squares of one size")
    for family, outcome in (("flux", nullcontext()), ("dit", refused)):
        recipe, index = _parts(worlds, family)
        with outcome:
            check_data(replace(recipe, data=replace(recipe.data, image_size=64, buckets=True)), index)


def test_a_model_of_captions_needs_some(worlds: Path) -> None:
    recipe, index = _parts(worlds, "flux")
    with pytest.raises(ValueError, match="no sample has a caption, and FluxPipeline"):
        check_data(recipe, _without_captions(index))


def test_a_model_of_classes_needs_labels_or_their_names(worlds: Path) -> None:
    recipe, index = _parts(worlds, "dit")
    check_data(recipe, replace(index, labels=None))  # captions are names of classes
    check_data(recipe, _without_captions(index))
    with pytest.raises(ValueError, match=r"no sample has a class; add a \.cls \(0 to 47\)"):
        check_data(recipe, replace(_without_captions(index), labels=None))


def test_a_class_beyond_the_last_is_named_unless_its_sample_is_bad(worlds: Path) -> None:
    recipe, index = _parts(worlds, "dit")
    labels = np.array(index.labels)
    labels[3], labels[5] = 48, 1000
    wrong = replace(index, labels=labels)
    with pytest.raises(ValueError, match=r"sample '.*' has class 48, .* the classes 0 to 47 \(2 samples in all\)"):
        check_data(recipe, wrong)
    check_data(recipe, replace(wrong, bad={3: "broken", 5: "broken"}))


def test_samples_without_a_class_among_others_are_named(worlds: Path) -> None:
    recipe, index = _parts(worlds, "dit")
    labels = np.array(index.labels)
    labels[2] = -1
    with pytest.raises(ValueError, match=r"sample '.*' has no class while others do \(1 samples"):
        check_data(recipe, replace(index, labels=labels))
