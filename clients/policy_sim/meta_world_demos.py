"""Demonstrations in Meta-World: scripted experts do six tasks before two cameras while noise pushes them about."""

import argparse
import inspect
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policy_sim.meta_world import ACTION_WIDTH, SIZE_PX, MetaWorld
from policy_sim.meta_world_tasks import TASKS

logger = logging.getLogger(__name__)

CHUNK_STEPS = 16
OBSERVE_EVERY_STEPS = 4
LIMIT_STEPS = 250  # a demonstration that takes longer has failed; without noise none takes 90
FIRST_HELD_OUT_SEED = 2**31  # scenes of demonstrations have smaller seeds, scenes of evaluations this one and larger

_DEMO_STREAM = 4099


@dataclass(frozen=True)
class Noise:
    """How the executed action departs from the recorded one, so that demonstrations show the way back.

    Laskey et al. 2017 (DART): the expert is pushed about while it demonstrates, and what it meant to do is learned. The
    noise wanders, since independent noise of successive steps cancels out before the arm has moved anywhere.
    """

    levels: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)  # standard deviation; each episode draws one of them
    memory: float = 0.9  # correlation of successive steps


@dataclass(frozen=True)
class Settings:
    """What demonstrations are made of."""

    seed: int = 0
    size_px: int = SIZE_PX
    noise: Noise = Noise()
    steps_after_success: int = 8


