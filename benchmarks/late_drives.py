"""One policy driven under a delay, in one of the ways to play chunks that arrive late."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy_client import PolicyClient
from policy_sim.closed_loop import chunk_seed
from policy_sim.episode import held_out_tasks
from policy_sim.late_chunks import (
    AskAhead,
    Infer,
    Observation,
    Player,
    Question,
    StandAndWait,
    disagreements,
    jumps,
    roughness,
)
from policy_sim.late_episode import ArmScene, LateEpisode, MazeScene, Scene, play
from policy_sim.meta_world import MetaWorld
from policy_sim.meta_world_episode import held_out_seeds
from policy_sim.meta_world_tasks import SCENES, TASKS
from policy_sim.point_maze import PointMaze
from policy_sim.success import wilson

TICK_S = 0.05
EXECUTE, EVERY, OFTEN = 8, 4, 2  # control steps
SEED = 0


@dataclass(frozen=True)
class Way:
    """A way of playing chunks that arrive late.

    Attributes:
        name: In tables and pictures.
        continuity: What the server is asked to do.
        stands: Whether the robot stands while it waits.
        often: Whether it asks on time although answers are still on their way.
    """

    name: str
    continuity: str | Mapping[str, Any] = "replace"
    stands: bool = False
    often: bool = False

    def player(self, infer: Infer, scene: Scene, delay: int) -> Player:
        """Return what plays one episode."""
        if self.stands:
            return StandAndWait(infer, scene.rest, delay=delay, execute=EXECUTE)
        every = OFTEN if self.often else max(EVERY, delay)
        return AskAhead(infer, scene.rest, delay=delay, every=every)


STAND, NAIVE, RTC = Way("stand and wait", stands=True), Way("naive"), Way("real-time chunking", "rtc")
ENSEMBLE, WARM = Way("temporal ensembling", "ensemble"), Way("warm start", {"mode": "warm", "steps": 2})
RTC_OFTEN = Way("real-time chunking, asked often", "rtc", often=True)


@dataclass(frozen=True)
class Course:
    """What one policy is driven through.

    Attributes:
        policy: Its name.
        delays: In control steps.
        ways: Those that are compared.
        episodes: How many there are.
        begin: Makes their scenes, given how many.
    """

    policy: str
    delays: tuple[int, ...]
    ways: tuple[Way, ...]
    episodes: int
    begin: Callable[[int], Iterator[Scene]]


def maze_scenes(count: int) -> Iterator[Scene]:
    """Begin one held-out drive after the other."""
    env = PointMaze()
    return (MazeScene(env, task) for task in held_out_tasks(count, SEED))


def arm_scenes(count: int) -> Iterator[Scene]:
    """Begin held-out scenes, `count` in all, with both instructions of each."""
    per_task = max(1, count // len(TASKS))
    for name, scene in SCENES.items():
        with MetaWorld(name) as world:
            for task in scene.tasks:
                words = TASKS[task].phrases
                for number, seed in enumerate(held_out_seeds(per_task)):
                    yield ArmScene(world, task, words[number % len(words)], seed)


COURSES = (
    Course("point-maze", (0, 2, 4, 8), (STAND, NAIVE, ENSEMBLE, WARM, RTC_OFTEN, RTC), 200, maze_scenes),
    Course("meta-world", (0, 2, 4), (STAND, NAIVE, RTC_OFTEN, RTC), 30, arm_scenes),
)


@dataclass(frozen=True)
class Cell:
    """What came of one policy, played in one way under one delay."""

    policy: str
    way: Way
    delay: int
    episodes: Sequence[LateEpisode]

    @property
    def delay_ms(self) -> float:
        """The delay, as long as it is at 20 Hz."""
        return 1e3 * TICK_S * self.delay

    @property
    def success(self) -> float:
        """Part of the episodes that succeeded."""
        return float(np.mean([e.succeeded for e in self.episodes]))

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return wilson(sum(e.succeeded for e in self.episodes), len(self.episodes))

    @property
    def jumps(self) -> list[list[float]]:
        """Jumps of each episode that had any."""
        return [found for e in self.episodes if (found := jumps(e.record))]

    @property
    def disagreements(self) -> list[list[float]]:
        """Disagreements of each episode that had any."""
        return [found for e in self.episodes if (found := disagreements(e.record))]

    @property
    def roughness(self) -> float:
        """Of a mean episode, units per s^2."""
        return float(np.mean([roughness(e.record, TICK_S) for e in self.episodes]))


def drive_late(url: str, course: Course, way: Way, delay: int, episodes: int) -> Cell:
    """Drive a course's policy, served at `url`, through so many episodes in one way under one delay."""
    played: list[LateEpisode] = []
    with PolicyClient(f"{url}/v1/policies/{course.policy}/openpi") as client:
        for number, scene in enumerate(course.begin(episodes)):
            client.reset()
            played.append(play(scene, way.player(served(client, way, number), scene, delay)))
    return Cell(course.policy, way, delay, played)


def served(client: PolicyClient, way: Way, episode: int) -> Infer:
    """Answer one episode's questions through a client: what is asked n-th has the same seed whatever the way.

    To the server a control step is as long as the policy says, however long the delay takes it to be.
    """
    step_ms = 1e3 * float(client.metadata["step_s"])
    asked = -1

    def infer(observation: Observation, question: Question) -> np.ndarray:
        nonlocal asked
        asked += 1
        return client.infer(
            observation,
            seed=chunk_seed(episode, asked),
            continuity=way.continuity,
            captured_ms=step_ms * question.tick,
            delay_ms=step_ms * question.delay,
        ).actions

    return infer
