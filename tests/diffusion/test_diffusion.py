from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dydit_scale.diffusion.flow import interpolate, per_sample_mse, sample_noise, velocity
from dydit_scale.diffusion.process import FlowProcess
from dydit_scale.diffusion.randomness import keyed_generator, keyed_seed
from dydit_scale.diffusion.timesteps import logit_normal, stratified_uniform


def test_seeds_depend_on_every_part_of_the_key_and_never_change() -> None:
    keys = [(0,), (1,), (0, 1), (0, "1"), (0, 1, "a"), (0, "a", 1), (0, -1)]
    seeds = [keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= s < 2**63 for s in seeds)
    assert keyed_seed(0, "noise", 7) == 7357499112618341030  # written into every run: must stay
    assert torch.equal(
        torch.rand(3, generator=keyed_generator(0, "x")), torch.rand(3, generator=keyed_generator(0, "x"))
    )


def test_noise_depends_on_the_position_alone() -> None:
    whole = sample_noise(0, torch.arange(10), (2, 3))
    assert torch.equal(sample_noise(0, torch.tensor([7, 2]), (2, 3)), whole[[7, 2]])
    assert not torch.equal(sample_noise(0, torch.arange(10), (2, 3), "other"), whole)
    assert abs(float(sample_noise(0, torch.arange(500), (50,)).std()) - 1) < 0.02


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_noise_levels_are_spread_over_the_global_batch_and_over_each_share(ranks: int) -> None:
    for step in range(20):
        u = stratified_uniform(0, step, torch.arange(64))
        for share in u.chunk(ranks):
            quarters = torch.histc(share, 4, 0, 1)
            assert (quarters - len(share) / 4).abs().max() <= 2  # independent draws would miss by 10 at times
    means = torch.stack([stratified_uniform(0, s, torch.tensor([5])) for s in range(4000)])
    assert abs(float(means.mean()) - 0.5) < 0.02  # each place by itself is uniform


def test_logit_normal_has_its_quantiles_and_shift() -> None:
    u = torch.tensor([0.158655, 0.5, 0.841345])
    torch.testing.assert_close(logit_normal(u), torch.sigmoid(torch.tensor([-1.0, 0.0, 1.0])), atol=1e-5, rtol=0)
    assert float(logit_normal(u, shift=3.0)[1]) == pytest.approx(0.75)


def test_uniform_levels_are_those_that_a_sampler_visits() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    u = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    levels = FlowProcess(density="uniform", shift=3.0).training_levels(u)
    torch.testing.assert_close(levels, scheduler.sigmas[:-1], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(FlowProcess(shift=3.0).training_levels(u[1:]), levels[1:], atol=0.01)


def test_the_path_is_diffusers_own() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    x = interpolate(x0, noise, torch.ones(2))
    for i, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[i]
        torch.testing.assert_close(x, interpolate(x0, noise, s.expand(2)), atol=1e-5, rtol=1e-5)
        x = scheduler.step(velocity(x0, noise), t, x).prev_sample
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=1e-5)


def test_losses_come_per_sample_in_fp32() -> None:
    a = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    loss = per_sample_mse(a, torch.zeros_like(a))
    assert loss.tolist() == [5.0, 0.0] and loss.dtype == torch.float32
