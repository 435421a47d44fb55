"""Masks over channels and tokens against the plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dydit_scale.dynamic import masking
from dydit_scale.dynamic.masking import masked


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("chunk", [1, 24, 1 << 18])
def test_value_and_derivatives(by_token: bool, masks: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_CHUNK", chunk)
    tensors = [drawn(2, 5, 4, seed=0), drawn(masks, 4, seed=1), *([drawn(2, 5, seed=2)] if by_token else [])]
    x, channels, *tokens = tensors
    plain = x * channels[:, None] * (tokens[0][..., None] if tokens else 1)
    assert torch.allclose(masked(*tensors), plain, rtol=1e-12)
    assert torch.autograd.gradcheck(masked, tensors)


def test_ones_change_nothing() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(masked(x, torch.ones(2, 4), torch.ones(2, 3)), x)
    assert masked(x, torch.ones(1, 4)).dtype == torch.bfloat16


def test_only_what_learns_has_a_gradient() -> None:
    x, mask = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    masked(x, mask).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, mask[:, None].expand(2, 3, 4)) and mask.grad is None


def test_gradient_of_a_mask_is_summed_in_fp32() -> None:
    """A thousand equal contributions: added up in bf16 they would stop growing."""
    x = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, requires_grad=True)
    masked(x, mask).backward(torch.ones(1, 1000, 1, dtype=torch.bfloat16))
    assert mask.grad is not None and mask.grad.item() == pytest.approx(1000, rel=0.004)
