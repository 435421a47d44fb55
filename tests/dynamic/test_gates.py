from __future__ import annotations

import torch

from dydit_scale.dynamic.gates import gumbel_gate, logistic_noise, threshold_gate


def test_gates_are_exactly_binary_with_the_gradient_of_the_sigmoid() -> None:
    logits = torch.randn(1000, requires_grad=True)
    noise = logistic_noise(torch.rand(1000))
    gate = gumbel_gate(logits, noise, 0.7)
    assert set(gate.tolist()) == {0.0, 1.0}
    gate.sum().backward()
    soft = torch.sigmoid((logits.detach() + noise) / 0.7)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 0.7)


def test_a_gate_is_on_with_the_probability_of_its_logit() -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for logit in (-2.0, 0.0, 1.5):
        for temperature in (0.5, 5.0):  # hardness does not change the probability
            rate = gumbel_gate(torch.full_like(u, logit), logistic_noise(u), temperature).mean()
            assert abs(float(rate) - torch.sigmoid(torch.tensor(logit)).item()) < 0.005


def test_the_threshold_is_at_zero() -> None:
    assert threshold_gate(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [0.0, 0.0, 1.0]
