"""Masks over channels and tokens against the plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dydit_scale.dynamic import masking
from dydit_scale.dynamic.masking import gated_add, masked, masked_cat, masked_gelu, modulate


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


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("chunk", [1, 24, 1 << 18])
def test_side_by_side(by_token: bool, masks: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_CHUNK", chunk)
    a, of_a, b, of_b = drawn(2, 5, 3, seed=0), drawn(masks, 3, seed=1), drawn(2, 5, 4, seed=2), drawn(masks, 4, seed=3)
    tokens = [drawn(2, 5, seed=4)] if by_token else []
    plain = torch.cat([masked(a, of_a), masked(b, of_b, *tokens)], dim=2)
    assert torch.equal(masked_cat(a, of_a, b, of_b, *tokens), plain)
    assert torch.autograd.gradcheck(masked_cat, (a, of_a, b, of_b, *tokens))
    assert torch.equal(masked_cat(a, None, b, None), torch.cat([a, b], dim=2))
    assert torch.equal(masked_cat(a, None, b, of_b), torch.cat([a, masked(b, of_b)], dim=2))


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("chunk", [1, 24, 1 << 18])
def test_gated_sum(by_token: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_CHUNK", chunk)
    stream, gate, x = drawn(2, 5, 4, seed=0), drawn(2, 4, seed=1), drawn(2, 5, 4, seed=2)
    tokens = [drawn(2, 5, seed=3)] if by_token else []
    plain = stream + gate[:, None] * x * (tokens[0][..., None] if tokens else 1)
    assert torch.allclose(gated_add(stream, gate, x, *tokens), plain, rtol=1e-12)
    assert torch.autograd.gradcheck(gated_add, (stream, gate, x, *tokens))


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("chunk", [1, 24, 1 << 18])
def test_gelu(masks: int, approximate: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_CHUNK", chunk)
    x, channels = drawn(2, 5, 4, seed=0), drawn(masks, 4, seed=1)
    found = masked_gelu(x, approximate, channels)
    plain = masked(F.gelu(x, approximate=approximate), channels)
    assert torch.allclose(found, plain, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda *inputs: masked_gelu(inputs[0], approximate, inputs[1]), (x, channels))


@pytest.mark.parametrize("chunk", [1, 24, 1 << 18])
def test_modulation(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_CHUNK", chunk)
    x, scale, shift = drawn(2, 5, 4, seed=0), drawn(2, 4, seed=1), drawn(2, 4, seed=2)
    assert torch.equal(modulate(x, scale, shift), x * (1 + scale[:, None]) + shift[:, None])
    assert torch.autograd.gradcheck(modulate, (x, scale, shift))


def test_what_learns_nothing_keeps_nothing() -> None:
    """Of a complete model's forward, whose masks are all ones or absent, only the linear layers' inputs are kept."""
    x, mask = torch.randn(2, 3, 4, requires_grad=True), torch.ones(2, 4)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked(x, mask), masked_cat(x, mask, x, None), gated_add(x, mask, x), modulate(x, mask, mask)
    assert all(tensor.shape != x.shape for tensor in kept)


@pytest.mark.parametrize("of_stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_gate", [torch.float32, torch.bfloat16])
def test_gated_sum_rounds_as_the_plain_one(of_stream: torch.dtype, of_gate: torch.dtype) -> None:
    stream, gate, x = drawn(2, 5, 4, seed=0).to(of_stream), drawn(2, 4, seed=1).to(of_gate), drawn(2, 5, 4, seed=2)
    x = x.bfloat16()
    plain = stream + gate[:, None] * x
    for found in (gated_add(stream, gate, x), gated_add(stream, gate, x, torch.ones(2, 5))):
        assert found.dtype == plain.dtype and torch.equal(found, plain)


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
