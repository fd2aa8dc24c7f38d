"""Pulling a chunk towards the plan, with a denoiser of which everything is known.

Clean actions are normal: rows correlate, columns are independent, x0 ~ N(mu, Sigma). So D(x, sigma) = mu +
Sigma (Sigma + sigma^2)^-1 (x - mu), its Jacobian is symmetric and constant, and what the free rows should be, given the
frozen ones, is a formula.
"""

import numpy as np
import pytest

from policy_models.diffusion.continuity import Pull, prefix_weights
from policy_models.diffusion.denoising import denoise, is_warm, levels_left
from policy_models.diffusion.guidance import combine, guided_goals, shares
from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import NoiseLevels, exponential, karras
from policy_models.program import GRADIENT, GraphCall
from policy_models.spec import Continuation

H, A, FROZEN = 12, 2, 4
LEVELS = NoiseLevels(0.002, 20.0)


class Normal:
    """The distribution of clean actions; answers calls as a graph would, float64 inside."""

    def __init__(self, length: float = 3.0, *, smooth: bool = True) -> None:
        """Args: length is over how many rows actions correlate; smooth is whether a chunk has no corners."""
        rows = np.arange(H)
        apart = np.abs(rows[:, None] - rows) / length
        self.mu = np.stack((np.sin(rows / 3), np.cos(rows / 5)), axis=1)
        self.Sigma = np.exp(-(apart**2) / 2) + 1e-3 * np.eye(H) if smooth else np.exp(-apart)
        self.calls: list[GraphCall] = []

    def jacobian(self, sigma: float) -> np.ndarray:
        return self.Sigma @ np.linalg.inv(self.Sigma + sigma**2 * np.eye(H))

    def denoise(self, x: np.ndarray, sigma: float) -> np.ndarray:
        return self.mu + self.jacobian(sigma) @ (x - self.mu)

    def ask(self, x: np.ndarray, sigma: float) -> GraphCall:
        return GraphCall("denoise", {"noisy": x, "sigma": np.full(len(x), sigma)})

    def answer(self, call: GraphCall) -> dict[str, np.ndarray]:
        self.calls.append(call)
        sigma = float(call.inputs["sigma"][0])
        answer = {"denoised": self.denoise(call.inputs["noisy"], sigma)}
        return answer if call.cotangent is None else {**answer, GRADIENT: self.jacobian(sigma).T @ call.cotangent}

    def given(self, frozen: np.ndarray) -> np.ndarray:
        """Return E[free rows | frozen rows], (H - FROZEN, A)."""
        known = self.Sigma[:FROZEN, :FROZEN]
        return self.mu[FROZEN:] + self.Sigma[FROZEN:, :FROZEN] @ np.linalg.solve(known, frozen - self.mu[:FROZEN])


def drive(dialogue, answer):
    reply = None
    while True:
        try:
            call = dialogue.send(reply)
        except StopIteration as finished:
            return finished.value
        reply = answer(call)


def plan_of(seed: int, normal: Normal | None = None) -> np.ndarray:
    """A plan that the policy itself could have had, (1, H, A)."""
    normal = normal or Normal()
    return (normal.mu + np.linalg.cholesky(normal.Sigma) @ np.random.default_rng(seed).standard_normal((H, A)))[None]


def pull_to(plan: np.ndarray, *, gradients: bool, schedule="zeros", strength=1e9, spread=1.0) -> Pull:
    weights = prefix_weights(H, FROZEN, FROZEN + 3, schedule)[None, :, None]
    return Pull(plan, weights, strength, spread, gradients)


def sample(normal: Normal, pull: Pull | None, seed: int, *, sampler="ddim", steps=40) -> np.ndarray:
    draw = np.random.default_rng(seed)
    sigmas = karras(steps, LEVELS)
    x = draw.standard_normal((1, H, A)) * sigmas[0]
    return walk(normal, pull, x, sigmas, sampler)


def mean_sample(normal: Normal, pull: Pull | None) -> np.ndarray:
    """Return the mean over all noises: everything is linear, so that is the chunk from none."""
    return walk(normal, pull, np.zeros((1, H, A)), karras(40, LEVELS), "heun")


