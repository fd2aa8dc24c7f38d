"""Demonstrations of sorting: a scripted expert says what it thinks and does it while noise pushes it about."""

import argparse
import inspect
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policy_sim.sorting import Sorting
from policy_sim.sorting_camera import SIZE_PX
from policy_sim.sorting_expert import act, plan, think
from policy_sim.sorting_scene import BIN_X_M, FIRST_HELD_OUT_SEED, MOST_THINGS, Scene, Task, draw_task
from policy_sim.sorting_words import BINS, ORDERS, THINGS, THOUGHTS, TRAINED, Thought, say

logger = logging.getLogger(__name__)

LIMIT_STEPS = 200  # a demonstration that takes longer has failed

_MISPLACED_Y_M = (-0.22, 0.22)
_DEMO_STREAM = 5009  # set before the seed


@dataclass(frozen=True)
class Noise:
    """How what is executed departs from what is recorded, so that demonstrations show the way back.

    Laskey et al. 2017 (DART): the expert is pushed about while it demonstrates, and what it meant to do is learned.
    """

    levels_m_s: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15)  # standard deviation; each episode draws one of them
    memory: float = 0.8  # correlation of successive steps
    slip_probability: float = 0.01  # of the hand opening for a step, on each step
    mistake_probability: float = 0.1  # of an episode beginning with a thing where it should not be


@dataclass(frozen=True)
class Settings:
    """What demonstrations are made of."""

    seed: int = 0
    observe_every_steps: int = 2
    size_px: int = SIZE_PX
    noise: Noise = Noise()
    steps_after_success: int = 4


