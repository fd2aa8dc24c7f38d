"""Going on from the chunk that is being played: real-time chunking, for denoisers.

Black, Galliker and Levine 2025 (arXiv:2506.07339, "RTC") inpaint: of the new chunk, the rows that will be played before
it arrives are known, those after them should not stray far from the old plan. They guide a flow with the gradient of
the weighted error (eq. 2 to 4, after Pokle et al. 2023, and Song et al. 2023's PiGDM). Here the same is written for
denoisers D(x, sigma) of the EDM kind. With x = A^tau / tau and sigma = (1 - tau) / tau, their

    v + min(beta, (1 - tau) / (tau r^2)) J_v' W (Y - A)     becomes     D + min(beta sigma, sigma^2 / r^2) J' W (Y - D)

where J = dD/dx, W holds the weights of the rows, Y is the old plan, and r^2 = sigma^2 s^2 / (sigma^2 + s^2) is the
variance of clean actions given x when they have variance s^2 (theirs: 1).
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from policy_models.program import GRADIENT, GraphCall, Tensors

Schedule = Literal["exponential", "linear", "ones", "zeros"]

# s as a part of the deviation of all actions: about what an observation tells of them they vary less. Measured on the
# bundled maze policy, where 0.4 to 0.6 succeeded most often after 200 ms (docs/decisions.md).
SPREAD = 0.6


def prefix_weights(horizon: int, frozen: int, overlap: int, schedule: Schedule) -> np.ndarray:
    """Return the weight of each row, (H,) float32 (RTC, eq. 5; its public code has the other schedules).

    Args:
        horizon: Rows of a chunk, H.
        frozen: Rows that will be played before the new chunk arrives; they weigh 1.
        overlap: Rows from here on weigh 0. Those in between fall from 1 to 0.
        schedule: How they fall; "ones" not at all, "zeros" at once.
    """
    rows = np.arange(horizon)
    if schedule == "zeros":
        weights = (rows < frozen).astype(np.float32)
    elif schedule == "ones":
        weights = np.ones(horizon, dtype=np.float32)
    else:
        fall = max(overlap - frozen, 0) + 1
        weights = np.clip(1 - (rows - frozen + 1) / fall, 0, 1).astype(np.float32)
        if schedule == "exponential":
            weights *= np.expm1(weights) / np.float32(math.e - 1)
    weights[max(overlap, frozen) :] = 0
    return weights


@dataclass(frozen=True, eq=False)
class Pull:
    """Pulls denoised actions towards a plan.

    Attributes:
        plan: Y, normalised, shaped like x: (1, rows, A).
        weights: The diagonal of W, (1, rows, 1).
        strength: beta.
        spread: s, the standard deviation of clean actions about what the observation tells of them.
        gradients: Whether J is the denoiser's Jacobian. Without it J is taken for r^2 / sigma^2, which it is where
            actions are normal with deviation s: each row then moves by its own weighted error, and by no other's.
    """

    plan: np.ndarray
    weights: np.ndarray
    strength: float
    spread: float
    gradients: bool

    def apply(
        self, denoised: np.ndarray, sigma: float, call: GraphCall, shares: np.ndarray
    ) -> Generator[GraphCall, Tensors, np.ndarray]:
        """Return D after the pull, (1, rows, A).

        Args:
            denoised: D, (1, rows, A).
            sigma: Noise level of `call`.
            call: The question that D answers; asked once more, for its gradient, if that is wanted.
            shares: Derivative of D by each row that `call` asks for, (B,): how guidance mixed them.
        """
        error = self.weights * (self.plan - denoised)
        if not self.gradients:
            return denoised + error * np.float32(min(self.strength * sigma, 1.0))
        cotangent = (shares[:, None, None] * error).astype(np.float32)
        answer = yield replace(call, cotangent=cotangent)
        gradient = answer[GRADIENT].sum(axis=0, keepdims=True)
        return denoised + gradient * np.float32(
            min(self.strength * sigma, (sigma**2 + self.spread**2) / self.spread**2)
        )
