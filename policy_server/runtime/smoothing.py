"""Policy smoothing: chunks that provably change little when an observation is a little wrong.

A policy is asked about several copies of an observation with Gaussian noise on each, and the mean of its chunks is
sent. The mean is a smooth function of the observation however the policy itself may jump, so how far it can move is
known without knowing anything about the policy.

Kumar, Levine, Feizi, "Policy Smoothing for Provably Robust Reinforcement Learning", ICLR 2022, arXiv:2106.11420.
Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", NeurIPS 2019,
arXiv:1906.04584.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from policy_models.spec import Observation
from policy_server.runtime.confidence import binomial_lower, mean_error

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Smoothing:
    """How a policy is smoothed.

    Distances between observations are in scaled units: each number of the state divided by its `scale`, and, where
    images are perturbed too, each grey level of each colour of each pixel times sigma / images_sigma. The radius is the
    l2 norm over all of them together. What is not perturbed (goals, and images unless asked) must not change at all.

    Attributes:
        sigma: Standard deviation of the noise, in scaled units.
        samples: Copies of an observation, N.
        tolerance: How far a number of an action may move, as a fraction of its range.
        confidence: Probability that what is said of a chunk is true, over the draw of the noise.
        scale: Scale of each number of the state, such as its standard deviation in the training data, (S,); empty for
            the state's own units.
        images_sigma: Standard deviation of the noise on images in grey levels of 256; None leaves images as they are.
    """

    sigma: float
    samples: int
    tolerance: float
    confidence: float = 0.99
    scale: tuple[float, ...] = ()
    images_sigma: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sigma < np.inf or self.samples < 2:
            raise ValueError(f"smoothing needs a positive sigma and 2 samples, got {self.sigma} and {self.samples}")
        if not (0 < self.tolerance < 1 and 0 < self.confidence < 1):
            raise ValueError(
                f"tolerance and confidence lie between 0 and 1, got {self.tolerance} and {self.confidence}"
            )
        if not all(0 < scale < np.inf for scale in (*self.scale, self.images_sigma or 1.0)):
            raise ValueError(f"scales must be positive, got {self.scale} and {self.images_sigma} for images")

    def perturb(self, observation: Observation, rng: np.random.Generator) -> list[Observation]:
        """Return N copies of an observation, each with its own noise.

        Raises:
            ValueError: The observation holds nothing that would be perturbed, or `scale` is not that of its state.
        """
        state = observation.state
        if state is None and (self.images_sigma is None or not observation.images):
            raise ValueError("there is nothing to smooth over: the observation has no state, and images are left alone")
        if state is not None and self.scale and len(self.scale) != len(state):
            raise ValueError(f"scale has {len(self.scale)} entries for a state of {len(state)}")
        return [self._perturb(observation, rng) for _ in range(self.samples)]

    def average(self, chunks: np.ndarray, low: np.ndarray, high: np.ndarray) -> "Smoothed":
        """Return the mean of the policy's chunks, with what can be said about it.

        Args:
            chunks: What the policy said to each copy, (N, H, A). Numbers outside of their range count as its ends.
            low: Lowest value of each number, (A,), all finite.
            high: Highest value of each number, (A,), all above `low`.

        Returns:
            The mean, its radius and its error. If any number is not finite the mean is NaN, for the guard to withhold.

        Raises:
            ValueError: A number has no range: without one nothing bounds how far it moves.
        """
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        check_range(low, high)
        if not np.isfinite(chunks).all():
            return Smoothed(np.full(chunks.shape[1:], np.nan, dtype=np.float32), 0.0, 1.0)
        fractions = (np.clip(chunks, low, high) - low) / (high - low)
        mean = fractions.mean(axis=0)
        error = mean_error(fractions, self.confidence)
        actions = np.clip(low + mean * (high - low), low, high).astype(np.float32)
        radius = min(
            certified_radius(p, e, self.tolerance, self.sigma)
            for p, e in zip(mean.ravel().tolist(), error.ravel().tolist(), strict=True)
        )
        return Smoothed(actions, radius, float(error.max()))

    def _perturb(self, observation: Observation, rng: np.random.Generator) -> Observation:
        state, images = observation.state, observation.images
        if state is not None:
            noise = self.sigma * rng.standard_normal(len(state)) * (self.scale or 1.0)
            state = (state + noise).astype(np.float32)
        if self.images_sigma is not None:
            images = {name: _noisy(image, self.images_sigma, rng) for name, image in images.items()}
        return replace(observation, state=state, images=images)


@dataclass(frozen=True)
class Smoothed:
    """A chunk of a smoothed policy.

    With the probability of `Smoothing.confidence`, and for every observation within `radius` of the one that was
    perturbed: the smoothed action there, meaning its expectation over the noise, is within `Smoothing.tolerance` of
    `actions` and of the smoothed action here, in each of its numbers.

    Attributes:
        actions: Mean over the copies, (H, A) float32, in the robot's units.
        radius: In scaled units, l2; 0 where so few samples support none, infinity where every observation is as good.
        error: How far a number of `actions` may be from its expectation, as a fraction of its range.
    """

    actions: np.ndarray
    radius: float
    error: float


def check_range(low: np.ndarray, high: np.ndarray) -> None:
    """Raise ValueError unless actions with these limits, (A,), can be smoothed."""
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError("smoothing needs a finite low and high for each number of an action, low below high")


def certified_radius(p: float, error: float, tolerance: float, sigma: float) -> float:
    """Return how far an observation may move until a smoothed number may have moved by `tolerance`.

    For f in [0, 1], Phi^-1(E f(x + sigma Z)) is 1/sigma-Lipschitz in x (Salman et al. 2019, Lemma 2), so an expectation
    of q is at most Phi(Phi^-1(q) + r / sigma) at a distance of r, and at least Phi(Phi^-1(q) - r / sigma).

    Args:
        p: Estimate of the expectation, in [0, 1].
        error: How far the true one may be from it.
        tolerance: How far it may move, both from the estimate and from where it truly is.
        sigma: Standard deviation of the noise, in the units of the radius.
    """
    lowest, highest = max(0.0, p - error), min(1.0, p + error)
    return sigma * min(_rise(p, lowest, highest, tolerance), _rise(1 - p, 1 - highest, 1 - lowest, tolerance))


def certified_success(
    successes: int, episodes: int, budget: float, sigma: float, *, confidence: float = 0.95, samples: int = 1
) -> float:
    """Return a lower bound of the rate of success under attack (Kumar et al. 2022, the certificate for 0/1 rewards).

    It holds against anyone who may change every observation of an episode, knowing all that went before, as long as
    the changes of all observations together have an l2 norm of at most `budget`.

    Args:
        successes: Episodes that succeeded, without an attack, with the policy smoothed by noise of `sigma`.
        episodes: All of them, independent of each other.
        budget: B, the square root of the summed squares of all changes of an episode, in scaled units.
        sigma: Standard deviation of the noise, in scaled units.
        confidence: Probability that the bound holds, over the draw of the episodes.
        samples: Copies of an observation that each chunk was the mean of, N. The paper's agent has one; N copies show
            the same change N times under noises of their own, which makes of a budget of B one of B sqrt(N).

    Raises:
        ValueError: There are no episodes, or more successes than episodes, or a number is out of range.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"{successes} of {episodes} episodes cannot have succeeded")
    if not (budget >= 0 and sigma > 0 and samples >= 1 and 0 < confidence < 1):
        raise ValueError(
            "a certificate needs a budget from 0, a sigma above it, samples and a confidence between 0 and 1, got "
            f"{budget}, {sigma}, {samples} and {confidence}"
        )
    p = binomial_lower(successes, episodes, confidence)
    return p if p == 0 or budget == 0 else _NORMAL.cdf(_probit(p) - budget * math.sqrt(samples) / sigma)


def _rise(p: float, lowest: float, highest: float, tolerance: float) -> float:
    """Return by how many standard deviations an expectation in [lowest, highest] may move upwards."""
    from_estimate = _probit(p + tolerance) - _probit(highest) if p + tolerance < 1 else math.inf
    # An expectation moves most easily where it would pass the middle.
    easiest = min(max(0.5 * (1 - tolerance), lowest), highest)
    from_truth = _probit(easiest + tolerance) - _probit(easiest)
    return max(0.0, min(from_estimate, from_truth))


def _probit(p: float) -> float:
    """Return Phi^-1(p), with its limits at 0 and 1."""
    return _NORMAL.inv_cdf(p) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)


def _noisy(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    noise = np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32)
    noisy: np.ndarray = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
    return noisy
