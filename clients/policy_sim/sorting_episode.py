"""One sorting task under any policy, with what it said on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policy_sim.sorting import Sorting
from policy_sim.sorting_expert import plan, score_reasoning, think
from policy_sim.sorting_scene import ACTION_WIDTH, TOP_SPEED_M_S, Scene, Task, draw_task, held_out_seeds
from policy_sim.sorting_words import say

CAMERA = "top"
LIMIT_STEPS = 80  # 8 s
PLAY_STEPS = 8


@dataclass(frozen=True)
class Answer:
    """What a policy gives for one observation."""

    actions: np.ndarray  # (H, 3)
    reasoning: str | None = None  # None from a policy that does not say


Policy = Callable[[Mapping[str, Any]], Answer]  # answers an observation, as `observe` makes it
Options = Callable[[Scene], Mapping[str, Any]]  # what a request asks for besides an answer, given the truth


@dataclass(frozen=True)
class Asked:
    """One request: the truth at that moment, and what was said."""

    scene: Scene
    step: int
    reasoning: str | None

    @property
    def right(self) -> bool | None:
        """Whether the reasoning was right; None if there was none."""
        return None if self.reasoning is None else score_reasoning(self.reasoning, self.scene)


@dataclass(frozen=True)
class Episode:
    """What happened after an instruction."""

    task: Task
    succeeded: bool
    steps: int
    asked: Sequence[Asked]
    last: Scene  # where everything is at the end
    frames: Sequence[np.ndarray] = field(default=())  # one for each request and the end; empty unless asked for


def observe(world: Sorting) -> dict[str, Any]:
    """Return what a policy is shown: the camera's image, the state (3,), and the instruction."""
    return {CAMERA: world.render(), "state": world.scene.state, "prompt": world.scene.task.order.instruction}


def run_episode(
    world: Sorting,
    policy: Policy,
    task: Task,
    *,
    options: Options | None = None,
    play_steps: int = PLAY_STEPS,
    limit_steps: int = LIMIT_STEPS,
    keep_frames: bool = False,
) -> Episode:
    """Play the beginnings of chunks until the order is carried out or the limit is hit. The world waits for answers.

    Args:
        world: It is reset first.
        policy: Shown an observation at the beginning of each chunk.
        task: What to do.
        options: What to put into the observation under "options", such as a reasoning to follow.
        play_steps: Actions played of each chunk, at most; the rest is dropped.
        limit_steps: Control steps after which the episode has failed.
        keep_frames: Whether images are kept, for pictures.

    Raises:
        ValueError: The policy gave something other than a chunk of finite actions, (H, 3).
    """
    world.reset(task)
    asked: list[Asked] = []
    frames: list[np.ndarray] = []
    steps = 0
    while not world.scene.done and steps < limit_steps:
        observation = observe(world)
        if options is not None:
            observation["options"] = dict(options(world.scene))
        answer = policy(observation)
        chunk = np.asarray(answer.actions, dtype=np.float32)
        if chunk.ndim != 2 or chunk.shape[0] == 0 or chunk.shape[1] != ACTION_WIDTH:
            raise ValueError(f"chunk has shape {chunk.shape}, expected (H, {ACTION_WIDTH})")
        asked.append(Asked(world.scene, steps, answer.reasoning))
        if keep_frames:
            frames.append(observation[CAMERA])
        for action in chunk[: min(play_steps, limit_steps - steps)]:
            steps += 1
            if world.step(action):
                break
    if keep_frames:
        frames.append(world.render())
    return Episode(task, world.scene.done, steps, asked, world.scene, frames)


def evaluation_tasks(count: int, *, held_out: bool) -> list[Task]:
    """Return tasks that no demonstration began with: of combinations in `HELD_OUT`, or of those in `TRAINED`."""
    return [draw_task(seed, held_out=held_out) for seed in held_out_seeds(count)]


def expert_policy(world: Sorting) -> Policy:
    """Return the scripted expert as a policy: the ceiling. It reads the truth of `world` instead of the image."""

    def answer(observation: Mapping[str, Any]) -> Answer:
        thought = think(world.scene)
        return Answer(plan(world.scene, thought), say(thought))

    return answer


def random_policy(seed: int, *, hold_steps: int = PLAY_STEPS) -> Policy:
    """Return a policy that goes in a random direction, hand open or closed, for a chunk at a time: the floor."""
    rng = np.random.default_rng(seed)

    def answer(observation: Mapping[str, Any]) -> Answer:
        action = rng.uniform(-1.0, 1.0, size=ACTION_WIDTH) * (TOP_SPEED_M_S, TOP_SPEED_M_S, 1.0)
        return Answer(np.tile(action.astype(np.float32), (hold_steps, 1)))

    return answer
