"""The chunk that leaves for a robot."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ActionChunk:
    """A run of future actions predicted from one observation.

    Attributes:
        actions: (H, A) float32, in the robot's own units.
        step_s: Time between consecutive actions.
        seed: What the random draws were seeded with.
        clamped: How many numbers the guard moved to their limit.
        infer_ms: Inference, with the wait for its turn.
        engine: Name of what computed it.
        version: The publisher's version of the policy that answered.
    """

    actions: np.ndarray
    step_s: float
    seed: int
    clamped: int
    infer_ms: float
    engine: str
    version: str
