"""Binary gates with a straight-through gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def logistic_noise(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The difference of two Gumbel variables from uniforms in (0, 1): ``log(u) - log(1 - u)``."""
    return torch.logit(u.clamp(1e-6, 1 - 1e-6))


def gumbel_gate(
    logits: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], temperature: float
) -> Float[Tensor, "*shape"]:
    """Exactly 0 or 1 forward, the gradient of ``sigmoid((logits + noise) / temperature)`` backward (Jang et al., 2017).

    ``noise`` is logistic (:func:`logistic_noise`), so a gate is 1 with probability ``sigmoid(logits)``.
    """
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft - soft.detach()) + (soft > 0.5).to(soft.dtype)


def threshold_gate(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The gate at inference: 1 where the logit is positive."""
    return (logits > 0).to(logits.dtype)
