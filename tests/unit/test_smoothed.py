"""Answers that are the mean over noisy copies of an observation."""

import asyncio

import numpy as np
import pytest

from policy_models.program import Outcome
from policy_models.spec import Observation, PolicySpec, VectorSpec
from policy_server.errors import InvalidOption, Overloaded
from policy_server.runtime.options import SmoothingOptions, read_options
from policy_server.runtime.smoothed import answer

STATE = VectorSpec(("x", "y"), ("m", "m"))


def spec_of(low: tuple[float, ...] = (-1.0,), high: tuple[float, ...] = (1.0,)) -> PolicySpec:
    return PolicySpec(action=VectorSpec(("u",), ("N",), low, high), state=STATE, horizon=2, step_s=0.1)


SPEC = spec_of()
SEEN = Observation({}, np.float32([0.3, -0.2]), None)


class Policy:
    """Answers with the first number of the state; notes what it saw, and how many were asked at once."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[Observation] = []
        self.at_once = 0
        self._running = 0
        self._fails_at = fails_at

    async def __call__(self, observation: Observation) -> Outcome:
        place = len(self.seen)
        self.seen.append(observation)
        self._running += 1
        self.at_once = max(self.at_once, self._running)
        await asyncio.sleep(0)
        self._running -= 1
        if place == self._fails_at:
            raise Overloaded(9)
        assert observation.state is not None
        return Outcome(np.full((2, 1), observation.state[0], np.float32), {"copy": np.array([place])})


def states(policy: Policy) -> np.ndarray:
    return np.array([observation.state for observation in policy.seen])


async def test_without_smoothing_the_observation_is_answered_as_it_is() -> None:
    policy = Policy()
    outcome, radius = await answer(SEEN, policy, None, 7, SPEC)
    assert policy.seen == [SEEN]
    assert radius is None
    assert outcome.actions.tolist() == np.full((2, 1), np.float32(0.3)).tolist()


async def test_the_answer_is_the_mean_over_copies_that_run_side_by_side() -> None:
    policy = Policy()
    outcome, radius = await answer(SEEN, policy, SmoothingOptions(sigma=0.1, samples=50), 7, SPEC)
    assert policy.at_once == 50, "copies that wait for each other share no batch"
    np.testing.assert_allclose(outcome.actions, states(policy)[:, 0].mean(), atol=1e-5)
    np.testing.assert_allclose(states(policy).std(axis=0), 0.1, rtol=0.4)
    assert radius is not None and radius >= 0
    assert outcome.memory["copy"] == 0, "the first copy's"


async def test_the_same_seed_makes_the_same_copies() -> None:
    one, same, other = Policy(), Policy(), Policy()
    options = SmoothingOptions(sigma=0.1, samples=4)
    for policy, seed in ((one, 7), (same, 7), (other, 8)):
        await answer(SEEN, policy, options, seed, SPEC)
    np.testing.assert_array_equal(states(one), states(same))
    assert (states(one) != states(other)).all()


async def test_an_error_of_one_copy_comes_back_as_itself() -> None:
    policy = Policy(fails_at=2)
    with pytest.raises(Overloaded, match="9 requests already wait"):
        await answer(SEEN, policy, SmoothingOptions(sigma=0.1, samples=4), 7, SPEC)
    assert len(policy.seen) == 4


async def test_giving_up_gives_up_every_copy() -> None:
    given_up = []

    async def forever(observation: Observation) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.append(observation)
        raise AssertionError

    waiting = asyncio.create_task(answer(SEEN, forever, SmoothingOptions(sigma=0.1, samples=5), 7, SPEC))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert len(given_up) == 5


async def test_numbers_that_are_not_finite_are_left_for_the_guard() -> None:
    async def broken(observation: Observation) -> Outcome:
        return Outcome(np.full((2, 1), np.nan, np.float32), {})

    outcome, radius = await answer(SEEN, broken, SmoothingOptions(sigma=0.1, samples=4), 7, SPEC)
    assert np.isnan(outcome.actions).all()
    assert radius == 0


@pytest.mark.parametrize(
    ("spec", "options", "seen", "message"),
    [
        (spec_of((), ()), {}, SEEN, "needs a policy whose actions have limits; this one's have none"),
        (spec_of((-np.inf,), (1.0,)), {}, SEEN, "options.smoothing.*finite low and high"),
        (spec_of((1.0,), (1.0,)), {}, SEEN, "options.smoothing.*low below high"),
        (SPEC, {"scale": (1.0,)}, SEEN, "scale has 1 entries for a state of 2"),
        (SPEC, {}, Observation({"top": np.zeros((4, 4, 3), np.uint8)}, None, None), "there is nothing to smooth over"),
        (SPEC, {"images_sigma": 5.0}, Observation({}, None, None), "there is nothing to smooth over"),
    ],
    ids=["no limits", "endless limits", "equal limits", "scale", "images alone", "no images"],
)
async def test_what_cannot_be_smoothed_is_the_clients_mistake_and_is_not_computed(
    spec: PolicySpec, options: dict, seen: Observation, message: str
) -> None:
    policy = Policy()
    with pytest.raises(InvalidOption, match=message):
        await answer(seen, policy, SmoothingOptions(sigma=0.1, **options), 7, spec)
    assert policy.seen == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "options.smoothing.sigma"),
        ({"sigma": 0}, "options.smoothing.sigma"),
        ({"sigma": float("inf")}, "options.smoothing.sigma"),
        ({"sigma": 0.1, "samples": 1}, "options.smoothing.samples"),
        ({"sigma": 0.1, "samples": 10**6}, "options.smoothing.samples"),
        ({"sigma": 0.1, "tolerance": 1.0}, "options.smoothing.tolerance"),
        ({"sigma": 0.1, "confidence": 0.0}, "options.smoothing.confidence"),
        ({"sigma": 0.1, "scale": [1.0, -1.0]}, "options.smoothing.scale.1"),
        ({"sigma": 0.1, "images_sigma": 0}, "options.smoothing.images_sigma"),
        ({"sigma": 0.1, "copies": 3}, "options.smoothing.copies"),
        (3, "options.smoothing"),
    ],
)
def test_options_out_of_range_are_named(raw, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        read_options({"smoothing": raw})
