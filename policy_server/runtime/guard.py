"""The last look at a chunk before it leaves for a robot."""

import numpy as np

from policy_models.spec import VectorSpec
from policy_server.errors import NonFiniteActions


class Guard:
    """Holds actions to the limits of their spec."""

    def __init__(self, policy: str, action: VectorSpec) -> None:
        self._policy = policy
        self._limited = bool(action.low or action.high)
        self._low = np.asarray(action.low or [-np.inf] * action.width, dtype=np.float32)
        self._high = np.asarray(action.high or [np.inf] * action.width, dtype=np.float32)

    def check(self, actions: np.ndarray) -> tuple[np.ndarray, int]:
        """Clamp (H, A) actions to their limits; return them and how many numbers were clamped.

        Raises:
            NonFiniteActions: Some are NaN or infinite; no part of such a chunk can be trusted.
        """
        if not np.isfinite(actions).all():
            raise NonFiniteActions(self._policy)
        if not self._limited:
            return actions, 0
        clamped = np.clip(actions, self._low, self._high)
        return clamped, int(np.count_nonzero(clamped != actions))
