"""Inception Score, precision and recall against closed forms, plain loops and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from dydit_scale.evaluation.statistics import inception_score, precision_recall


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_inception_score_of_certain_samples_is_how_many_classes_they_have() -> None:
    certain = 100 * torch.eye(5).repeat(4, 1)
    assert inception_score(certain) == pytest.approx(5)
    assert inception_score(certain[:, :1] * torch.ones(1, 5)) == pytest.approx(1)  # all say nothing
    assert inception_score(certain[:1].repeat(7, 1)) == pytest.approx(1)  # all the same


def test_it_is_the_mean_over_parts_in_their_order() -> None:
    logits = 3 * drawn(10, 6)
    parts = [inception_score(part) for part in (logits[:4], logits[4:8], logits[8:])]
    assert inception_score(logits, split=4) == pytest.approx(sum(parts) / 3)


@pytest.mark.filterwarnings("ignore:.*InceptionScore.*:UserWarning")
def test_it_is_the_librarys_value() -> None:
    logits = 2 * drawn(60, 8)
    library = InceptionScore(feature=nn.Identity(), splits=1)
    library.update(logits)
    assert inception_score(logits) == pytest.approx(library.compute()[0].item(), rel=1e-9)


def inside(x: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether ``x`` is no further from one of ``others`` than that one's third neighbour, by plain loops."""
    for place, other in enumerate(others):
        apart = sorted(math.dist(other, o) for p, o in enumerate(others) if p != place)
        if math.dist(x, other) <= apart[2]:
            return True
    return False


def test_precision_and_recall_are_what_their_definition_says() -> None:
    features, reference = 1.3 * drawn(30, 3), drawn(40, 3, seed=1) + 2.2
    found = precision_recall(features, reference)
    assert found.precision == pytest.approx(sum(inside(x, reference) for x in features) / 30)
    assert found.recall == pytest.approx(sum(inside(x, features) for x in reference) / 40)
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and found.precision != found.recall


def test_precision_and_recall_tell_two_failures_apart() -> None:
    reference = drawn(200, 4)
    assert precision_recall(reference, reference) == (1, 1)
    narrow = precision_recall(0.1 * drawn(200, 4, seed=1), reference)
    assert narrow.precision > 0.95 and narrow.recall < 0.2  # good samples that are all alike
    assert precision_recall(reference + 100, reference) == (0, 0)


def test_what_are_no_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits: expected \[samples, classes\], got \[0, 4\]"):
        inception_score(torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"reference: .* more than 3 of them, got \[3, 2\]"):
        precision_recall(torch.zeros(4, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="one width, got 2 and 3"):
        precision_recall(torch.zeros(4, 2), torch.zeros(4, 3))