def collect(episodes_per_task: int, settings: Settings = Settings(), *, jobs: int = 1) -> dict[str, np.ndarray]:
    """Demonstrate every task `episodes_per_task` times; the same settings give the same data.

    The n-th episodes of both tasks of a scene begin alike: their beginnings differ in nothing but the instruction. An
    episode that fails is begun again with other noise.

    Args:
        episodes_per_task: Successful ones, since others are left out.
        settings: What decides the data.
        jobs: Processes to share the work among. They do not change the data.

    Returns:
        Of N observations, one every 4 control steps:
        static, wrist: (N, size_px, size_px, 3) uint8, images.
        actions: (N, 16, 4) float32 in [-1, 1], what the expert chose at this control step and the next 15, along the
            path that noise made it take. Past the end of the episode: no motion, fingers as they were.
        state: (N, 4) float32, hand x, y, z in metres and how far the fingers are apart. Policies that see only images
            leave it alone.
        task: (N,) int64, index into `task_names`.
        episode: (N,) int64, the same for the observations of one episode, in order of time.
        step: (N,) int64, control steps since the beginning of the episode.
        done: (N,) bool, whether the task is done at that step.
        noise: (N,) float32, level of the noise in that episode.
        task_names: names in the order of `task`.
    """
    work = [(name, number) for name in TASKS for number in range(episodes_per_task)]
    demonstrate = partial(_demonstrate, settings)
    parts: list[dict[str, np.ndarray]] = []
    if jobs == 1:
        parts.extend(tqdm(map(demonstrate, work), total=len(work), desc="demonstrations", unit="episode"))
    else:
        # GL contexts do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            results = pool.imap(demonstrate, work, chunksize=max(1, min(20, episodes_per_task // 4)))
            parts.extend(tqdm(results, total=len(work), desc="demonstrations", unit="episode"))
    demos = {}
    for name in list(parts[0]):
        demos[name] = np.concatenate([part.pop(name) for part in parts])
    logger.info("%d observations in %d episodes", len(demos["episode"]), len(work))
    return {**demos, "task_names": np.array(list(TASKS))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect demonstrations of Meta-World tasks and save them as a compressed .npz file.

    Meta-World's scripted experts open and close a drawer, a faucet and a window, each begun half open, while noise
    pushes them about. Two cameras see it every 4 control steps; with each pair of images goes the chunk of the 16
    actions that the expert chose from there on. Only successful episodes are kept. See `collect` for the arrays.

    Example: python -m policy_sim.meta_world_demos -o demos.npz --episodes-per-task 60 --jobs 2
    """
    description = inspect.getdoc(main)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--episodes-per-task", type=int, default=60, help="successful ones (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes; the data stays the same (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other data for another seed (default: %(default)s)")
    parser.add_argument("--size-px", type=int, default=SIZE_PX, help="width of the images (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    settings = Settings(seed=options.seed, size_px=options.size_px)
    demos = collect(options.episodes_per_task, settings, jobs=options.jobs)
    np.savez_compressed(options.out, allow_pickle=False, **demos)
    logger.info("saved to %s, %.0f MB", options.out, options.out.stat().st_size / 1e6)


_world: MetaWorld | None = None  # of this process: loading a scene takes longer than an episode in it


def _world_of(task: str, size_px: int) -> MetaWorld:
    global _world
    scene = TASKS[task].scene
    if _world is None or (_world.scene.name, _world.size_px) != (scene, size_px):
        if _world is not None:
            _world.close()
        _world = MetaWorld(scene, size_px=size_px)
    return _world


def _demonstrate(settings: Settings, task_and_number: tuple[str, int]) -> dict[str, np.ndarray]:
    """Return what the first successful try showed, as `collect` does."""
    task, number = task_and_number
    world = _world_of(task, settings.size_px)
    index = list(TASKS).index(task)
    # The scene's seed knows the episode and not the task; that of the noise knows both.
    scene_seed = int(np.random.default_rng([_DEMO_STREAM, settings.seed, number]).integers(FIRST_HELD_OUT_SEED))
    noise_rng = np.random.default_rng([_DEMO_STREAM, settings.seed, number, index])
    demo = None
    while demo is None:
        world.reset(scene_seed)
        level = float(noise_rng.choice(settings.noise.levels))
        demo = _try(world, task, _wander(noise_rng, level, settings.noise.memory), settings.steps_after_success)
    count = len(demo["step"])
    demo["task"] = np.full(count, index)
    demo["episode"] = np.full(count, index * 10_000 + number)
    demo["noise"] = np.full(count, level, dtype=np.float32)
    return demo


def _try(
    world: MetaWorld, task: str, noise: Iterator[np.ndarray], steps_after_success: int
) -> dict[str, np.ndarray] | None:
    """Return what one episode showed, or None if the task was not done within the limit."""
    images: list[dict[str, np.ndarray]] = []
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    done_at: int | None = None
    while done_at is None or len(actions) < done_at + steps_after_success:
        if len(actions) >= LIMIT_STEPS:
            return None
        if len(actions) % OBSERVE_EVERY_STEPS == 0:
            images.append(world.render())
            states.append(world.state)
        action = world.expert_action(task)
        actions.append(action)
        done = world.step(np.clip(action + next(noise), -1.0, 1.0))
        if done_at is None and task in done:
            done_at = len(actions)
    steps = OBSERVE_EVERY_STEPS * np.arange(len(images))
    rest = np.zeros(ACTION_WIDTH, dtype=np.float32)
    rest[-1] = actions[-1][-1]
    padded = np.stack([*actions, *[rest] * CHUNK_STEPS])
    return {
        "static": np.stack([image["static"] for image in images]),
        "wrist": np.stack([image["wrist"] for image in images]),
        "actions": np.stack([padded[step : step + CHUNK_STEPS] for step in steps]),
        "state": np.stack(states),
        "step": steps,
        "done": steps >= done_at,
    }


def _wander(rng: np.random.Generator, level: float, memory: float) -> Iterator[np.ndarray]:
    """Yield, for each step, the noise on the action, (4,) with standard deviation `level`; the fingers have none."""
    noise = level * rng.normal(size=ACTION_WIDTH)
    while True:
        noise[-1] = 0.0
        yield noise.astype(np.float32)
        noise = memory * noise + np.sqrt(1.0 - memory**2) * level * rng.normal(size=ACTION_WIDTH)


if __name__ == "__main__":
    main()
