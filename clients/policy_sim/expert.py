"""The scripted driver: a random near-shortest route through the maze, tracked by a PD controller."""

import math

import numpy as np

from policy_sim.grid import MazeGrid, Route
from policy_sim.path import SmoothPath
from policy_sim.point_maze import BALL_MASS_KG, FULL_FORCE_N, STEP_S

ROUTE_SLACK_CELLS = 4

_ACCELERATION_LIMIT_M_S2 = 16.0
_VELOCITY_GAIN_PER_S = 9.0  # a held action turns a velocity error e into e * (1 - gain * STEP_S): stable below 40
_POSITION_GAIN_PER_S = 4.0
_LOOKAHEAD_S = 1.5 * STEP_S  # half a step for the hold, one for the lag of the velocity loop


class WaypointExpert:
    """Drives from wherever the ball is to the goal, and comes to rest there.

    A route is drawn when the goal changes and when the ball has been pushed off the route; between these the expert
    keeps to it, so that demonstrations from one place may part ways but never dither.
    """

    def __init__(self, grid: MazeGrid, *, seed: int, top_speed_m_s: float = 2.5) -> None:
        self.grid = grid
        self.top_speed_m_s = top_speed_m_s
        self.route: Route = ()
        self._rng = np.random.default_rng(seed)
        self._goal: list[float] | None = None
        self._path: SmoothPath | None = None

    def act(self, state: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Return the action for one control step.

        Args:
            state: (x m, y m, vx m/s, vy m/s), (4,).
            goal: Position to come to rest at, (2,) in metres, in a free cell.

        Returns:
            Force along x and y, (2,) float32 in [-1, 1].

        Raises:
            ValueError: `goal` is not in a free cell.
        """
        path = self._path_for(state[:2], goal)
        x_m, y_m, vx_m_s, vy_m_s = state.tolist()
        here_m = path.project(x_m, y_m)
        ahead_m = here_m + math.hypot(vx_m_s, vy_m_s) * _LOOKAHEAD_S
        near_x_m, near_y_m, _, _, _ = path.at(here_m)
        _, _, tangent_x, tangent_y, speed_m_s = path.at(ahead_m)

        wanted_vx_m_s = speed_m_s * tangent_x + _POSITION_GAIN_PER_S * (near_x_m - x_m)
        wanted_vy_m_s = speed_m_s * tangent_y + _POSITION_GAIN_PER_S * (near_y_m - y_m)
        ax_m_s2 = _VELOCITY_GAIN_PER_S * (wanted_vx_m_s - vx_m_s)
        ay_m_s2 = _VELOCITY_GAIN_PER_S * (wanted_vy_m_s - vy_m_s)
        excess = max(1.0, math.hypot(ax_m_s2, ay_m_s2) / _ACCELERATION_LIMIT_M_S2)
        action_per_m_s2 = BALL_MASS_KG / FULL_FORCE_N / excess
        return np.array([ax_m_s2 * action_per_m_s2, ay_m_s2 * action_per_m_s2], dtype=np.float32)

    def _path_for(self, position: np.ndarray, goal: np.ndarray) -> SmoothPath:
        """Return the path being driven, or a new one if the goal has moved or the ball has left the route."""
        cell = self.grid.cell_of(*position.tolist())
        wanted = goal.tolist()
        if self._path is None or wanted != self._goal or not self._path.enter(cell):
            goal_cell = self.grid.cell_of(*wanted)
            if not self.grid.is_free(goal_cell):
                raise ValueError(f"goal is {goal!r}, which is not in a free cell of the maze")
            routes = self.grid.near_shortest_routes(cell, goal_cell, ROUTE_SLACK_CELLS)
            self.route = routes[self._rng.integers(len(routes))]
            self._path = SmoothPath(self.grid, self.route, position, goal, top_speed_m_s=self.top_speed_m_s)
            self._goal = wanted
        return self._path