def collect(episodes: int, settings: Settings = Settings(), *, jobs: int = 1) -> dict[str, np.ndarray]:
    """Demonstrate `episodes` tasks of combinations in `TRAINED`; the same settings give the same data.

    Args:
        episodes: Successful ones, E. An episode that fails is begun again with other noise.
        settings: What decides the data.
        jobs: Processes to share the work among. They do not change the data.

    Returns:
        Of N observations:
        image: (N, size_px, size_px, 3) uint8.
        state: (N, 3) float32: hand x m, y m, whether it holds something.
        actions: (N, 16, 3) float32: vx m/s, vy m/s, grip. What carries out the reasoning from here on if nothing
            disturbs it, and then rests.
        reasoning: (N,) int64, index into `reasonings`.
        other_reasoning: (N,) int64, a reasoning that could be carried out too, whatever the order says.
        other_actions: (N, 16, 3) float32, what carries that out.
        things: (N, 3) int64, what is on the table, index into `policy_sim.sorting_words.THINGS`; -1 for nothing.
        places: (N, 3, 2) float32, where that is, x m, y m; zeros for nothing. A teacher may tell; no robot is told.
        instruction: (N,) int64, index into `instructions`.
        step: (N,) int64, control steps since the beginning of the episode.
        done: (N,) bool, whether the order is carried out.
        bounds: (E + 1,) int64: episode e is the observations from bounds[e] to before bounds[e + 1].
        noise: (E,) float32, level of the noise in m/s.
        instructions, reasonings: all sentences of both grammars, in the order of the indices.
    """
    work = range(episodes)
    demonstrate = partial(_demonstrate, settings)
    parts: list[dict[str, np.ndarray]] = []
    if jobs == 1:
        parts.extend(tqdm(map(demonstrate, work), total=episodes, desc="demonstrations", unit="episode"))
    else:
        # GL contexts do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            results = pool.imap(demonstrate, work, chunksize=max(1, min(20, episodes // (4 * jobs))))
            parts.extend(tqdm(results, total=episodes, desc="demonstrations", unit="episode"))
    bounds = np.cumsum([0, *(len(part["step"]) for part in parts)])
    # Popped, so that images are never held twice.
    demos = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    logger.info("%d observations in %d episodes", bounds[-1], episodes)
    return {
        **demos,
        "bounds": bounds,
        "instructions": np.array(list(ORDERS)),
        "reasonings": np.array(list(THOUGHTS)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect demonstrations of sorting and save them as a compressed .npz file.

    A hand over a table puts cubes, balls, rings and bars of four colours into two bins, as an instruction says. A
    scripted expert does it while noise pushes the hand about and opens it; some things begin where they should not be.
    Every second control step (of 0.1 s) one camera sees the table, the expert says in one sentence what it does next,
    and the 16 actions that do it are noted. See `collect` for the arrays. Eight combinations of colour, kind and bin
    never occur (`policy_sim.sorting_words.HELD_OUT`).

    Example: python -m policy_sim.sorting_demos -o demos.npz --episodes 1000 --jobs 2
    """
    parser = argparse.ArgumentParser(
        prog="python -m policy_sim.sorting_demos",
        description=inspect.getdoc(main),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings()
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--episodes", type=int, default=1000, help="successful ones (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes; the data stays the same (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="other data for another one (default: %(default)s)"
    )
    parser.add_argument(
        "--observe-every",
        type=int,
        default=default.observe_every_steps,
        metavar="STEPS",
        help="control steps from one image to the next (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if min(options.episodes, options.jobs, options.observe_every) < 1:
        parser.error("--episodes, --jobs and --observe-every must be positive")
    logging.basicConfig(level=logging.INFO)
    settings = Settings(seed=options.seed, observe_every_steps=options.observe_every)
    demos = collect(options.episodes, settings, jobs=options.jobs)
    np.savez_compressed(options.out, allow_pickle=False, **demos)
    logger.info("saved to %s, %.0f MB", options.out, options.out.stat().st_size / 1e6)


_world: Sorting | None = None  # of this process: a camera takes longer to make than an episode


def _demonstrate(settings: Settings, number: int) -> dict[str, np.ndarray]:
    """Return what the first successful try showed, as `collect` does."""
    global _world
    rng = np.random.default_rng([_DEMO_STREAM, settings.seed, number])
    task = draw_task(int(rng.integers(FIRST_HELD_OUT_SEED)))
    if _world is None or _world.size_px != settings.size_px:
        if _world is not None:
            _world.close()
        _world = Sorting(task, size_px=settings.size_px)
    demo = None
    while demo is None:
        demo = _try(_world, task, settings, rng)
    return demo


def _try(world: Sorting, task: Task, settings: Settings, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    """Return what one episode showed, or None if it took too long."""
    noise = settings.noise
    level_m_s = float(rng.choice(noise.levels_m_s))
    pushes = _wander(rng, level_m_s, noise.memory)
    world.reset(task)
    if rng.random() < noise.mistake_probability:
        world.scene = _mistaken(world.scene, rng)
    instruction = list(ORDERS).index(task.order.instruction)
    sentences = {sentence: i for i, sentence in enumerate(THOUGHTS)}
    rows: list[dict[str, np.ndarray]] = []
    done_at: int | None = None
    step = 0
    while done_at is None or step < done_at + settings.steps_after_success:
        if step >= LIMIT_STEPS:
            return None
        thought = think(world.scene)
        if step % settings.observe_every_steps == 0:
            other = _another(world.scene, thought, rng)
            rows.append(
                {
                    "image": world.render(),
                    "state": world.scene.state,
                    "actions": plan(world.scene, thought),
                    "reasoning": np.array(sentences[say(thought)]),
                    "other_reasoning": np.array(sentences[say(other)]),
                    "other_actions": plan(world.scene, other),
                    **_whereabouts(world.scene),
                    "instruction": np.array(instruction),
                    "step": np.array(step),
                    "done": np.array(world.scene.done),
                }
            )
        action = act(world.scene, thought)
        if done_at is None:
            action[:2] += next(pushes)
            if rng.random() < noise.slip_probability:
                action[2] = -1.0
        world.step(action)
        step += 1
        if done_at is None and world.scene.done:
            done_at = step
    demo = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**demo, "noise": np.array([level_m_s], dtype=np.float32)}


def _whereabouts(scene: Scene) -> dict[str, np.ndarray]:
    """Return what is where, as `collect` does."""
    count = len(scene.places)
    things, places = np.full(MOST_THINGS, -1), np.zeros((MOST_THINGS, 2), dtype=np.float32)
    things[:count] = [THINGS.index(thing) for thing in scene.task.things]
    places[:count] = scene.places
    return {"things": things, "places": places}


def _another(scene: Scene, thought: Thought | None, rng: np.random.Generator) -> Thought | None:
    """Draw a reasoning that could be carried out here and is not the expert's, whatever the order says."""
    whereabouts = {thing: scene.whereabouts(i) for i, thing in enumerate(scene.task.things)}
    others = [
        other
        for other in THOUGHTS.values()
        if other != thought and (other is None or whereabouts.get(other.thing) == other.at)
    ]
    return others[rng.integers(len(others))]


def _mistaken(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with a thing in the hand, or in a bin, where it should not be, if there is such a place.

    None is put where it is never to be brought in training.
    """
    order = scene.task.order
    mistakes = []
    for i, thing in enumerate(scene.task.things):
        before, behind = scene.places[:i], scene.places[i + 1 :]
        if order.bin_of(thing) is None:
            mistakes.append(replace(scene, held=i, closed=True, places=(*before, scene.hand, *behind)))
        for bin_ in BINS:
            if order.bin_of(thing) != bin_ and (thing, bin_) in TRAINED:
                place = (BIN_X_M[bin_], float(rng.uniform(*_MISPLACED_Y_M)))
                mistakes.append(replace(scene, places=(*before, place, *behind)))
    return mistakes[rng.integers(len(mistakes))] if mistakes else scene


def _wander(rng: np.random.Generator, level_m_s: float, memory: float) -> Iterator[np.ndarray]:
    """Yield, for each step, what is added to the velocity, (2,) with standard deviation `level_m_s`."""
    push = level_m_s * rng.normal(size=2)
    while True:
        yield push.astype(np.float32)
        push = memory * push + np.sqrt(1.0 - memory**2) * level_m_s * rng.normal(size=2)


if __name__ == "__main__":
    main()
