"""Smoothed policies: what is certified is true, and is not nothing."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from policy_models.spec import Observation
from policy_server.runtime.confidence import binomial_lower, mean_error
from policy_server.runtime.smoothing import Smoothing, certified_radius, certified_success

NORMAL = NormalDist()
LOW, HIGH = np.zeros(1), np.ones(1)

fractions = st.floats(0, 1)
errors = st.floats(1e-4, 0.5)
tolerances = st.floats(0.01, 0.9)


def step(states: np.ndarray) -> np.ndarray:
    """Answer 1 to the right of 0, else 0: no policy changes faster when it is smoothed."""
    return (states > 0).astype(np.float32)


def linear(states: np.ndarray) -> np.ndarray:
    return (0.5 + 0.1 * states).astype(np.float32)


def answers(smoothing: Smoothing, policy, x: float, seed: int) -> np.ndarray:
    """Return (N, 1, 1) chunks of a policy that looks at one number."""
    copies = smoothing.perturb(Observation({}, np.float32([x]), None), np.random.default_rng(seed))
    return policy(np.array([copy.state for copy in copies]))[:, None]


@pytest.mark.parametrize("x", [-2.0, -0.5, 0.0, 0.3, 1.2])
@pytest.mark.parametrize("samples", [64, 1000, 20_000])
def test_the_certificate_of_a_step_is_true_and_most_of_what_is(x: float, samples: int) -> None:
    smoothing = Smoothing(sigma=0.5, samples=samples, tolerance=0.2)
    smoothed = smoothing.average(answers(smoothing, step, x, seed=3), LOW, HIGH)
    here = NORMAL.cdf(x / 0.5)
    assert abs(smoothed.actions.item() - here) <= smoothed.error
    reach = min(smoothed.radius, 100.0)
    for there in (NORMAL.cdf((x - reach) / 0.5), NORMAL.cdf((x + reach) / 0.5)):
        assert abs(there - smoothed.actions.item()) <= 0.2 + 1e-6
        assert abs(there - here) <= 0.2 + 1e-6
    if samples == 20_000:
        moves = [NORMAL.inv_cdf(here + side) - NORMAL.inv_cdf(here) for side in (0.2, -0.2) if 0 < here + side < 1]
        assert smoothed.radius > 0.7 * 0.5 * min(map(abs, moves))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_the_certificate_of_a_linear_policy_is_true_and_not_nothing(sigma: float) -> None:
    smoothing = Smoothing(sigma=sigma, samples=2000, tolerance=0.1)
    smoothed = smoothing.average(answers(smoothing, linear, 0.0, seed=0), LOW, HIGH)
    assert 0 < smoothed.radius <= 1.0, "a tenth of the range is one unit of this policy's state"
    assert smoothed.actions.item() == pytest.approx(0.5, abs=0.05)


def test_too_few_samples_support_nothing() -> None:
    smoothing = Smoothing(sigma=0.5, samples=4, tolerance=0.05)
    smoothed = smoothing.average(answers(smoothing, step, 0.0, seed=0), LOW, HIGH)
    assert smoothed.radius == 0
    assert smoothed.error > 0.05


@pytest.mark.parametrize("policy", [step, linear])
def test_the_error_of_the_mean_is_kept_far_more_often_than_promised(policy) -> None:
    smoothing = Smoothing(sigma=1.0, samples=100, tolerance=0.3, confidence=0.9)
    smoothed = [smoothing.average(answers(smoothing, policy, 0.0, seed), LOW, HIGH) for seed in range(200)]
    assert np.mean([abs(s.actions.item() - 0.5) <= s.error for s in smoothed]) >= 0.9


@given(fractions, errors, st.lists(tolerances, min_size=2, max_size=2))
def test_more_tolerance_never_shrinks_the_radius(p, error, pair) -> None:
    less, more = sorted(pair)
    assert certified_radius(p, error, less, 1.0) <= certified_radius(p, error, more, 1.0)


@given(fractions, st.lists(errors, min_size=2, max_size=2), tolerances)
def test_a_smaller_error_never_shrinks_the_radius(p, pair, tolerance) -> None:
    smaller, larger = sorted(pair)
    assert certified_radius(p, larger, tolerance, 1.0) <= certified_radius(p, smaller, tolerance, 1.0) + 1e-9


@given(fractions, errors, tolerances, st.floats(0, 1))
def test_nothing_that_the_lemma_allows_is_outside_of_the_radius(p, error, tolerance, place) -> None:
    radius = certified_radius(p, error, tolerance, 1.0)
    truth = max(0.0, p - error) + place * (min(1.0, p + error) - max(0.0, p - error))
    if not 0 < truth < 1 or radius in (0, np.inf):
        return
    for there in (NORMAL.cdf(NORMAL.inv_cdf(truth) + side * radius) for side in (-1, 1)):
        assert abs(there - p) <= tolerance + 1e-9
        assert abs(there - truth) <= tolerance + 1e-9


@given(fractions, errors, tolerances, st.floats(0.01, 10))
def test_the_radius_grows_with_the_noise(p, error, tolerance, sigma) -> None:
    assert certified_radius(p, error, tolerance, sigma) == pytest.approx(
        sigma * certified_radius(p, error, tolerance, 1.0)
    )


def test_more_samples_say_more_on_average() -> None:
    radii = []
    for samples in (50, 200, 800):
        smoothing = Smoothing(sigma=0.5, samples=samples, tolerance=0.3)
        smoothed = [smoothing.average(answers(smoothing, step, 0.2, seed), LOW, HIGH) for seed in range(50)]
        radii.append(np.mean([s.radius for s in smoothed]))
    assert radii == sorted(radii)


def test_every_number_of_a_chunk_is_certified_in_its_own_range() -> None:
    smoothing = Smoothing(sigma=0.5, samples=5000, tolerance=0.2)
    one = answers(smoothing, step, 0.1, seed=1)
    both = np.concatenate([10 * one - 5, np.full_like(one, 0.5)], axis=2)
    smoothed = smoothing.average(np.repeat(both, 3, axis=1), np.array([-5.0, 0.0]), np.array([5.0, 1.0]))
    assert smoothed.actions.shape == (3, 2)
    np.testing.assert_allclose(smoothed.actions[:, 1], 0.5)
    alone = smoothing.average(one, LOW, HIGH)
    np.testing.assert_allclose(smoothed.actions[:, 0], 10 * alone.actions.item() - 5, rtol=1e-5)
    assert 0.8 * alone.radius < smoothed.radius < alone.radius, "six numbers are harder to be sure of than one"


def test_a_policy_that_says_the_same_everywhere_has_the_tighter_bound() -> None:
    still = np.full((2000, 1), 0.5)
    assert mean_error(still, 0.99) < 0.01
    assert mean_error(still[:20], 0.99) < 0.5, "Hoeffding's, where so few samples say little of the variance"


def test_noise_is_drawn_on_the_state_alone_in_its_scale() -> None:
    image, goal = np.full((4, 4, 3), 128, dtype=np.uint8), np.zeros((1, 2), dtype=np.float32)
    observation = Observation({"top": image}, np.zeros(2, dtype=np.float32), goal)
    smoothing = Smoothing(sigma=0.1, samples=4000, tolerance=0.1, scale=(1.0, 50.0))
    copies = smoothing.perturb(observation, np.random.default_rng(0))
    states = np.array([copy.state for copy in copies])
    assert states.dtype == np.float32
    np.testing.assert_allclose(states.std(axis=0), [0.1, 5.0], rtol=0.05)
    assert all(copy.images["top"] is image and copy.goal is goal for copy in copies)


def test_images_are_perturbed_when_asked_for() -> None:
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    smoothing = Smoothing(sigma=0.1, samples=2, tolerance=0.1, images_sigma=8.0)
    first, second = smoothing.perturb(Observation({"top": image}, None, "go"), np.random.default_rng(0))
    assert first.images["top"].dtype == np.uint8
    assert first.images["top"].astype(float).std() == pytest.approx(8, rel=0.1)
    assert not np.array_equal(first.images["top"], second.images["top"])


def test_a_number_that_is_none_makes_a_mean_that_the_guard_withholds() -> None:
    chunks = np.zeros((8, 2, 1), dtype=np.float32)
    chunks[3, 1] = np.inf
    smoothed = Smoothing(sigma=1.0, samples=8, tolerance=0.1).average(chunks, LOW, HIGH)
    assert np.isnan(smoothed.actions).all()
    assert smoothed.radius == 0


def test_what_cannot_be_smoothed_is_refused() -> None:
    smoothing = Smoothing(sigma=1.0, samples=8, tolerance=0.1, scale=(1.0, 1.0))
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="scale has 2 entries for a state of 3"):
        smoothing.perturb(Observation({}, np.zeros(3, dtype=np.float32), None), rng)
    with pytest.raises(ValueError, match="nothing to smooth over"):
        smoothing.perturb(Observation({}, None, "go"), rng)
    with pytest.raises(ValueError, match="finite low and high"):
        smoothing.average(np.zeros((8, 1, 1)), np.array([-np.inf]), HIGH)
    with pytest.raises(ValueError, match="positive sigma and 2 samples"):
        Smoothing(sigma=0.0, samples=8, tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance and confidence"):
        Smoothing(sigma=1.0, samples=8, tolerance=1.0)
    with pytest.raises(ValueError, match="scales must be positive"):
        Smoothing(sigma=1.0, samples=8, tolerance=0.1, images_sigma=-1.0)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_the_bound_of_a_rate_is_scipys(counts, confidence) -> None:
    k, n = counts
    wanted = beta.ppf(1 - confidence, k, n - k + 1) if k else 0.0
    assert binomial_lower(k, n, confidence) == pytest.approx(wanted, abs=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 200), st.floats(0, 2), st.floats(0, 2))
def test_a_larger_budget_certifies_less(successes, budget, more) -> None:
    less = certified_success(successes, 200, budget + more, sigma=1.0)
    assert less <= certified_success(successes, 200, budget, sigma=1.0)
    assert 0 <= less <= successes / 200


@pytest.mark.parametrize("samples", [1, 4])
def test_the_certificate_of_an_episode_holds_against_its_worst_attack_and_is_close_to_it(samples: int) -> None:
    """Success is a sum of all observations above 0; against that, spreading the budget evenly is the worst attack."""
    T, sigma, budget, episodes = 5, 1.0, 0.4, 20_000
    x = 0.7 / np.sqrt(samples)
    noise = np.random.default_rng(0).normal(0, sigma, (episodes, T, samples)).mean(axis=2)
    clean = int(np.count_nonzero((x + noise).sum(axis=1) > 0))
    attacked = np.mean((x - budget / np.sqrt(T) + noise).sum(axis=1) > 0)
    certified = certified_success(clean, episodes, budget, sigma, samples=samples)
    assert attacked - 0.03 < certified <= attacked
    if samples > 1:
        assert certified_success(clean, episodes, budget, sigma) > attacked, "forgetting the copies would be unsound"


def test_a_certificate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 episodes"):
        certified_success(3, 2, 0.1, 1.0)
    with pytest.raises(ValueError, match="certificate needs"):
        certified_success(1, 2, -0.1, 1.0)
