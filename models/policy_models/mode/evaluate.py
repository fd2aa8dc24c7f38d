"""Closed-loop success of language-conditioned policies in Meta-World, whatever answers: engines, experts or chance."""

import argparse
import inspect
import json
import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.runtime.sampling import drive
from policy_sim.meta_world import MetaWorld
from policy_sim.meta_world_episode import (
    Episode,
    Images,
    Policy,
    expert_policy,
    held_out_seeds,
    random_policy,
    run_episode,
)
from policy_sim.meta_world_tasks import SCENES, TASKS, other_task
from policy_sim.success import summary

logger = logging.getLogger(__name__)

DENOISING_STEPS = (1, 3, 5)  # beside the bundle's own number

Results = dict[str, dict[str, Any]]  # task, or "all" -> its summary


class Contestant(Protocol):
    """A way of answering that can be measured; it is sent to other processes, so it must pickle."""

    def __call__(self, world: MetaWorld, seed: int) -> Policy:
        """Return the policy for one episode in `world`; `seed` decides all its random draws."""


@dataclass(frozen=True)
class Served:
    """A bundle as the server runs it: its own program, driven with an engine on one thread.

    Attributes:
        path: The bundle.
        engine: A name from `policy_server.engine.base.ENGINES`.
        steps: Denoising steps; None for the bundle's own.
    """

    path: Path
    engine: str = "onnx"
    steps: int | None = None

    def __call__(self, world: MetaWorld, seed: int) -> Policy:
        """Return the policy for one episode."""
        bundle, engine = _open(self.path, self.engine)
        program = bundle.new_program()
        rng = np.random.default_rng(seed)

        def act(images: Images, instruction: str) -> np.ndarray:
            observation = Observation(images=images, state=None, goal=instruction)
            options = SamplingOptions(seed=int(rng.integers(2**32)), steps=self.steps)
            return drive(program.infer(observation, program.begin(), options), engine).actions

        return act


def expert(world: MetaWorld, seed: int) -> Policy:
    """Return Meta-World's scripted experts, who see the state: the ceiling."""
    return expert_policy(world)


def chance(world: MetaWorld, seed: int) -> Policy:
    """Return random pushes: the floor."""
    return random_policy(seed)


@dataclass(frozen=True)
class Condition:
    """One line of a results table.

    Attributes:
        name: What the line is called.
        contestant: Who answers.
        held_out_words: Whether instructions are phrases that no training has shown, instead of those that it has.
    """

    name: str
    contestant: Contestant
    held_out_words: bool = False


def measure(conditions: Sequence[Condition], episodes: int, *, jobs: int = 1) -> dict[str, Results]:
    """Measure success per task, all conditions from the same beginnings.

    Args:
        conditions: Lines of the table.
        episodes: Of each task.
        jobs: Processes to share the work among; they do not change the results.

    Returns:
        Results by condition. Beside the summary of what was instructed, "other" is the rate at which the scene's other
        task was done instead. Both tasks of a scene begin alike, so the episodes of one task are, at the same time,
        those of the other with the wrong instruction.
    """
    work = [(condition, scene, episodes) for condition in conditions for scene in SCENES]
    bar = tqdm(total=len(work) * 2 * episodes, desc="evaluate", unit="episode")
    played: dict[str, list[tuple[str, Episode]]] = {condition.name: [] for condition in conditions}
    if jobs == 1:
        for unit in work:
            played[unit[0].name] += _play(unit)
            bar.update(2 * episodes)
    else:
        # GL contexts and engines do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for unit, part in zip(work, pool.imap(_play, work, chunksize=1), strict=True):
                played[unit[0].name] += part
                bar.update(2 * episodes)
    bar.close()
    return {name: summarise(pairs) for name, pairs in played.items()}


def play(condition: Condition, scene: str, episodes: int) -> list[tuple[str, Episode]]:
    """Play one condition in one scene: both tasks from the same beginnings, their phrases in turn.

    Returns:
        Episodes, each with the task that was instructed.
    """
    played = []
    with MetaWorld(scene) as world:
        for task in SCENES[scene].tasks:
            words = TASKS[task].held_out_phrases if condition.held_out_words else TASKS[task].phrases
            for number, seed in enumerate(held_out_seeds(episodes)):
                policy = condition.contestant(world, seed)
                instruction = words[number % len(words)]
                played.append((task, run_episode(world, policy, instruction=instruction, seed=seed)))
    return played


