"""A force-driven ball in a maze: gymnasium-robotics' PointMaze_Medium-v3 at a control rate of 20 Hz."""

import math
from pathlib import Path

import mujoco
import numpy as np
from gymnasium_robotics.envs.maze.maps import MEDIUM_MAZE
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

from policy_sim.grid import Cell, MazeGrid

STEP_S = 0.05
REACHED_M = 0.45  # gymnasium-robotics counts the goal as reached within this distance
BALL_RADIUS_M = 0.1
BALL_MASS_KG = 1000.0 * 4.0 / 3.0 * math.pi * BALL_RADIUS_M**3
FULL_FORCE_N = 100.0  # of an action of 1
PLACEMENT_NOISE_M = 0.25  # start and goal lie this far from a cell's centre at most, on each axis
GRID = MazeGrid(MEDIUM_MAZE)

_MAX_SPEED_M_S = 5.0  # per axis; gymnasium-robotics clips the velocity here before every physics step


class PointMaze:
    """The maze, its ball and the goal of the moment.

    The physics is the original's, action for action: an action held for one control step equals the same action given
    to `PointMaze_Medium-v3` once for each physics step. Only the Gymnasium wrappers around it are left out.

    State is (x, y) in metres and (vx, vy) in metres per second, (4,) float32. Action is the force on the ball along x
    and y, (2,), in units of 100 N; values outside [-1, 1] are clipped. The ball weighs 4.19 kg, so a full force changes
    its speed by about 1.2 m/s in one control step.
    """

    STEP_S = STEP_S

    def __init__(self) -> None:
        env = PointMazeEnv(maze_map=MEDIUM_MAZE)
        Path(
            env.tmp_xml_file_path
        ).unlink()  # the model is in memory now, and gymnasium-robotics never deletes the file
        self.grid = GRID
        self.goal = np.zeros(2, dtype=np.float32)  # (2,) metres; assign to it to give the ball another goal
        self._env = env  # kept so that MuJoCo's model and data stay alive
        self._model = env.model
        self._data = env.data
        self._position, self._velocity, self._force = env.data.qpos, env.data.qvel, env.data.ctrl
        timestep_s = float(self._model.opt.timestep)
        self._repeats = round(STEP_S / timestep_s)
        assert math.isclose(self._repeats * timestep_s, STEP_S), f"{STEP_S} s is no multiple of {timestep_s} s"
        assert math.isclose(self._model.body_mass[1], BALL_MASS_KG)
        assert self._model.actuator_gear[0, 0] == FULL_FORCE_N
        # Below this speed even a full force in every physics step cannot reach the clip, so it need not be looked at.
        max_gain_m_s = FULL_FORCE_N / BALL_MASS_KG * STEP_S
        self._safe_speed_m_s = _MAX_SPEED_M_S - max_gain_m_s

    @property
    def free_cells(self) -> list[np.ndarray]:
        """Centres of the cells the ball may enter, each (2,) in metres."""
        return [self.grid.centre_of(cell) for cell in self.grid.free]

    @property
    def walls(self) -> list[tuple[float, float, float, float]]:
        """Wall blocks as (left, bottom, width, height) in metres."""
        return self.grid.wall_blocks

    @property
    def state(self) -> np.ndarray:
        """(x m, y m, vx m/s, vy m/s), (4,) float32."""
        return np.array([*self._position, *self._velocity], dtype=np.float32)

    @property
    def reached(self) -> bool:
        """Whether the ball is within 0.45 m of the goal."""
        x_m, y_m = self._position
        return math.hypot(x_m - self.goal[0], y_m - self.goal[1]) < REACHED_M

    def reset(self, seed: int, *, start: np.ndarray | None = None, goal: np.ndarray | None = None) -> np.ndarray:
        """Put the ball at rest at `start` and return the state.

        Args:
            seed: Decides what is not given: start and goal then lie in two different cells, near their centres.
            start: Position of the ball, (2,) in metres.
            goal: Position of the goal, (2,) in metres.

        Returns:
            State, (4,) float32.

        Raises:
            ValueError: `start` or `goal` lies in a wall or outside the maze.
        """
        rng = np.random.default_rng(seed)
        cells = [self.grid.free[index] for index in rng.choice(len(self.grid.free), size=2, replace=False)]
        random_start, random_goal = (place_in(self.grid, cell, rng) for cell in cells)
        start = random_start if start is None else self._checked("start", start)
        goal = random_goal if goal is None else self._checked("goal", goal)

        mujoco.mj_resetData(self._model, self._data)  # also forgets the solver's warm start
        self._position[:] = start
        mujoco.mj_forward(self._model, self._data)
        self.goal = np.asarray(goal, dtype=np.float32)
        return self.state

    def restore(self, state: np.ndarray) -> np.ndarray:
        """Put the ball where it was, moving as it was; the goal stays. Returns the state, (4,) float32."""
        mujoco.mj_resetData(self._model, self._data)
        self._position[:] = self._checked("state", state[:2])
        self._velocity[:] = state[2:]
        mujoco.mj_forward(self._model, self._data)
        return self.state

    def step(self, action: np.ndarray) -> np.ndarray:
        """Hold `action` for one control step and return the state after it.

        Args:
            action: Force along x and y, (2,), clipped to [-1, 1].

        Returns:
            State, (4,) float32.

        Raises:
            ValueError: `action` is not two finite numbers. The ball has not moved.
        """
        if np.shape(action) != (2,) or not (math.isfinite(action[0]) and math.isfinite(action[1])):
            raise ValueError(f"action is {action!r}, expected two finite numbers")
        self._force[0] = min(1.0, max(-1.0, float(action[0])))
        self._force[1] = min(1.0, max(-1.0, float(action[1])))
        vx_m_s, vy_m_s = self._velocity
        if max(abs(vx_m_s), abs(vy_m_s)) < self._safe_speed_m_s:
            mujoco.mj_step(self._model, self._data, self._repeats)
        else:
            for _ in range(self._repeats):
                np.clip(self._velocity, -_MAX_SPEED_M_S, _MAX_SPEED_M_S, out=self._velocity)
                mujoco.mj_step(self._model, self._data)
        return self.state

    def _checked(self, name: str, position: np.ndarray) -> np.ndarray:
        if np.shape(position) != (2,) or not np.isfinite(position).all():
            raise ValueError(f"{name} is {position!r}, expected two finite numbers")
        if not self.grid.is_free(self.grid.cell_of(float(position[0]), float(position[1]))):
            raise ValueError(f"{name} is {position!r}, which is not in a free cell of the maze")
        return position


def place_in(grid: MazeGrid, cell: Cell, rng: np.random.Generator) -> np.ndarray:
    """Draw a position in a cell as gymnasium-robotics does, (2,) float32 in metres."""
    noise_m = rng.uniform(-PLACEMENT_NOISE_M, PLACEMENT_NOISE_M, size=2)
    return (grid.centre_of(cell) + noise_m).astype(np.float32)
