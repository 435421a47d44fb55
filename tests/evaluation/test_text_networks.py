"""CLIP and the detector, by small random models in folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.multimodal import clip_score

from dydit_scale.evaluation.clip import Clip
from dydit_scale.evaluation.detector import BLANK, Detector, box_of, colours_of, cut_out
from dydit_scale.evaluation.geneval import COLOURS, THRESHOLD, Detected
from tests.evaluation.tiny_networks import do_without_scipy, write_clip, write_detector

TEXTS = ["a red dog", "a blue tie above a dog", "a dog"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Detector:
    do_without_scipy(monkeypatch)
    return Detector(write_detector(tmp_path))


def pictures(count: int, side: int = 24) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_the_clip_score_is_the_librarys(clip: Clip) -> None:
    drawn = pictures(3)
    # torchmetrics expects plain tensors of the model, as earlier versions of transformers gave them.
    model = SimpleNamespace(
        config=clip.model.config,
        get_image_features=lambda *x: clip.model.get_image_features(*x).pooler_output,
        get_text_features=lambda *x: clip.model.get_text_features(*x).pooler_output,
    )
    model.to = lambda device: model
    library = [
        clip_score(torch.from_numpy(picture).movedim(-1, 0), text, lambda: (model, clip.processor)).item()
        for picture, text in zip(drawn, TEXTS, strict=True)
    ]
    assert clip.scores(drawn, TEXTS).tolist() == pytest.approx(library, rel=1e-4, abs=1e-4)
    assert len(set(library)) > 1


def test_a_batch_scores_as_its_members(clip: Clip) -> None:
    drawn = pictures(3)
    singles = [clip.scores(drawn[n : n + 1], TEXTS[n : n + 1]).item() for n in range(3)]
    assert clip.scores(drawn, TEXTS).tolist() == pytest.approx(singles, abs=1e-3)
    assert clip.scores(drawn[:1], ["dog " * 50]).shape == (1,)  # longer than it reads


def test_the_best_choice_has_the_nearest_mean_of_texts(clip: Clip) -> None:
    drawn = [Image.fromarray(picture) for picture in pictures(4)]
    choices = [["a red dog", "red"], ["a blue dog", "blue"], ["green"]]
    near = (
        clip.embed_pictures(drawn)
        @ torch.nn.functional.normalize(torch.stack([clip.embed_texts(texts).mean(0) for texts in choices]), dim=1).T
    )
    assert clip.best_of(drawn, choices) == near.argmax(1).tolist()


def test_detections_have_the_masks_boxes_and_the_names_of_geneval(detector: Detector) -> None:
    found = detector.detect(pictures(1, 40)[0])
    assert found and {thing.name for thing in found} == {"dog"}
    for thing in found:
        assert THRESHOLD <= thing.score <= 1 and thing.mask.shape == (40, 40) and thing.mask.any()
        assert thing.box == box_of(thing.mask)
    assert set(detector.names.values()) == {"dog", "airplane", "tie"}
    detector.check_names(["dog", "airplane"])
    with pytest.raises(ValueError, match=r"does not know cat, zebra \(2 of the prompts' classes"):
        detector.check_names(["zebra", "dog", "cat"])
    with torch.no_grad():
        detector.model.class_predictor.bias.zero_()  # all classes alike, none certain
    assert detector.detect(pictures(1, 40)[0]) == []


def test_an_object_is_cut_out_on_grey() -> None:
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:7] = True
    mask[2, 3] = False
    assert box_of(mask) == (3, 2, 7, 5)
    picture = pictures(1, 10)[0, :8]
    cut = np.asarray(cut_out(picture, Detected("dog", 1, box_of(mask), mask)))
    assert cut.shape == (3, 4, 3) and tuple(cut[0, 0]) == BLANK
    np.testing.assert_array_equal(cut[1:], picture[3:5, 3:7])


def test_colours_are_geneval_s(clip: Clip) -> None:
    mask = np.ones((24, 24), bool)
    things = [Detected("dog", 1, box_of(mask), mask)] * 2
    found = colours_of(clip, pictures(1)[0], things, "dog")
    assert len(found) == 2 and found[0] == found[1] and found[0] in COLOURS


@pytest.mark.parametrize("kind", [Clip, Detector])
def test_other_folders_are_refused_without_going_online(kind: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no .* with its processor"):
        kind(tmp_path)