def summarise(played: Sequence[tuple[str, Episode]]) -> Results:
    """Return the results of episodes, each with the task that it was instructed to do."""
    results: Results = {}
    for name in [*dict.fromkeys(task for task, _ in played), "all"]:
        of_task = [(task, episode) for task, episode in played if name in (task, "all")]
        steps = [episode.steps for task, episode in of_task if episode.succeeded(task)]
        wrong = sum(episode.succeeded(other_task(task)) for task, episode in of_task)
        results[name] = {**summary(steps, len(of_task)), "other": round(wrong / len(of_task), 4)}
    return results


def conditions_of(bundle: Path, engine: str) -> dict[str, Condition]:
    """Return everything that a model card reports, by name."""
    steps = [Condition(f"{n} step{'s' * (n > 1)}", Served(bundle, engine, n)) for n in DENOISING_STEPS]
    conditions = [
        Condition("instructed", Served(bundle, engine)),
        Condition("other words", Served(bundle, engine), held_out_words=True),
        *steps,
        Condition("expert", expert),
        Condition("chance", chance),
    ]
    return {condition.name: condition for condition in conditions}


def table(results: Mapping[str, Results]) -> str:
    """Return results as a Markdown table: success by task, and over all tasks with its interval."""
    lines = [f"| | {' | '.join(TASKS)} | all (95 %) | other task |", "| --- |" + " --- |" * (len(TASKS) + 2)]
    for name, tasks in results.items():
        cells = [f"{100 * tasks[task]['success']:.0f} %" if task in tasks else "-" for task in TASKS]
        low, high = tasks["all"]["interval_95"]
        overall = f"{100 * tasks['all']['success']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"| {name} | {' | '.join(cells)} | {overall} | {100 * tasks['all']['other']:.1f} % |")
    return "\n".join(lines)


def draw(path: Path, engine: str, folder: Path) -> None:
    """Save pictures of a bundle: its experts over the noise levels, and one episode of each task."""
    from policy_models.mode.pictures import plot_experts
    from policy_models.mode.routing import Routes
    from policy_sim.meta_world_pictures import plot_episodes

    bundle, _ = _open(path, engine)
    assert bundle.spec.sampler is not None, "checked when the bundle was loaded"
    routes = Routes(bundle.config.transformer, bundle.assets.weights)
    plot_experts(routes, bundle.spec.sampler, folder / f"{bundle.name}-experts.png")
    episodes = {}
    seed = held_out_seeds(1)[0]
    for scene in SCENES.values():
        with MetaWorld(scene.name) as world:
            for task in scene.tasks:
                policy = Served(path, engine)(world, seed)
                told = TASKS[task].phrases[1]
                episodes[task] = run_episode(world, policy, instruction=told, seed=seed, keep_frames=True)
    plot_episodes(episodes, folder / f"{bundle.name}-episodes.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure how often a policy does what it is told in Meta-World, and print a table.

    Every line is one condition, every column one task. The last column is how often the other task of the scene was
    done instead: a policy that does not listen would do it as often as the right one. All conditions and all engines
    begin alike and draw the same noise, so lines may be compared episode by episode.

    instructed      the bundle's own settings, phrases from training
    other words     the same, phrases that training has never shown
    1 step ...      other numbers of denoising steps
    expert, chance  Meta-World's scripted experts, and random pushes

    Example: python -m policy_models.mode.evaluate models/zoo/meta-world --engine openvino --episodes 50
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="folder of the policy")
    parser.add_argument("--engine", choices=list(ENGINES), default="onnx", help="default: %(default)s")
    parser.add_argument("--episodes", type=int, default=50, help="of each task (default: %(default)s)")
    parser.add_argument(
        "--conditions", nargs="+", metavar="NAME", default=["instructed"], help='default: instructed; or "all"'
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes; results stay the same (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw experts and episodes into this folder, too"
    )
    options = parser.parse_args(arguments)
    known = conditions_of(options.bundle, options.engine)
    names = list(known) if options.conditions == ["all"] else options.conditions
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no condition is called {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    results = measure([known[name] for name in names], options.episodes, jobs=options.jobs)
    print(table(results))
    if options.json:
        whole = {"engine": options.engine, "episodes_per_task": options.episodes, "conditions": results}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if options.pictures:
        draw(options.bundle, options.engine, options.pictures)


@lru_cache(maxsize=2)
def _open(path: Path, engine: str) -> tuple[Bundle, Engine]:
    bundle = load_bundle(path)
    return bundle, ENGINES[engine].make(bundle, 1)


def _play(unit: tuple[Condition, str, int]) -> list[tuple[str, Episode]]:
    return play(*unit)


if __name__ == "__main__":
    main()
