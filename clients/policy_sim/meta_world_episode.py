"""One episode in Meta-World under any policy that sees two cameras and an instruction."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from policy_sim.meta_world import ACTION_WIDTH, MetaWorld
from policy_sim.meta_world_demos import FIRST_HELD_OUT_SEED
from policy_sim.meta_world_tasks import TASKS

LIMIT_STEPS = 200  # the slowest expert needs 72 on average and has never needed 90
PLAY_STEPS = 8

Images = Mapping[str, np.ndarray]  # camera -> (size_px, size_px, 3) uint8
Policy = Callable[[Images, str], np.ndarray]  # (images, instruction) -> actions (H, 4)


@dataclass(frozen=True)
class Episode:
    """What happened after an instruction."""

    scene: str
    seed: int
    instruction: str
    steps: int
    done_at: Mapping[str, int]  # task -> control step after which it was first done; tasks never done are left out
    actions: np.ndarray  # (steps, 4) float32, as the policy gave them
    frames: tuple[Images, ...]  # at the beginning of each chunk and the end; empty unless asked for

    def succeeded(self, task: str) -> bool:
        """Whether Meta-World's criterion for `task` was met at any step."""
        return task in self.done_at


def run_episode(
    world: MetaWorld,
    policy: Policy,
    *,
    instruction: str,
    seed: int,
    play_steps: int = PLAY_STEPS,
    limit_steps: int = LIMIT_STEPS,
    keep_frames: bool = False,
) -> Episode:
    """Play the beginnings of chunks until either task of the scene is done or the limit is hit.

    Which task that is tells whether the instruction was followed: a policy that does not listen ends half its episodes
    with the other one.

    Args:
        world: A scene; it is reset first.
        policy: Shown the images and the instruction at the beginning of each chunk.
        instruction: Any words; `TASKS` has those of each task.
        seed: Of the scene. `held_out_seeds` gives those that no demonstration began with.
        play_steps: Actions played of each chunk, at most; the rest is dropped.
        limit_steps: Control steps after which the episode has failed.
        keep_frames: Whether the images are kept, for pictures.

    Raises:
        ValueError: The policy gave something other than a chunk of finite actions, (H, 4).
    """
    world.reset(seed)
    actions: list[np.ndarray] = []
    frames: list[Images] = []
    done: frozenset[str] = frozenset()
    while not done and len(actions) < limit_steps:
        images = world.render()
        if keep_frames:
            frames.append(images)
        chunk = np.asarray(policy(images, instruction), dtype=np.float32)
        if chunk.ndim != 2 or chunk.shape[0] == 0 or chunk.shape[1] != ACTION_WIDTH:
            raise ValueError(f"chunk has shape {chunk.shape}, expected (H, {ACTION_WIDTH})")
        for action in chunk[: min(play_steps, limit_steps - len(actions))]:
            actions.append(action)
            done = world.step(action)
            if done:
                break
    if keep_frames:
        frames.append(world.render())
    return Episode(
        scene=world.scene.name,
        seed=seed,
        instruction=instruction,
        steps=len(actions),
        done_at=dict.fromkeys(done, len(actions)),
        actions=np.stack(actions) if actions else np.zeros((0, ACTION_WIDTH), dtype=np.float32),
        frames=tuple(frames),
    )


def held_out_seeds(count: int) -> range:
    """Return seeds of scenes that no demonstration began with, the same ones for every task."""
    return range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count)


def expert_policy(world: MetaWorld) -> Policy:
    """Return the scripted experts as a policy: the ceiling over every comparison.

    It reads the state of `world` instead of the images, and plans one action at a time. It knows the phrases in `TASKS`
    and raises KeyError for other words.
    """
    task_of = {phrase: task.name for task in TASKS.values() for phrase in (*task.phrases, *task.held_out_phrases)}

    def act(images: Images, instruction: str) -> np.ndarray:
        return world.expert_action(task_of[instruction])[None]

    return act


def random_policy(seed: int, *, hold_steps: int = PLAY_STEPS) -> Policy:
    """Return a policy that pushes in a random direction for a chunk at a time: the floor under every comparison."""
    rng = np.random.default_rng(seed)

    def act(images: Images, instruction: str) -> np.ndarray:
        return np.tile(rng.uniform(-1.0, 1.0, size=ACTION_WIDTH).astype(np.float32), (hold_steps, 1))

    return act
