"""Noise schedules: the levels sigma that a sampler walks down.

Every schedule has one signature, `schedule(steps, levels) -> (sigma_0, ..., sigma_{steps-1}, 0.0)`, highest level
first. Plain floats: a schedule is made once per request, apart from the sampler, and needs no tensor library.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NoiseLevels:
    """The range of noise levels that a network was trained on.

    Attributes:
        sigma_min: Lowest positive level, in units of the normalised action.
        sigma_max: Highest level; samples start as Gaussian noise of this standard deviation.
        rho: Curvature of the Karras schedule (BESO 5, MoDE 7) and of `polyexponential`.
    """

    sigma_min: float
    sigma_max: float
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min <= self.sigma_max:
            raise ValueError(f"noise levels need 0 < sigma_min <= sigma_max, got {self.sigma_min} and {self.sigma_max}")


# Training steps of every policy that was trained with diffusers' "squaredcos_cap_v2".
SQUAREDCOS_STEPS = 100

Sigmas = tuple[float, ...]
Schedule = Callable[[int, NoiseLevels], Sigmas]


def karras(steps: int, levels: NoiseLevels) -> Sigmas:
    """Karras et al. 2022, eq. 5."""
    high, low = levels.sigma_max ** (1 / levels.rho), levels.sigma_min ** (1 / levels.rho)
    return _descending((high + np.linspace(0, 1, steps) * (low - high)) ** levels.rho)


def exponential(steps: int, levels: NoiseLevels) -> Sigmas:
    """Equal steps in log sigma."""
    return _descending(np.exp(np.linspace(math.log(levels.sigma_max), math.log(levels.sigma_min), steps)))


def linear(steps: int, levels: NoiseLevels) -> Sigmas:
    """Equal steps in sigma."""
    return _descending(np.linspace(levels.sigma_max, levels.sigma_min, steps))


def polyexponential(steps: int, levels: NoiseLevels) -> Sigmas:
    """A polynomial of degree rho in log sigma (k-diffusion); rho 1 is `exponential`."""
    ramp = np.linspace(1, 0, steps) ** levels.rho
    low, high = math.log(levels.sigma_min), math.log(levels.sigma_max)
    return _descending(np.exp(ramp * (high - low) + low))


def vp(steps: int, levels: NoiseLevels) -> Sigmas:
    """Variance preserving (Song et al. 2021), beta_d 19.9, beta_min 0.1; it ignores `levels`."""
    beta_d, beta_min, eps = 19.9, 0.1, 1e-3
    t = np.linspace(1, eps, steps)
    return _descending(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)))


def ve(steps: int, levels: NoiseLevels) -> Sigmas:
    """Variance exploding (Song et al. 2021), as BESO published it."""
    # BESO runs the ramp to steps + 1 rather than steps - 1, so it ends below sigma_min; checkpoints depend on it.
    ramp = np.linspace(0, steps + 1, steps) / max(steps - 1, 1)
    return _descending(levels.sigma_max * (levels.sigma_min / levels.sigma_max) ** ramp)


def cosine_beta(steps: int, levels: NoiseLevels) -> Sigmas:
    """The betas of the cosine schedule (Nichol and Dhariwal 2021), as BESO published it; it ignores `levels`."""
    # These are betas, not standard deviations. BESO uses them as noise levels all the same.
    s = 0.008
    t = np.linspace(0, steps + 1, steps + 1) / (steps + 1)
    alphas_cumprod = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return _descending(np.clip(betas, 0, 0.999)[::-1])


def iddpm(steps: int, levels: NoiseLevels) -> Sigmas:
    """The levels of improved DDPM (Karras et al. 2022, Table 1, iDDPM column) that lie within `levels`."""
    M, C_1, C_2 = 1000, 0.001, 0.008
    alpha_bar = np.sin(0.5 * np.pi * np.arange(M + 1) / M / (C_2 + 1)) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    within = u[(u >= levels.sigma_min) & (u <= levels.sigma_max)]
    if len(within) < steps:
        raise ValueError(f"iddpm has {len(within)} levels within {levels}, fewer than {steps} steps")
    return _descending(within[np.round((len(within) - 1) / max(steps - 1, 1) * np.arange(steps)).astype(int)])


def squaredcos(steps: int, levels: NoiseLevels) -> Sigmas:
    """The levels of `squaredcos_sigmas` that DDIM visits with "leading" spacing; it ignores `levels`.

    Sampling starts from N(0, 1 + sigma_0^2) rather than N(0, sigma_0^2), see `unit_start`.
    """
    if steps > SQUAREDCOS_STEPS:
        raise ValueError(f"squaredcos has {SQUAREDCOS_STEPS} levels, fewer than {steps} steps")
    visited = np.arange(steps) * (SQUAREDCOS_STEPS // steps)
    return _descending(squaredcos_sigmas()[visited[::-1]])


def squaredcos_sigmas() -> np.ndarray:
    """Return the level of each training step of a policy trained with "squaredcos_cap_v2", ascending; (100,) float64.

    These are the cosine schedule (Nichol and Dhariwal 2021, eq. 17) of Diffusion Policy and what follows it. A variance
    preserving x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, divided by sqrt(alpha_bar), is x_0 + sigma eps.
    """
    s, T = 0.008, SQUAREDCOS_STEPS
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.cumprod(1 - betas)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def unit_start(sigma: float) -> float:
    """Return the deviation that x has at `sigma` where a variance preserving process starts from N(0, 1)."""
    return math.sqrt(1 + sigma**2)


def _descending(positive: np.ndarray) -> Sigmas:
    # Checkpoints were trained and published with float32 levels, so samplers see the same rounding.
    return (*(float(sigma) for sigma in positive.astype(np.float32)), 0.0)


SCHEDULES: Mapping[str, Schedule] = {
    "karras": karras,
    "exponential": exponential,
    "linear": linear,
    "polyexponential": polyexponential,
    "vp": vp,
    "ve": ve,
    "cosine_beta": cosine_beta,
    "iddpm": iddpm,
    "squaredcos": squaredcos,
}
