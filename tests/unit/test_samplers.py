"""Samplers and schedules against other people's: diffusers, and the mathematics itself."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels, karras

LEVELS = NoiseLevels(0.02, 1.0, 7.0)
# What is sampled here stays within [-1, 1], where ddim_clipped is ddim; test_divla_heads.py has it beyond.
DETERMINISTIC = ("euler", "heun", "dpm_2", "ddim", "ddim_clipped", "dpmpp_2s", "dpmpp_2m", "lms")
STOCHASTIC = tuple(name for name in SAMPLERS if name not in DETERMINISTIC)


def _linear_denoiser(x, sigma):
    """A smooth D with some curvature in both arguments, in numpy or torch."""
    return 0.6 * x / (1 + sigma) + 0.1


def _gaussian_denoiser(x, sigma, variance=0.25):
    """The exact D of data drawn from N(0, variance)."""
    return x * (variance / (variance + sigma**2))


def _no_noise():
    raise AssertionError("a deterministic sampler drew noise")


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("euler", EDMEulerScheduler), ("dpmpp_2m", EDMDPMSolverMultistepScheduler)]
)
def test_diffusers_walks_the_same_path(ours: str, theirs: type, steps: int) -> None:
    scheduler = theirs(sigma_min=0.02, sigma_max=1.0, sigma_data=0.5, rho=7.0)
    _agree(ours, scheduler, steps, noise=_no_noise)


@pytest.mark.parametrize("steps", [3, 10])
def test_diffusers_walks_the_same_stochastic_path_on_the_same_noise(steps: int) -> None:
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.02, sigma_max=1.0, sigma_data=0.5, algorithm_type="sde-dpmsolver++", solver_type="heun"
    )
    _agree("dpmpp_2m_sde", scheduler, steps, noise=None)


def _agree(ours: str, scheduler, steps: int, *, noise) -> None:
    scheduler.set_timesteps(steps)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    np.testing.assert_allclose(sigmas, karras(steps, LEVELS), rtol=1e-5)
    start = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    draw = noise or (lambda: torch.randn(start.shape, generator=generator))
    got = run(SAMPLERS[ours](start * sigmas[0], sigmas, draw), _linear_denoiser)

    sample, again = start * sigmas[0], torch.Generator().manual_seed(1)
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        # Their schedulers take the raw output F of the network; this F makes their preconditioning give our D.
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        raw = (_linear_denoiser(sample, sigma) - c_skip * sample) / c_out
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(raw, timestep, sample, generator=again).prev_sample
    torch.testing.assert_close(got, sample, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_sampler_converges_to_the_exact_solution(name: str) -> None:
    """For N(0, s^2) data the ODE has a closed solution: x(0) = x(sigma) s / sqrt(s^2 + sigma^2)."""
    x = np.random.default_rng(0).standard_normal((1, 4, 2))
    wanted = x * 0.5 / math.sqrt(0.25 + 1)

    def error(steps: int) -> float:
        got = run(SAMPLERS[name](x, karras(steps, LEVELS), _no_noise), _gaussian_denoiser)
        return float(np.abs(got - wanted).max())

    assert error(200) < 5e-3
    assert error(200) < error(4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_ends_in_the_data_distribution(name: str) -> None:
    draw = np.random.default_rng(0)
    # Pure noise at sigma_max on top of the data, as the exact marginal has it.
    x = draw.standard_normal((20_000, 1, 1)) * math.sqrt(0.25 + 1)
    got = run(SAMPLERS[name](x, karras(200, LEVELS), lambda: draw.standard_normal(x.shape)), _gaussian_denoiser)
    assert abs(got.mean()) < 0.02
    assert got.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_and_torch_give_the_same_samples(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 2)).astype(np.float32)
    sigmas = karras(5, LEVELS)
    tapes = [iter(np.random.default_rng(1).standard_normal((20, *x.shape), dtype=np.float32)) for _ in range(2)]
    in_numpy = run(SAMPLERS[name](x, sigmas, lambda: next(tapes[0])), _linear_denoiser)
    in_torch = run(
        SAMPLERS[name](torch.from_numpy(x), sigmas, lambda: torch.from_numpy(next(tapes[1]))), _linear_denoiser
    )
    assert in_numpy.dtype == np.float32
    np.testing.assert_allclose(in_numpy, in_torch.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_gives_the_denoised_action_itself(name: str) -> None:
    x = np.ones((1, 2, 2), dtype=np.float32)
    got = run(SAMPLERS[name](x, (1.0, 0.0), lambda: np.full_like(x, 9.0)), _linear_denoiser)
    np.testing.assert_allclose(got, _linear_denoiser(x, 1.0), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_every_schedule_ends_in_zero_and_has_one_level_a_step(name: str, steps: int) -> None:
    sigmas = SCHEDULES[name](steps, NoiseLevels(0.02, 50.0))
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert all(sigma > 0 for sigma in sigmas[:-1])


@pytest.mark.parametrize("name", ["karras", "exponential", "linear", "polyexponential"])
def test_a_schedule_runs_from_the_highest_level_to_the_lowest(name: str) -> None:
    sigmas = SCHEDULES[name](10, LEVELS)
    assert sigmas[0] == pytest.approx(1.0)
    assert sigmas[-2] == pytest.approx(0.02)
    assert list(sigmas) == sorted(sigmas, reverse=True)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (2, 1), (math.nan, 1)])
def test_impossible_noise_levels_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="sigma_min"):
        NoiseLevels(low, high)


def test_a_schedule_that_has_too_few_levels_says_so() -> None:
    with pytest.raises(ValueError, match="fewer than 30 steps"):
        SCHEDULES["iddpm"](30, NoiseLevels(0.02, 0.021))
