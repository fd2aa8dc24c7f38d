"""Answers one observation, or several copies of it if its chunk is to be smoothed."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from policy_models.program import Outcome
from policy_models.spec import Observation, PolicySpec
from policy_server.errors import InvalidOption
from policy_server.runtime.options import SmoothingOptions
from policy_server.runtime.smoothing import Smoothing, check_range

Infer = Callable[[Observation], Awaitable[Outcome]]


async def answer(
    observation: Observation, infer: Infer, options: SmoothingOptions | None, seed: int, spec: PolicySpec
) -> tuple[Outcome, float | None]:
    """Return the outcome, and the radius of its certificate if it was smoothed.

    All copies are sampled with the same seed, so that they differ by the noise on the observation alone, and share the
    engine's batches. What the session remembers is what the first of them left behind.

    Args:
        observation: What the robot saw.
        infer: Answers one.
        options: None for no smoothing.
        seed: Of the noise.
        spec: The policy's.

    Raises:
        InvalidOption: This policy or this observation cannot be smoothed like that.
    """
    if options is None:
        return await infer(observation), None
    if not (spec.action.low and spec.action.high):
        raise InvalidOption("'options.smoothing' needs a policy whose actions have limits; this one's have none")
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    try:
        check_range(low, high)
        smoothing = Smoothing(**options.model_dump())
        copies = smoothing.perturb(observation, np.random.default_rng(seed))
    except ValueError as error:
        raise InvalidOption(f"'options.smoothing': {error}") from error
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_outcome(infer, copy)) for copy in copies]
    outcomes = [task.result() for task in tasks]
    if errors := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
        raise errors[0]
    chunks = np.stack([outcome.actions for outcome in outcomes if isinstance(outcome, Outcome)])
    smoothed = smoothing.average(chunks, low, high)
    assert isinstance(outcomes[0], Outcome)
    return Outcome(smoothed.actions, outcomes[0].memory), smoothed.radius


async def _outcome(infer: Infer, observation: Observation) -> Outcome | Exception:
    """A group of tasks would wrap an error; here each comes back as it is."""
    try:
        return await infer(observation)
    except Exception as error:
        return error
