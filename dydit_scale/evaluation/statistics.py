"""Metrics that are computed from features: the Inception Score, precision and recall."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLIT = 5000
"""Samples of which each Inception Score is computed; their mean is reported (ADM's evaluation suite)."""
NEIGHBOUR = 3
_BLOCK = 2048


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1."""

    precision: float
    """Of the samples that lie among the reference."""
    recall: float
    """Of the reference that lies among the samples."""


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """exp of the mean divergence of the samples' class probabilities from those of all (Salimans et al., 2016,
    arXiv:1606.03498), the mean over parts of ``split`` samples in their order.

    ``logits`` is [n, classes]. Raises ValueError if there are none.
    """
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits: expected [samples, classes], got {list(logits.shape)}")
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(features: Tensor, reference: Tensor, neighbour: int = NEIGHBOUR) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 2019, arXiv:1904.06991) of ``features`` [n, dim] against
    ``reference`` [m, dim].

    One lies among others if it is no further from one of them than that one's third neighbour. Raises ValueError for
    sets of three or fewer, or of different widths.
    """
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or len(rows) <= neighbour:
            raise ValueError(f"{name}: expected [samples, dim], more than {neighbour} of them, got {list(rows.shape)}")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"expected features of one width, got {features.shape[1]} and {reference.shape[1]}")
    return PrecisionRecall(_share_among(features, reference, neighbour), _share_among(reference, features, neighbour))


def _share_among(rows: Tensor, others: Tensor, neighbour: int) -> float:
    # The nearest of all is the one itself.
    radii = torch.cat([_distances(part, others).kthvalue(neighbour + 1).values for part in others.split(_BLOCK)])
    inside = [(_distances(part, others) <= radii).any(1) for part in rows.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(rows, others)
