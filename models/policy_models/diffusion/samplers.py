"""Samplers: from noise to actions in a few denoising steps.

A sampler here is a generator. It yields the question "what are the clean actions for this x at this sigma?" and is
sent the answer, so it knows nothing of networks, engines, batches or threads: whoever drives it may answer from torch,
from a compiled graph or from another machine, may answer many samplers with one forward pass, and may stop between
two steps. One signature serves all:

    sampler(x, sigmas, noise) -> generator of (x, sigma), returning the final x

`x` is any array type with arithmetic (numpy, torch), already scaled to sigmas[0]; `noise()` draws standard normal
noise shaped like x. Letters follow Karras et al. 2022 (EDM) and Lu et al. 2022 (DPM-Solver++): D is the denoised x,
d the slope dx/dsigma, and t = -log(sigma), so that exp(-(t' - t)) is simply sigma' / sigma.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.polynomial import Polynomial

Array = Any  # numpy.ndarray or torch.Tensor: only arithmetic with floats and clip are used
Noise = Callable[[], Array]
Steps = Generator[tuple[Array, float], Array, Array]


class Sampler(Protocol):
    """The one signature of every sampler below."""

    def __call__(self, x: Array, sigmas: Sequence[float], noise: Noise) -> Steps:
        """Walk `x` down `sigmas`; yields (x, sigma), expects D, returns the final x, shaped like `x`."""


def euler(x: Array, sigmas: Sequence[float], noise: Noise, *, churn: float = 0.0) -> Steps:
    """Euler steps of the probability-flow ODE (EDM, Algorithm 2 without the correction)."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma_hat = _churned(x, sigma, noise, churn / (len(sigmas) - 1))
        D = yield x, sigma_hat
        x = x + (x - D) / sigma_hat * (sigma_next - sigma_hat)
    return x


def heun(x: Array, sigmas: Sequence[float], noise: Noise, *, churn: float = 0.0) -> Steps:
    """Heun's second-order steps (EDM, Algorithm 2); two denoisings a step, one in the last."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma_hat = _churned(x, sigma, noise, churn / (len(sigmas) - 1))
        D = yield x, sigma_hat
        d = (x - D) / sigma_hat
        x_next = x + d * (sigma_next - sigma_hat)
        if sigma_next > 0:
            D_next = yield x_next, sigma_next
            d_next = (x_next - D_next) / sigma_next
            x_next = x + (d + d_next) / 2 * (sigma_next - sigma_hat)
        x = x_next
    return x


def dpm_2(x: Array, sigmas: Sequence[float], noise: Noise, *, churn: float = 0.0) -> Steps:
    """DPM-Solver-2 (Lu et al. 2022a): the slope at the log-midpoint; the last step is Euler."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma_hat = _churned(x, sigma, noise, churn / (len(sigmas) - 1))
        x = yield from _midpoint(x, sigma_hat, sigma_next)
    return x


