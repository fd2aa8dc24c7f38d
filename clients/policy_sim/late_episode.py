"""Episodes under players of late chunks, in virtual time: what a tick is worth only the player's delay says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from policy_sim import episode, meta_world_episode
from policy_sim.chunked import maze_observation
from policy_sim.late_chunks import Observation, Player, Record
from policy_sim.meta_world import ACTION_WIDTH, MetaWorld
from policy_sim.point_maze import PointMaze


class Scene(Protocol):
    """A simulator at the beginning of one episode."""

    limit_steps: int  # control steps after which the episode has failed

    @property
    def succeeded(self) -> bool:
        """Whether the task has been done."""

    @property
    def over(self) -> bool:
        """Whether nothing more can come."""

    def observe(self) -> Observation:
        """Return what the policy takes."""

    def rest(self, last: np.ndarray | None) -> np.ndarray:
        """Return the action of a robot that has none and stands, (A,), given its last one."""

    def step(self, action: np.ndarray) -> None:
        """Hold `action`, (A,), for one control step."""


@dataclass(frozen=True)
class LateEpisode:
    """What came of one episode."""

    succeeded: bool
    record: Record

    @property
    def steps(self) -> int:
        """Control steps that it took, stalls among them."""
        return len(self.record.actions)


def play(scene: Scene, player: Player) -> LateEpisode:
    """Play until the scene is over or the limit is hit."""
    while not scene.over and len(player.record.actions) < scene.limit_steps:
        scene.step(player.act(scene.observe))
    return LateEpisode(scene.succeeded, player.record)


class MazeScene:
    """One drive through the maze. A ball without an action gets no force, and rolls on."""

    limit_steps = episode.LIMIT_STEPS

    def __init__(self, env: PointMaze, task: episode.Task) -> None:
        self._env = env
        self._state = env.reset(0, start=task.start, goal=task.goal)

    @property
    def succeeded(self) -> bool:
        """See `Scene`."""
        return self._env.reached

    over = succeeded

    def observe(self) -> Observation:
        """See `Scene`."""
        return maze_observation(self._state, self._env.goal)

    def rest(self, last: np.ndarray | None) -> np.ndarray:
        """See `Scene`."""
        return np.zeros(2, dtype=np.float32)

    def step(self, action: np.ndarray) -> None:
        """See `Scene`."""
        self._state = self._env.step(action)


class ArmScene:
    """One instruction in Meta-World. An arm without an action stays where it is, with its fingers as they are."""

    limit_steps = meta_world_episode.LIMIT_STEPS

    def __init__(self, world: MetaWorld, task: str, instruction: str, seed: int) -> None:
        world.reset(seed)
        self._world, self._task, self._instruction = world, task, instruction
        self._done: frozenset[str] = frozenset()

    @property
    def succeeded(self) -> bool:
        """See `Scene`."""
        return self._task in self._done

    @property
    def over(self) -> bool:
        """See `Scene`; the scene's other task ends it too."""
        return bool(self._done)

    def observe(self) -> Observation:
        """See `Scene`."""
        return {**self._world.render(), "prompt": self._instruction}

    def rest(self, last: np.ndarray | None) -> np.ndarray:
        """See `Scene`."""
        action = np.zeros(ACTION_WIDTH, dtype=np.float32)
        if last is not None:
            action[-1] = last[-1]
        return action

    def step(self, action: np.ndarray) -> None:
        """See `Scene`."""
        self._done = self._world.step(action)


def success_steps(episodes: Sequence[LateEpisode]) -> list[int]:
    """Return the control steps of those that succeeded."""
    return [e.steps for e in episodes if e.succeeded]
