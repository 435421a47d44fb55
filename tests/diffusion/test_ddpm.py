from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal

from dydit_scale.diffusion.ddpm import BOUND_WEIGHT, DDPM
from dydit_scale.diffusion.flow import interpolate, velocity
from dydit_scale.diffusion.timesteps import stratified_uniform

SHAPES = [(4, 3, 3), (4, 2, 3, 3)]  # pictures, videos
TIMESTEPS = [0, 1, 2, 250, 998, 999]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(t: list[int], shape: tuple[int, ...] = SHAPES[0]) -> dict[str, Tensor]:
    """An output with a wrong noise and any variance, at these timesteps."""
    x0, noise, error, coefficient = (drawn(len(t), *shape, seed=i) for i in range(4))
    output = torch.cat([noise + 0.3 * error, 0.8 * coefficient], dim=1)
    return {"output": output, "x0": 0.5 * x0, "noise": noise, "t": torch.tensor(t)}


# Against diffusers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noisy_pictures_are_those_of_diffusers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, noise, t = drawn(6, *shape).to(dtype), drawn(6, *shape, seed=1).to(dtype), torch.tensor(TIMESTEPS)
    ours, theirs = DDPM().noisy(x0, noise, t), DDPMScheduler(clip_sample=False).add_noise(x0.float(), noise.float(), t)
    assert ours.dtype == dtype and ours.shape == x0.shape
    torch.testing.assert_close(ours, theirs.to(dtype), atol=2e-6 if dtype == torch.float32 else 0.02, rtol=1e-4)


@pytest.mark.parametrize("t", TIMESTEPS[1:])
def test_the_learned_variance_is_that_of_diffusers(t: int) -> None:
    coefficient = drawn(1, 4, 3, 3)
    theirs = DDPMScheduler()._get_variance(t, coefficient, variance_type="learned_range")
    torch.testing.assert_close(DDPM().log_variance(coefficient, torch.tensor([t])), theirs, atol=1e-3, rtol=1e-4)


def test_the_variance_of_timestep_0_lies_between_beta_and_the_posterior_of_timestep_1() -> None:
    low, high = DDPM().log_variance(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 0])).exp().flatten().tolist()
    assert high == pytest.approx(1e-4, rel=1e-5)
    assert low == pytest.approx(float(DDPMScheduler()._get_variance(1, variance_type="fixed_small")), rel=1e-3)


