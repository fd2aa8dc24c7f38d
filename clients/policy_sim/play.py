"""Play data: the expert drives from goal to goal while noise and kicks push it off its path."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policy_sim.expert import WaypointExpert
from policy_sim.point_maze import PointMaze, place_in

logger = logging.getLogger(__name__)

_PLAY_STREAM = 1009  # set before the seed; held-out tasks use another number, so the two never meet


@dataclass(frozen=True)
class Disturbance:
    """How the executed action departs from the intended one, so that the data shows the way back to the path."""

    noise_std: float = 0.05  # Gaussian, on every action
    kick_probability: float = 0.01  # of a kick beginning, per step
    kick_force: tuple[float, float] = (0.4, 1.0)  # least and most; the direction is uniform
    kick_steps: tuple[int, int] = (1, 3)  # least and most; a kick replaces the intended action


@dataclass(frozen=True)
class GoalChanges:
    """When the expert is given its next goal."""

    dwell_steps: tuple[int, int] = (15, 30)  # least and most after a goal is reached; stopping takes about 15
    abandon_probability: float = 0.002  # per step on the way, so that some drives begin at speed


DISTURBANCE = Disturbance()
GOAL_CHANGES = GoalChanges()


def collect(
    episodes: int,
    seed: int,
    *,
    length_steps: int = 600,
    disturbance: Disturbance = DISTURBANCE,
    goal_changes: GoalChanges = GOAL_CHANGES,
) -> dict[str, np.ndarray]:
    """Drive N = `episodes` episodes of L = `length_steps` control steps, each with several goals in turn.

    Goals are drawn evenly over the free cells, near their centres, as gymnasium-robotics does. The same arguments give
    the same data.

    Returns:
        states: (N, L, 4) float32, before the action of the same index: x m, y m, vx m/s, vy m/s.
        executed: (N, L, 2) float32, the action that moved the ball: the intended one with noise, clipped to [-1, 1],
            or a kick.
        intended: (N, L, 2) float32, the action the expert chose in that state. Learn from this one.
        goals: (N, L, 2) float32 metres, the goal being pursued at that step. It changes within an episode, so a chunk
            of actions must not reach past a change.
        reached: (N, L) bool, whether the ball was within 0.45 m of that goal.
        kicked: (N, L) bool, whether a kick replaced the intended action. Intended actions after a kick answer it, so a
            chunk of actions with a kick inside holds what nobody could have foreseen at its first step.
    """
    maze = PointMaze()
    shape = (episodes, length_steps)
    play = {
        "states": np.zeros((*shape, 4), dtype=np.float32),
        "executed": np.zeros((*shape, 2), dtype=np.float32),
        "intended": np.zeros((*shape, 2), dtype=np.float32),
        "goals": np.zeros((*shape, 2), dtype=np.float32),
        "reached": np.zeros(shape, dtype=np.bool_),
        "kicked": np.zeros(shape, dtype=np.bool_),
    }
    for episode in tqdm(range(episodes), desc="play", unit="episode"):
        rng = np.random.default_rng([_PLAY_STREAM, seed, episode])
        _drive(maze, rng, disturbance, goal_changes, {name: array[episode] for name, array in play.items()})
    return play


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect play data and save it as a compressed .npz file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--episodes", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    play = collect(options.episodes, options.seed)
    np.savez_compressed(options.out, allow_pickle=False, **play)
    logger.info("%d control steps saved to %s", play["reached"].size, options.out)


def _drive(
    maze: PointMaze,
    rng: np.random.Generator,
    disturbance: Disturbance,
    goal_changes: GoalChanges,
    episode: dict[str, np.ndarray],
) -> None:
    """Fill one episode's arrays, (L, ...) each."""
    expert = WaypointExpert(maze.grid, seed=int(rng.integers(2**32)))
    pushes = _pushes(rng, disturbance)
    state = maze.reset(int(rng.integers(2**32)))
    steps_to_stay: int | None = None  # None until the goal is reached for the first time
    for step in range(len(episode["states"])):
        abandoned = steps_to_stay is None and rng.random() < goal_changes.abandon_probability
        if abandoned or steps_to_stay == 0:
            cell = maze.grid.free[rng.integers(len(maze.grid.free))]
            maze.goal, steps_to_stay = place_in(maze.grid, cell, rng), None
        reached = maze.reached
        if steps_to_stay is not None:
            steps_to_stay -= 1
        elif reached:
            steps_to_stay = _between(goal_changes.dwell_steps, rng)

        intended = expert.act(state, maze.goal)
        noise, kick = next(pushes)
        executed = np.clip(intended + noise, -1.0, 1.0) if kick is None else kick

        episode["states"][step] = state
        episode["executed"][step] = executed
        episode["intended"][step] = intended
        episode["goals"][step] = maze.goal
        episode["reached"][step] = reached
        episode["kicked"][step] = kick is not None
        state = maze.step(executed)


def _pushes(rng: np.random.Generator, disturbance: Disturbance) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield, for each step, the noise on the action and the kick that replaces it, (2,) each, or None for no kick."""
    kick: np.ndarray | None = None
    steps_left = 0
    while True:
        if steps_left > 0:
            steps_left -= 1
        elif rng.random() < disturbance.kick_probability:
            angle_rad, force = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(*disturbance.kick_force)
            kick = force * np.array([np.cos(angle_rad), np.sin(angle_rad)], dtype=np.float32)
            steps_left = _between(disturbance.kick_steps, rng) - 1
        else:
            kick = None
        yield rng.normal(0.0, disturbance.noise_std, size=2), kick


def _between(bounds: tuple[int, int], rng: np.random.Generator) -> int:
    least, most = bounds
    return int(rng.integers(least, most + 1))


if __name__ == "__main__":
    main()
