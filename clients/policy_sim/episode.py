"""One drive to one goal under any controller, and the tasks that controllers are compared on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from policy_sim.point_maze import GRID, PointMaze, place_in

LIMIT_STEPS = 300  # 15 s; the expert has never needed more than 6 s

Act = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (state (4,), goal (2,)) -> action (2,)

_HELD_OUT_STREAM = 7001  # set before the seed, so that no seed of play collection gives the same stream
_MIN_PATH_CELLS = 4


@dataclass(frozen=True)
class Task:
    """Where an episode begins and where it should end."""

    start: np.ndarray  # (2,) float32 metres
    goal: np.ndarray  # (2,) float32 metres


@dataclass(frozen=True)
class Episode:
    """What happened on the way to a goal."""

    states: np.ndarray  # (steps + 1, 4) float32: before the first action, then after each
    actions: np.ndarray  # (steps, 2) float32, as the controller gave them
    goal: np.ndarray  # (2,) float32 metres
    reached: bool
    steps: int


def run_episode(
    env: PointMaze,
    act: Act,
    *,
    seed: int = 0,
    start: np.ndarray | None = None,
    goal: np.ndarray | None = None,
    limit_steps: int = LIMIT_STEPS,
) -> Episode:
    """Drive until the goal is reached or the limit is hit.

    Args:
        env: The maze; it is reset first.
        act: The controller.
        seed: Decides start and goal where they are not given.
        start: (2,) metres.
        goal: (2,) metres.
        limit_steps: Control steps after which the episode has failed.

    Raises:
        ValueError: `start` or `goal` is not in a free cell, or the controller gave something other than two finite
            numbers.
    """
    states = [env.reset(seed, start=start, goal=goal)]
    actions: list[np.ndarray] = []
    while not env.reached and len(actions) < limit_steps:
        action = np.asarray(act(states[-1], env.goal), dtype=np.float32)
        states.append(env.step(action))
        actions.append(action)
    return Episode(
        states=np.stack(states),
        actions=np.stack(actions) if actions else np.zeros((0, 2), dtype=np.float32),
        goal=env.goal.copy(),
        reached=env.reached,
        steps=len(actions),
    )


def held_out_tasks(count: int, seed: int = 0) -> list[Task]:
    """Draw tasks whose ends are at least 4 cells apart by the shortest route.

    Play data comes from other random streams, so no controller trained on it has seen these starts and goals; it has
    seen the cells they lie in.
    """
    rng = np.random.default_rng([_HELD_OUT_STREAM, seed])
    tasks: list[Task] = []
    while len(tasks) < count:
        start, goal = (GRID.free[index] for index in rng.choice(len(GRID.free), size=2, replace=False))
        if GRID.path_cells(start, goal) >= _MIN_PATH_CELLS:
            tasks.append(Task(start=place_in(GRID, start, rng), goal=place_in(GRID, goal, rng)))
    return tasks


def random_policy(seed: int) -> Act:
    """Return a controller that pushes in a uniformly random way: the floor under every comparison."""
    rng = np.random.default_rng(seed)

    def act(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
        return rng.uniform(-1.0, 1.0, size=2).astype(np.float32)

    return act
