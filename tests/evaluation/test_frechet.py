"""The Fréchet distance against closed forms and torchmetrics, and what it says of spoilt built-in scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dydit_scale.evaluation.classifier import DIM, FRAMES, SIDE, features, load_classifier, prepare
from dydit_scale.evaluation.frechet import frechet_distance, gaussian_distance, moments
from dydit_scale.evaluation.judges import judge_for, real_scenes


def test_it_is_the_closed_form_of_independent_normals() -> None:
    rng = np.random.RandomState(0)
    mean, other = rng.randn(2, 6)
    spread, others = rng.uniform(0.1, 3, (2, 6))
    expected = np.square(mean - other).sum() + np.square(spread - others).sum()
    found = gaussian_distance(mean, np.diag(spread**2), other, np.diag(others**2))
    assert found == pytest.approx(expected, rel=1e-12)
    turn = np.linalg.qr(rng.randn(6, 6))[0]  # the same in other axes
    turned = [turn @ np.diag(s**2) @ turn.T for s in (spread, others)]
    assert gaussian_distance(turn @ mean, turned[0], turn @ other, turned[1]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("samples", [200, 8])  # 8: fewer than dimensions, covariances are singular
def test_it_is_the_librarys_value_on_a_small_network(samples: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.Tanh()).double().requires_grad_(False)
    pictures, reference = torch.rand(2, samples, 3, 4, 4, dtype=torch.float64).unbind(0)
    network.num_features = 16
    library = FrechetInceptionDistance(feature=network, normalize=True)
    library.set_dtype(torch.float64)
    library.update(reference**2, real=True)
    library.update(pictures, real=False)
    ours = frechet_distance(network(pictures).numpy(), network(reference**2).numpy())
    assert ours == pytest.approx(library.compute().item(), rel=1e-3 if samples < 16 else 1e-7)


def test_it_is_zero_on_itself_and_symmetric() -> None:
    one, other = np.random.RandomState(0).randn(2, 50, 8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    few = one[:3]
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, other) > 0


def test_moments_are_numpys() -> None:
    rows = np.random.RandomState(0).randn(9, 4).astype(np.float32)
    mean, cov = moments(rows)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(0))
    np.testing.assert_allclose(cov, np.cov(rows.astype(np.float64), rowvar=False))


def test_what_is_no_two_sets_of_features_is_refused() -> None:
    rows = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"features: expected \[samples, dim\].* got \[1, 3\]"):
        frechet_distance(rows[:1], rows)
    with pytest.raises(ValueError, match=r"reference: .* got \[3\]"):
        frechet_distance(rows, rows[0])
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        frechet_distance(rows, rows[:, :2])
    broken = rows.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"reference: .* sample 2"):
        frechet_distance(rows, broken)


@pytest.mark.parametrize("kind, frames", [("pictures", 1), ("clips", FRAMES)])
def test_features_do_not_depend_on_the_batch(kind: str, frames: int) -> None:
    shape = (5, SIDE, SIDE, 3) if frames == 1 else (5, frames, SIDE, SIDE, 3)
    pictures = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    together = features(pictures)
    assert together.shape == (5, DIM) and together.dtype == np.float64
    singles = np.concatenate([features(pictures[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(singles, together, atol=1e-4)
    assert not load_classifier(kind).training


def test_longer_clips_are_thinned_out_and_other_sizes_scaled() -> None:
    clips = np.random.RandomState(0).randint(0, 256, (2, FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
    x = prepare(clips)
    assert x.shape == (2, FRAMES, 3, SIDE, SIDE) and x.min() == -1 and x.max() == 1
    assert torch.equal(prepare(clips.repeat(2, axis=1)), x)
    flat = np.full((1, 48, 40, 3), 77, dtype=np.uint8)
    torch.testing.assert_close(prepare(flat), torch.full((1, 1, 3, SIDE, SIDE), 77 / 127.5 - 1))


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((2, 32, 32, 3)),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
    ],
)
def test_features_of_what_are_no_pictures_are_refused(pictures: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"features: expected pictures uint8 \[n, height, width, 3\]"):
        features(pictures)


def test_short_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="clips of 8 frames or more, got 7"):
        features(np.zeros((2, 7, 16, 16, 3), np.uint8))


def distance(pictures: np.ndarray, reference: np.ndarray) -> float:
    return frechet_distance(features(pictures), features(reference))


def noisy(pictures: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.RandomState(0).normal(0, sigma, pictures.shape)
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def smaller(pictures: np.ndarray, factor: int) -> np.ndarray:
    """Blurred: means of squares in place of the pixels."""
    *rest, height, width, channels = pictures.shape
    blocks = pictures.reshape(*rest, height // factor, factor, width // factor, factor, channels).mean((-4, -2))
    return blocks.repeat(factor, -3).repeat(factor, -2).astype(np.uint8)


@pytest.mark.parametrize("reads_text", [True, False])
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_spoilt_scenes_are_further_from_real_ones_the_more_they_are_spoilt(frames: int, reads_text: bool) -> None:
    judge = judge_for(reads_text=reads_text, video=frames > 1)
    prompts = judge.prompts(192)
    real, reference = (real_scenes(judge, prompts, side=32, frames=frames, seed=seed) for seed in (1, 2))
    floor = distance(real, reference)
    for spoil, amounts in ((noisy, (40, 80, 120)), (smaller, (2, 4, 8))):
        found = [distance(spoil(real, amount), reference) for amount in amounts]
        assert floor < found[0] < found[1] < found[2], (spoil.__name__, floor, found)
        assert found[2] > 5 * floor
    assert distance(real[..., ::-1].copy(), reference) > 2 * floor  # red for blue
    assert distance(real[:1].repeat(192, axis=0), reference) > 10 * floor  # always the same


@pytest.mark.parametrize("reads_text", [True, False])
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_real_scenes_are_what_the_judge_wants(frames: int, reads_text: bool) -> None:
    judge = judge_for(reads_text=reads_text, video=frames > 1)
    prompts = judge.prompts(60)
    scenes = real_scenes(judge, prompts, side=32, frames=frames, seed=1)
    assert scenes.shape[0] == 60 and scenes.shape[-3:] == (32, 32, 3) and scenes.dtype == np.uint8
    assert judge.score(scenes, prompts)["overall"] > 0.95
    again = real_scenes(judge, prompts[:5], side=32, frames=frames, seed=1)
    np.testing.assert_array_equal(again, scenes[:5])
    assert (real_scenes(judge, prompts[:5], side=32, frames=frames, seed=2) != again).any()