def walk(normal: Normal, pull: Pull | None, x: np.ndarray, sigmas, sampler: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    dialogue = denoise(
        x,
        sigmas,
        lambda: draw.standard_normal((1, H, A)),
        sampler=sampler,
        guidance=1.0,
        ask=normal.ask,
        pull=pull,
    )
    return drive(dialogue, normal.answer)[0]


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("gradients", [True, False])
def test_frozen_rows_are_those_of_the_plan(sampler: str, gradients: bool) -> None:
    plan = plan_of(0)
    chunk = sample(Normal(), pull_to(plan, gradients=gradients), 1, sampler=sampler)
    np.testing.assert_allclose(chunk[:FROZEN], plan[0, :FROZEN], atol=0.02)


def test_free_rows_move_towards_what_the_frozen_ones_make_likely_and_more_with_gradients() -> None:
    normal, off = Normal(5.0, smooth=False), {True: [], False: [], None: []}
    for seed in range(20):
        plan = plan_of(seed, normal)
        for gradients in off:
            chunk = mean_sample(normal, None if gradients is None else pull_to(plan, gradients=gradients))
            off[gradients].append(np.abs(chunk[FROZEN:] - normal.given(plan[0, :FROZEN])).mean())
    guided, held, alone = (float(np.mean(off[gradients])) for gradients in (True, False, None))
    assert guided < 0.85 * held
    assert guided < 0.65 * alone


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_one_pull_moves_free_rows_towards_their_expectation_and_without_gradients_not_at_all(sigma: float) -> None:
    normal = Normal(5.0, smooth=False)
    # Of clean actions given x, the covariance; and by it, the free rows given x and the frozen rows.
    C = normal.Sigma - normal.jacobian(sigma) @ normal.Sigma
    of_free = np.linalg.solve(C[:FROZEN, :FROZEN], C[:FROZEN, FROZEN:]).T
    off = {True: 0.0, False: 0.0}
    for seed in range(20):
        x0 = plan_of(seed, normal)
        x = x0 + sigma * np.random.default_rng(50 + seed).standard_normal(x0.shape)
        D = normal.denoise(x, sigma)
        wanted = D[0, FROZEN:] + of_free @ (x0 - D)[0, :FROZEN]
        for gradients in off:
            pull = pull_to(x0, gradients=gradients)
            pulled = drive(pull.apply(D, sigma, normal.ask(x, sigma), shares(1.0)), normal.answer)
            off[gradients] += np.abs(pulled[0, FROZEN:] - wanted).sum()
            assert gradients or (pulled[0, FROZEN:] == D[0, FROZEN:]).all()
    assert off[True] < 0.75 * off[False]


def test_with_gradients_the_seam_is_no_rougher_than_the_policys_own_chunks() -> None:
    normal = Normal()
    jumps = {True: [], False: []}
    for seed in range(12):
        for gradients in jumps:
            chunk = sample(normal, pull_to(plan_of(seed), gradients=gradients), 100 + seed)
            jumps[gradients].append(np.abs(chunk[FROZEN] - chunk[FROZEN - 1]).mean())
    own = np.abs(np.diff(np.concatenate([plan_of(seed) for seed in range(50)]), axis=1)).mean()
    assert np.mean(jumps[True]) < 1.5 * own
    assert np.mean(jumps[True]) < 0.5 * np.mean(jumps[False])


def test_rows_that_are_free_and_far_away_are_the_policys_own() -> None:
    normal = Normal(length=0.5)
    plan = plan_of(3)
    with_pull = sample(normal, pull_to(plan, gradients=True), 5)
    np.testing.assert_allclose(with_pull[-3:], sample(normal, None, 5)[-3:], atol=0.02)


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("beta", [0.5, 5.0, 1e9])
def test_a_guided_step_is_that_of_the_papers_flow(tau: float, beta: float) -> None:
    """Black et al. 2025, eq. 2 to 4: one Euler step of the guided flow, and the same step written for D."""
    normal, Y = Normal(), plan_of(2)
    W = prefix_weights(H, FROZEN, H - 2, "exponential")[None, :, None].astype(np.float64)
    A_tau = np.random.default_rng(4).standard_normal((1, H, A))
    sigma = (1 - tau) / tau

    def endpoint(at: np.ndarray) -> np.ndarray:
        """A^1 = A^tau + (1 - tau) v: what the flow takes the clean actions to be."""
        return normal.denoise(at / tau, sigma)

    v = (endpoint(A_tau) - A_tau) / (1 - tau)
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    J = normal.jacobian(sigma) / tau  # of the endpoint by A^tau
    guided_v = v + min(beta, (1 - tau) / (tau * r2)) * (J.T @ (W * (Y - endpoint(A_tau))))
    wanted = A_tau + 0.1 * (1 - tau) * guided_v

    pull = Pull(Y, W, beta, 1.0, gradients=True)
    call = normal.ask(A_tau / tau, sigma)
    dialogue = pull.apply(normal.answer(call)["denoised"], sigma, call, shares(1.0))
    D = drive(dialogue, normal.answer)
    tau_next = tau + 0.1 * (1 - tau)
    sigma_next = (1 - tau_next) / tau_next
    x_next = D + (A_tau / tau - D) * (sigma_next / sigma)
    np.testing.assert_allclose(tau_next * x_next, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 0.4, 2.5])
