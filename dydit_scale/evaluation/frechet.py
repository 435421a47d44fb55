"""The Fréchet distance between two sets of features, each taken for a Gaussian (Heusel et al., 2017,
arXiv:1706.08500)."""

from __future__ import annotations

import numpy as np


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Between ``features`` [n, dim] and ``reference`` [m, dim].

    Raises ValueError if they are not two sets of two or more rows of the same width, or a value is not finite.
    """
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"{name}: expected [samples, dim] with at least two samples, got {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise ValueError(f"{name}: expected finite numbers; sample {_first_broken(rows)} has others")
    return gaussian_distance(*moments(features), *moments(reference))


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [dim] and unbiased covariance [dim, dim] of ``features`` [n, dim], in fp64."""
    features = np.asarray(features, dtype=np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def gaussian_distance(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray) -> float:
    """|mean - other_mean|² + tr(cov + other_cov - 2 (cov other_cov)^½), for means [dim] and covariances [dim, dim].

    The trace of the root is that of (cov^½ other_cov cov^½)^½, which is symmetric: its eigenvalues are real, and those
    that rounding makes negative (there are fewer samples than dimensions) count as zero. Raises ValueError for
    different widths.
    """
    if mean.shape != other_mean.shape:
        raise ValueError(f"expected features of one width, got {len(mean)} and {len(other_mean)}")
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ other_cov @ root
    trace = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    distance = np.square(mean - other_mean).sum() + np.trace(cov) + np.trace(other_cov) - 2 * trace
    return max(0.0, float(distance))


def _first_broken(rows: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
