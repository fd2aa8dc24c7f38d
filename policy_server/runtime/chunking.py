"""The chunk that leaves for a robot."""

from dataclasses import dataclass

import numpy as np

from policy_server.runtime.continuity import Joint
from policy_server.runtime.guard import GuardReport
from policy_server.runtime.thinking import Thought


@dataclass(frozen=True)
class ActionChunk:
    """A run of future actions predicted from one observation.

    Attributes:
        actions: (H, A) float32, in the robot's own units.
        step_s: Time between consecutive actions.
        seed: What the random draws were seeded with.
        guard: What the guard did to it.
        infer_ms: Inference, with the wait for its turn.
        joint: How it goes on from the chunk before.
        thought: What it acts on; None for policies that do not reason.
        radius: Of smoothing, see `smoothing.Smoothed`; None for a chunk that is not smoothed.
        engine: Name of what computed it.
        version: The publisher's version of the policy that answered.
    """

    actions: np.ndarray
    step_s: float
    seed: int
    guard: GuardReport
    infer_ms: float
    engine: str
    version: str
    joint: Joint
    radius: float | None = None
    thought: Thought | None = None