def test_the_shares_of_guided_rows_are_the_derivative_of_their_mix(guidance: float) -> None:
    rows = len(guided_goals(np.ones((1, 2), np.float32), guidance))
    denoised = np.random.default_rng(0).standard_normal((rows, H, A))
    assert shares(guidance).shape == (rows,)
    for row, share in enumerate(shares(guidance)):
        moved = denoised.copy()
        moved[row] += 1e-3
        slope = (combine(moved, guidance) - combine(denoised, guidance)) / 1e-3
        np.testing.assert_allclose(slope, share, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 0.4, 2.5])
def test_a_pull_through_guidance_follows_the_gradient_of_the_error(guidance: float) -> None:
    """The step is the gradient of -1/2 |sqrt(W) (Y - D)|^2 by x, D the mix of two denoisers, by finite differences."""
    conditional, goal_free, sigma = Normal(3.0), Normal(1.0), 0.7
    rows = {0.0: [goal_free], 1.0: [conditional]}.get(guidance, [conditional, goal_free])
    Y, x = plan_of(5), np.random.default_rng(6).standard_normal((1, H, A))
    W = prefix_weights(H, 3, 8, "linear")[None, :, None].astype(np.float64)

    def mixed(at: np.ndarray) -> np.ndarray:
        return combine(np.concatenate([normal.denoise(at, sigma) for normal in rows]), guidance)

    def answer(call: GraphCall):
        assert call.cotangent is not None and call.cotangent.dtype == np.float32
        gradients = [normal.jacobian(sigma).T @ c for normal, c in zip(rows, call.cotangent, strict=True)]
        return {GRADIENT: np.stack(gradients)}

    pull = Pull(Y, W, 1e9, 0.6, gradients=True)
    call = GraphCall("denoise", {"noisy": np.repeat(x, len(rows), axis=0)})
    step = drive(pull.apply(mixed(x), sigma, call, shares(guidance)), answer) - mixed(x)

    numeric = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ends = []
        for side in (1e-5, -1e-5):
            moved = x.copy()
            moved[place] += side
            ends.append(-0.5 * (W * (Y - mixed(moved)) ** 2).sum())
        numeric[place] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(step, numeric * (sigma**2 + 0.6**2) / 0.6**2, rtol=1e-4, atol=1e-5)


def test_without_gradients_a_pull_asks_nothing_and_each_row_moves_by_its_own_error() -> None:
    denoised, plan = np.zeros((1, H, A)), np.ones((1, H, A))
    pull = pull_to(plan, gradients=False, schedule="linear", strength=2.0)
    for sigma, part in ((10.0, 1.0), (0.5, 1.0), (0.1, 0.2)):
        moved = drive(pull.apply(denoised, sigma, Normal().ask(denoised, sigma), shares(1.0)), answer=None)
        np.testing.assert_allclose(moved, part * pull.weights * plan, rtol=1e-6)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_pull_of_no_weight_or_no_strength_changes_nothing(gradients: bool) -> None:
    plan, alone = plan_of(0), sample(Normal(), None, 3)
    weightless = Pull(plan, np.zeros((1, H, 1)), 1e9, 1.0, gradients)
    np.testing.assert_allclose(sample(Normal(), weightless, 3), alone, atol=1e-9)
    np.testing.assert_allclose(sample(Normal(), pull_to(plan, gradients=gradients, strength=0.0), 3), alone, atol=1e-9)


def test_a_gradient_is_asked_of_the_very_question_that_was_answered() -> None:
    normal = Normal()
    sample(normal, pull_to(plan_of(0), gradients=True), 3, steps=5)
    assert [call.cotangent is None for call in normal.calls] == [True, False] * 5
    for question, gradient in zip(normal.calls[::2], normal.calls[1::2], strict=True):
        assert gradient.inputs is question.inputs
        assert (gradient.graph, gradient.way) == (question.graph, question.way)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_from_a_plan(sampler: str) -> None:
    chunk = sample(Normal(), pull_to(plan_of(1), gradients=True), 2, sampler=sampler, steps=10)
    assert np.isfinite(chunk).all()


def _continuation(warm_steps: int | None) -> Continuation:
    return Continuation(np.zeros((H, A), np.float32), np.zeros(H, np.float32), 0.0, warm_steps=warm_steps)


def test_a_warm_start_walks_down_the_last_levels_alone() -> None:
    sigmas = exponential(10, LEVELS)
    assert levels_left(sigmas, None) is sigmas
    assert levels_left(sigmas, _continuation(None)) is sigmas
    assert levels_left(sigmas, _continuation(2)) == sigmas[8:]
    assert len(levels_left(sigmas, _continuation(2))) == 3, "two steps, three levels"
    assert levels_left(sigmas, _continuation(10)) == sigmas
    assert [is_warm(None), is_warm(_continuation(None)), is_warm(_continuation(1))] == [False, False, True]


def test_a_warm_start_of_more_steps_than_there_are_takes_all() -> None:
    sigmas = exponential(3, LEVELS)
    assert levels_left(sigmas, _continuation(50)) == sigmas