def ddim(x: Array, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DDIM, which is DPM-Solver-1: exact for a D that does not change over the step."""
    for sigma, sigma_next in pairwise(sigmas):
        D = yield x, sigma
        x = _towards(x, D, sigma_next / sigma)
    return x


def ddim_clipped(x: Array, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DDIM as diffusers runs it with clip_sample: D is clipped to [-1, 1], the direction of the noise is not.

    The noise that D left in x, eps = (x - D) / sigma, is that of the unclipped D (use_clipped_model_output False).
    """
    for sigma, sigma_next in pairwise(sigmas):
        D = yield x, sigma
        x = D.clip(-1.0, 1.0) + (x - D) * (sigma_next / sigma)
    return x


def dpmpp_2s(x: Array, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2S), r = 1/2 (Lu et al. 2022b, Algorithm 1); the last step is Euler."""
    for sigma, sigma_next in pairwise(sigmas):
        x = yield from _single_step(x, sigma, sigma_next)
    return x


def dpmpp_2m(x: Array, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order from the previous D.

    The first and the last step are of first order.
    """
    D_last, h_last = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        D = yield x, sigma
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        if D_last is None or sigma_next == 0:
            x = _towards(x, D, sigma_next / sigma)
        else:
            x = _towards(x, D + (D - D_last) * (h / (2 * h_last)), sigma_next / sigma)
        D_last, h_last = D, h
    return x


def lms(x: Array, sigmas: Sequence[float], noise: Noise, *, order: int = 4) -> Steps:
    """Linear multistep (Adams-Bashforth on an uneven grid, as in k-diffusion)."""
    slopes: list[Array] = []  # newest first
    for i, sigma in enumerate(sigmas[:-1]):
        D = yield x, sigma
        slopes = [(x - D) / sigma, *slopes[: order - 1]]
        for weight, d in zip(_multistep_weights(sigmas, i, len(slopes)), slopes, strict=True):
            x = x + d * weight
    return x


def euler_ancestral(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Steps:
    """Euler steps to below the next level, then fresh noise up to it (DDPM in the limit)."""
    for sigma, sigma_next in pairwise(sigmas):
        D = yield x, sigma
        sigma_down, sigma_up = _ancestral(sigma, sigma_next, eta)
        x = x + (x - D) / sigma * (sigma_down - sigma)
        if sigma_down > 0:
            x = x + noise() * sigma_up
    return x


def dpm_2_ancestral(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Steps:
    """`dpm_2` steps to below the next level, then fresh noise up to it."""
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, sigma_up = _ancestral(sigma, sigma_next, eta)
        x = yield from _midpoint(x, sigma, sigma_down)
        if sigma_down > 0:
            x = x + noise() * sigma_up
    return x


def dpmpp_2s_ancestral(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Steps:
    """`dpmpp_2s` steps to below the next level, then fresh noise up to it."""
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, sigma_up = _ancestral(sigma, sigma_next, eta)
        x = yield from _single_step(x, sigma, sigma_down)
        if sigma_up > 0:
            x = x + noise() * sigma_up
    return x


def dpmpp_sde(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Steps:
    """DPM-Solver++ SDE, single step, r = 1/2 (k-diffusion). Upstream's agents run this one as "dpmpp_2m_sde"."""
    for sigma, sigma_next in pairwise(sigmas):
        D = yield x, sigma
        if sigma_next == 0:
            return D
        sigma_mid = math.sqrt(sigma * sigma_next)
        # Both draws are increments of one Brownian path in sigma, and the first interval is part of the second.
        to_mid, beyond = noise(), noise()
        whole = to_mid * math.sqrt(sigma - sigma_mid) + beyond * math.sqrt(sigma_mid - sigma_next)
        down, up = _ancestral(sigma, sigma_mid, eta)
        D_mid = yield _towards(x, D, down / sigma) + to_mid * up, sigma_mid
        down, up = _ancestral(sigma, sigma_next, eta)
        x = _towards(x, D_mid, down / sigma) + whole * (up / math.sqrt(sigma - sigma_next))
    return x


def dpmpp_2m_sde(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Steps:
    """DPM-Solver++(2M) SDE with the Heun-like correction (Lu et al. 2022b, eq. 18; k-diffusion)."""
    D_last, h_last = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        D = yield x, sigma
        if sigma_next == 0:
            return D
        h = math.log(sigma / sigma_next)
        k = h + eta * h
        x = x * math.exp(-k) + D * -math.expm1(-k)
        if D_last is not None:
            x = x + (D - D_last) * ((1 + math.expm1(-k) / k) * (h / h_last))
        if eta > 0:
            x = x + noise() * (sigma_next * math.sqrt(-math.expm1(-2 * eta * h)))
        D_last, h_last = D, h
    return x


def _towards(x: Array, D: Array, ratio: float) -> Array:
    """The exact solution of dx/dt = D - x from t to t', with ratio = exp(-(t' - t)); ratio 0 gives D."""
    return x * ratio + D * (1 - ratio)


def _midpoint(x: Array, sigma: float, sigma_next: float) -> Steps:
    D = yield x, sigma
    d = (x - D) / sigma
    if sigma_next == 0:
        return x + d * (sigma_next - sigma)
    sigma_mid = math.sqrt(sigma * sigma_next)
    x_mid = x + d * (sigma_mid - sigma)
    D_mid = yield x_mid, sigma_mid
    return x + (x_mid - D_mid) / sigma_mid * (sigma_next - sigma)


def _single_step(x: Array, sigma: float, sigma_next: float) -> Steps:
    D = yield x, sigma
    if sigma_next == 0:
        return D
    sigma_mid = math.sqrt(sigma * sigma_next)
    D_mid = yield _towards(x, D, sigma_mid / sigma), sigma_mid
    return _towards(x, D_mid, sigma_next / sigma)


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split sigma_next into (sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = sigma_next^2."""
    # In float32, as published: far below sigma its sigma_down rounds to 0, and what follows takes another branch.
    s, s_next = np.float32(sigma), np.float32(sigma_next)
    s_up = min(s_next, np.float32(eta) * np.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
    return float(np.sqrt(s_next**2 - s_up**2)), float(s_up)


def _churned(x: Array, sigma: float, noise: Noise, gamma: float) -> tuple[Array, float]:
    """EDM, Algorithm 2, lines 4 to 6: raise the noise level a little before the step."""
    gamma = min(gamma, math.sqrt(2) - 1)
    if gamma == 0:
        return x, sigma
    sigma_hat = sigma * (1 + gamma)
    return x + noise() * math.sqrt(sigma_hat**2 - sigma**2), sigma_hat


def _multistep_weights(sigmas: Sequence[float], i: int, order: int) -> list[float]:
    """Integrals over [sigma_i, sigma_{i+1}] of the Lagrange polynomials through the last `order` levels."""
    nodes = np.asarray(sigmas[i - order + 1 : i + 1], dtype=np.float64)[::-1]
    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        basis = Polynomial.fromroots(others) / np.prod(node - others) if len(others) else Polynomial([1.0])
        integral = basis.integ()
        weights.append(float(integral(sigmas[i + 1]) - integral(sigmas[i])))
    return weights


SAMPLERS: Mapping[str, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_ancestral": dpm_2_ancestral,
    "ddim": ddim,
    "ddim_clipped": ddim_clipped,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "lms": lms,
}


def run(steps: Steps, denoise: Callable[[Array, float], Array]) -> Array:
    """Drive one sampler to its end with a plain function: for training, tests and notebooks."""
    answer = None
    while True:
        try:
            x, sigma = steps.send(answer) if answer is not None else next(steps)
        except StopIteration as finished:
            return finished.value
        answer = denoise(x, sigma)
