"""The point maze, evaluated: does the ball reach held-out goals, and how fast?"""

import numpy as np

from policy_client import PolicyClient
from policy_sim.chunked import ChunkedController
from policy_sim.closed_loop import ours
from policy_sim.episode import held_out_tasks, run_episode
from policy_sim.point_maze import STEP_S, PointMaze
from policy_sim.trial import TrialResult

_PLAY_STEPS = 8


class PointMazeTrial:
    """Drives from held-out starts to held-out goals."""

    def __init__(self) -> None:
        self._env = PointMaze()

    def run(self, client: PolicyClient, seed: int) -> TrialResult:
        """Drive to one goal."""
        (task,) = held_out_tasks(1, seed)
        controller = ChunkedController(ours(client, seed), execute=_PLAY_STEPS)
        episode = run_episode(self._env, controller, start=task.start, goal=task.goal)
        path = episode.states[:, :2]
        measures = {}
        if episode.reached:
            measures["time_s"] = STEP_S * episode.steps
            measures["path_m"] = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
        return TrialResult(seed, "goal", episode.reached, measures, path)

    def close(self) -> None:
        """There is nothing to free."""
