"""Playing action chunks in closed loop, as openpi's chunk broker does: ask, play the first actions, ask again."""

import time
from collections.abc import Callable

import numpy as np

Infer = Callable[[dict[str, np.ndarray]], np.ndarray]  # observation -> (H, A) actions


class ChunkedController:
    """An `Act` that plays the first actions of every chunk before it asks for the next one.

    Attributes:
        chunks: Every chunk that was asked for, (H, 2) each, with the control step of its observation.
        waits_ms: How long each of them was waited for.
    """

    def __init__(self, infer: Infer, *, execute: int) -> None:
        """Args: infer answers an observation with (H, 2) actions; execute is how many of them are played."""
        self._infer = infer
        self._execute = execute
        self._chunk = np.zeros((0, 2), dtype=np.float32)
        self._played = 0
        self._step = 0
        self.chunks: list[tuple[int, np.ndarray]] = []
        self.waits_ms: list[float] = []

    def __call__(self, state: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Return the action due now, (2,)."""
        if self._played == min(self._execute, len(self._chunk)):
            asked_at_s = time.perf_counter()
            self._chunk = self._infer(maze_observation(state, goal))
            self.waits_ms.append(1e3 * (time.perf_counter() - asked_at_s))
            self._played = 0
            self.chunks.append((self._step, self._chunk))
        action: np.ndarray = self._chunk[self._played]
        self._played += 1
        self._step += 1
        return action


def maze_observation(state: np.ndarray, goal: np.ndarray) -> dict[str, np.ndarray]:
    """Return the observation that the point-maze policies take: a state (4,), and a goal at rest as a state (4,)."""
    return {"state": state.astype(np.float32), "goal": np.array([*goal, 0.0, 0.0], dtype=np.float32)}
