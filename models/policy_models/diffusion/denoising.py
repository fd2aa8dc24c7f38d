"""From noise to a chunk: the sampler loop that diffusion policies share, over graph calls."""

from collections.abc import Callable, Generator

import numpy as np

from policy_models.diffusion.continuity import Pull
from policy_models.diffusion.guidance import combine, shares
from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import Sigmas
from policy_models.program import GraphCall, Tensors
from policy_models.spec import Continuation

Ask = Callable[[np.ndarray, float], GraphCall]


def denoise(
    x: np.ndarray,
    sigmas: Sigmas,
    noise: Callable[[], np.ndarray],
    *,
    sampler: str,
    guidance: float,
    ask: Ask,
    pull: Pull | None = None,
) -> Generator[GraphCall, Tensors, np.ndarray]:
    """Walk `x` down `sigmas` and return the clean actions, (1, rows, A).

    Args:
        x: Noise scaled to sigmas[0], (1, rows, A).
        sigmas: Noise levels, highest first.
        noise: Draws standard normal noise shaped like x.
        sampler: A name from `SAMPLERS`.
        guidance: Classifier-free guidance lambda.
        ask: Returns the call of the denoiser for x at a level, with the rows of `guided_goals`.
        pull: Towards the chunk being played.
    """
    steps = SAMPLERS[sampler](x, sigmas, noise)
    question = next(steps)
    while True:
        noisy, sigma = question
        call = ask(noisy, sigma)
        outputs = yield call
        denoised = combine(outputs["denoised"], guidance)
        if pull is not None:
            denoised = yield from pull.apply(denoised, sigma, call, shares(guidance))
        try:
            question = steps.send(denoised)
        except StopIteration as finished:
            return finished.value


def levels_left(sigmas: Sigmas, continuation: Continuation | None) -> Sigmas:
    """Return the levels that are walked down: the last of `sigmas` if a warm start skips the first, else all."""
    if continuation is None or continuation.warm_steps is None:
        return sigmas
    return sigmas[-1 - continuation.warm_steps :]


def is_warm(continuation: Continuation | None) -> bool:
    """Whether sampling begins from the chunk being played instead of from noise alone."""
    return continuation is not None and continuation.warm_steps is not None


def noise_part(continuation: Continuation | None) -> float:
    """Return what part of the first noise sampling begins with."""
    return 1.0 if continuation is None else continuation.noise