def means(t: int, x_t: Tensor, *noises: Tensor) -> list[Tensor]:
    """Means of x_{t-1} by diffusers' step, all but for one and the same random term."""
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    return [
        scheduler.step(noise, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample.double()
        for noise in noises
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bound_is_the_divergence_of_diffusers_two_gaussians_in_bits(shape: tuple[int, ...]) -> None:
    x, scheduler = batch(TIMESTEPS[1:], shape), DDPMScheduler()
    losses = DDPM().losses(**x)
    for i, t in enumerate(TIMESTEPS[1:]):
        predicted, coefficient = x["output"][i].chunk(2)
        x_t = scheduler.add_noise(x["x0"][i], x["noise"][i], torch.tensor([t]))
        wrong, right = means(t, x_t, predicted, x["noise"][i])
        deviation = float(scheduler._get_variance(t, variance_type="fixed_small")) ** 0.5
        learned = (0.5 * scheduler._get_variance(t, coefficient, variance_type="learned_range").double()).exp()
        kl = torch.distributions.kl_divergence(Normal(right, deviation), Normal(wrong, learned))
        assert float(losses.bound[i]) == pytest.approx(float(kl.mean()) / math.log(2), rel=0.01)
        assert float(losses.mse[i]) == pytest.approx(float((predicted - x["noise"][i]).square().mean()), rel=1e-5)


# Against numerical integration, by Bayes' rule and not by anyone's closed form


def density(x: Tensor, mean: float, variance: float) -> Tensor:
    return torch.exp(-0.5 * (x - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("t", [1, 10, 500])
def test_the_bound_is_the_integrated_divergence(t: int) -> None:
    ddpm = DDPM()
    x = batch([t], (1, 1))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    x0, noise, predicted, coefficient = (float(v) for v in (x["x0"], x["noise"], *x["output"][0]))
    x_t = float(abar[t].sqrt()) * x0 + float((1 - abar[t]).sqrt()) * noise
    grid = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    joint = density(grid, float(abar[t - 1].sqrt()) * x0, float(1 - abar[t - 1]))  # q(x_{t-1} | x_0)
    joint = joint * density((1 - beta[t]).sqrt() * grid, x_t, float(beta[t]))  # q(x_t | x_{t-1})
    q = joint / (joint.sum() * step)
    guess = (x_t - float((1 - abar[t]).sqrt()) * predicted) / float(abar[t].sqrt())
    small = float(((grid - (q * grid).sum() * step) ** 2 * q).sum() * step)
    again = density(grid, float(abar[t - 1].sqrt()) * guess, float(1 - abar[t - 1]))
    again = again * density((1 - beta[t]).sqrt() * grid, x_t, float(beta[t]))
    mean = float((again * grid).sum() / again.sum())  # of the posterior around the guessed picture
    share = (coefficient + 1) / 2
    p = density(grid, mean, float(beta[t]) ** share * small ** (1 - share))
    kl = (q * (q.clamp(min=1e-300) / p.clamp(min=1e-300)).log()).sum() * step
    assert float(ddpm.losses(**x).bound) == pytest.approx(float(kl) / math.log(2), rel=2e-3)


def test_at_timestep_0_the_bound_is_the_cost_of_the_pictures_values() -> None:
    ddpm, values = DDPM(), torch.linspace(-1, 1, 256)
    x = batch([0] * 256, (1, 1))
    x["x0"] = values.reshape(-1, 1, 1)
    bits = ddpm.losses(**x).bound
    beta = 1e-4
    for i in (0, 1, 100, 200, 254, 255):
        share = (float(x["output"][i, 1]) + 1) / 2
        variance = beta**share * float(DDPMScheduler()._get_variance(1)) ** (1 - share)
        error = float(x["noise"][i] - x["output"][i, 0])
        mean = float(values[i]) + math.sqrt(beta / (1 - beta)) * error
        low = -3.0 if i == 0 else float(values[i]) - 1 / 255
        high = 3.0 if i == 255 else float(values[i]) + 1 / 255
        grid = torch.linspace(low, high, 200_001, dtype=torch.float64)
        probability = float(torch.trapezoid(density(grid, mean, variance), grid))
        assert float(bits[i]) == pytest.approx(-math.log2(probability), rel=2e-3, abs=1e-4)


def test_a_perfect_model_has_a_bound_of_0_and_the_weight_in_dit_is_1() -> None:
    x = batch(TIMESTEPS[1:])
    x["output"] = torch.cat([x["noise"], -torch.ones_like(x["noise"])], dim=1)
    losses = DDPM().losses(**x)
    assert losses.mse.abs().max() == 0 and losses.bound.abs().max() < 1e-6
    assert BOUND_WEIGHT * DDPM().steps == 1


# What learns from what


def test_the_bound_teaches_the_variance_alone_and_the_error_the_noise_alone() -> None:
    x = batch(TIMESTEPS)
    output = x.pop("output").requires_grad_()
    losses = DDPM().losses(output, **x)
    (from_bound,) = torch.autograd.grad(losses.bound.sum(), output, retain_graph=True)
    (from_mse,) = torch.autograd.grad(losses.mse.sum(), output, retain_graph=True)
    (both,) = torch.autograd.grad(losses.total.sum(), output)
    assert not from_bound[:, :4].any() and from_bound[:, 4:].abs().amin() > 0
    assert from_mse[:, :4].abs().amin() > 0 and not from_mse[:, 4:].any()
    torch.testing.assert_close(both, from_bound + from_mse)


def test_without_a_learned_variance_the_loss_is_the_error() -> None:
    x = batch(TIMESTEPS)
    x["output"] = x["output"][:, :4]
    losses = DDPM().losses(**x)
    assert not losses.bound.any()
    torch.testing.assert_close(losses.total, (x["output"] - x["noise"]).square().flatten(1).mean(1))


def test_losses_are_each_samples_own_and_fp32() -> None:
    x = batch(TIMESTEPS)
    whole = DDPM().losses(**x)
    for i in range(len(TIMESTEPS)):
        alone = DDPM().losses(**{k: v[i : i + 1] for k, v in x.items()})
        torch.testing.assert_close(alone.total, whole.total[i : i + 1])
    low = DDPM().losses(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()})
    assert low.total.dtype == torch.float32 and low.total.isfinite().all()


def test_a_model_far_off_has_finite_losses_and_gradients() -> None:
    x = batch(TIMESTEPS)
    output = (50 * x.pop("output")).requires_grad_()
    total = DDPM().losses(output, **{**x, "x0": 20 * x["x0"]}).total
    total.sum().backward()
    assert total.isfinite().all() and output.grad is not None and output.grad.isfinite().all()


# Timesteps, and SiT's path


def test_timesteps_fill_their_range_evenly() -> None:
    t = DDPM().timesteps(stratified_uniform(0, 3, torch.arange(256)))
    assert t.dtype == torch.int64 and torch.histc(t.float(), 4, 0, 1000).tolist() == pytest.approx([64] * 4, abs=2)
    assert DDPM().timesteps(torch.tensor([0.0, 0.0005, 0.0015, 1.0])).tolist() == [0, 0, 1, 999]


def test_sits_path_is_the_flow_with_picture_and_noise_exchanged() -> None:
    picture, noise, t = drawn(3, 4, 2, 2), drawn(3, 4, 2, 2, seed=1), torch.tensor([0.0, 0.3, 1.0])
    x = interpolate(noise, picture, t)
    assert torch.equal(x[0], noise[0]) and torch.equal(x[2], picture[2])
    torch.testing.assert_close(x[1], 0.3 * picture[1] + 0.7 * noise[1])
    assert torch.equal(velocity(noise, picture), picture - noise)


def test_bad_input_is_refused() -> None:
    x = batch([3])
    with pytest.raises(ValueError, match=r"4 channels .* or 8 .*got 6"):
        DDPM().losses(**{**x, "output": x["output"][:, :6]})
    with pytest.raises(ValueError, match="beta_start"):
        DDPM(beta_start=0.03)
    with pytest.raises(ValueError, match="steps"):
        DDPM(steps=1)


def test_tables_that_a_plan_asked_for_first_have_contents() -> None:
    process = DDPM(beta_start=1.5e-4)  # no other test has asked for its tables
    x = torch.ones(1, 1, 1, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        process.noisy(x, x, torch.tensor([7]))
    assert process.noisy(x, torch.zeros_like(x), torch.tensor([7])).item() == pytest.approx(1, abs=0.01)
