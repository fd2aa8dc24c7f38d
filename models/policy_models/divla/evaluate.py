"""How well a DiVLA sorts, how often what it says is right, and whether it does what is said."""

import argparse
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from policy_models.divla.program import DivlaProgram
from policy_models.program import Outcome
from policy_models.spec import Observation, Reasoning, SamplingOptions
from policy_server.bundle import load_bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.runtime.sampling import resume
from policy_sim.sorting import Sorting
from policy_sim.sorting_episode import CAMERA, Answer, Episode, Policy, evaluation_tasks, run_episode
from policy_sim.sorting_expert import think, wrong_reasoning
from policy_sim.sorting_scene import Scene
from policy_sim.sorting_words import THOUGHTS, Thought, say
from policy_sim.success import summary


@dataclass(frozen=True)
class Pupil:
    """A bundle as the server runs it."""

    program: DivlaProgram
    engine: Engine

    def drive(self, dialogue: Any) -> Any:
        """Return what comes of a dialogue."""
        return resume(dialogue, next(dialogue), self.engine, None)

    def act(self, observation: Observation, seed: int, reasoning: Reasoning) -> Outcome:
        """Return the chunk that acts on a reasoning."""
        options = SamplingOptions(seed, reasoning=reasoning)
        outcome: Outcome = self.drive(self.program.infer(observation, {}, options))
        return outcome

    def reason(self, observation: Observation) -> Reasoning:
        """Return what it thinks."""
        reasoning: Reasoning = self.drive(self.program.reason(observation, until_s=math.inf))
        return reasoning


Way = Callable[[Pupil, Sorting, int], Policy]


def fresh(pupil: Pupil, world: Sorting, seed: int) -> Policy:
    """Reason about each observation, and act on that."""
    return _policy(pupil, seed, pupil.reason)


def late(pupil: Pupil, world: Sorting, seed: int) -> Policy:
    """Act on what was reasoned about the observation before, as robots do that do not wait."""
    before: list[Reasoning] = []

    def reason(observation: Observation) -> Reasoning:
        before.append(pupil.reason(observation))
        return before[max(0, len(before) - 2)]

    return _policy(pupil, seed, reason)


def silent(pupil: Pupil, world: Sorting, seed: int) -> Policy:
    """Inject nothing."""
    return _policy(pupil, seed, lambda observation: Reasoning())


def told_right(pupil: Pupil, world: Sorting, seed: int) -> Policy:
    """Act on what the demonstrator would say."""
    return _policy(pupil, seed, lambda observation: pupil.drive(pupil.program.hear(observation, _truth(world))))


def told_wrong(pupil: Pupil, world: Sorting, seed: int) -> Policy:
    """Act on words against the order: another thing, or another bin."""
    wish = wrong_of(world.scene, seed)

    def reason(observation: Observation) -> Reasoning:
        return pupil.drive(pupil.program.hear(observation, say(_now(world.scene, wish))))

    return _policy(pupil, seed, reason)


WAYS: Mapping[str, Way] = {
    "reasoned": fresh,
    "reasoned one chunk ago": late,
    "no reasoning injected": silent,
    "told the right reasoning": told_right,
    "told a wrong reasoning": told_wrong,
}


def wrong_of(scene: Scene, seed: int) -> Thought:
    """Return the wrong reasoning of one task, always the same."""
    thought = THOUGHTS[wrong_reasoning(scene, np.random.default_rng([seed, 1]))]
    assert thought is not None, "a wrong reasoning is about something"
    return thought


def measure(pupil: Pupil, ways: Sequence[str], episodes: int) -> dict[str, dict[str, Any]]:
    """Measure ways to act from the same beginnings.

    Args:
        pupil: Who acts.
        ways: Names from `WAYS`.
        episodes: Of each set of tasks.

    Returns:
        Results by way and set, "trained" combinations and "held out" ones: success with its interval, "right" (part of
        what it said that was right), and "followed" (part of episodes in which a wrong reasoning was carried out).
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in ways}
    with tqdm(total=2 * len(ways) * episodes, desc="evaluate", unit="episode") as bar:
        for group, held_out in (("trained", False), ("held out", True)):
            tasks = evaluation_tasks(episodes, held_out=held_out)
            with Sorting(tasks[0]) as world:
                for name in ways:
                    played = []
                    for seed, task in enumerate(tasks):
                        world.reset(task)
                        played.append(run_episode(world, WAYS[name](pupil, world, seed), task))
                        bar.update()
                    results[name][group] = _summarise(name, played)
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return results as a Markdown table."""
    lines = ["| | trained | held out | what it said was right | wrong words carried out |", "| --- |" + " --- |" * 4]
    for name, groups in results.items():
        cells = [_rate(groups[group]) for group in ("trained", "held out")]
        said = [f"{100 * one['right']:.0f} %" for one in groups.values() if "right" in one]
        followed = [f"{100 * one['followed']:.0f} %" for one in groups.values() if "followed" in one]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(said)} | {', '.join(followed)} |")
    return "\n".join(lines)


def open_pupil(path: Path, engine: str) -> Pupil:
    """Return a bundle's program with an engine on one thread."""
    bundle = load_bundle(path)
    return Pupil(bundle.new_program(), ENGINES[engine].make(bundle, 1))  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure how well a policy sorts, and print a table.

    Every line is one way to act, all from the same beginnings; "held out" are combinations of colour, kind and bin that
    no demonstration shows. Wilson's 95 % intervals.

    Example: python -m policy_models.divla.evaluate models/zoo/sorting --episodes 100
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="folder of the policy")
    parser.add_argument("--engine", choices=list(ENGINES), default="onnx", help="default: %(default)s")
    parser.add_argument("--episodes", type=int, default=100, help="of each set (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", metavar="WAY", default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.ways if name not in WAYS]:
        parser.error(f"no way is called {unknown[0]!r}; there are {', '.join(map(repr, WAYS))}")
    results = measure(open_pupil(options.bundle, options.engine), options.ways, options.episodes)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _policy(pupil: Pupil, seed: int, reason: Callable[[Observation], Reasoning]) -> Policy:
    rng = np.random.default_rng(seed)

    def answer(observed: Mapping[str, Any]) -> Answer:
        observation = Observation({CAMERA: observed[CAMERA]}, observed["state"], observed["prompt"])
        reasoning = reason(observation)
        outcome = pupil.act(observation, int(rng.integers(2**32)), reasoning)
        return Answer(outcome.actions, reasoning.text if reasoning.features is not None else None)

    return answer


def _truth(world: Sorting) -> str:
    return say(think(world.scene))


def _now(scene: Scene, wish: Thought) -> Thought:
    """Return a thought as it is to be said now, wherever its thing has come meanwhile."""
    return Thought(wish.thing, scene.whereabouts(scene.task.things.index(wish.thing)), wish.goal)


def _summarise(name: str, played: Sequence[Episode]) -> dict[str, Any]:
    result = summary([episode.steps for episode in played if episode.succeeded], len(played))
    said = [asked.right for episode in played for asked in episode.asked if asked.right is not None]
    if name in ("reasoned", "reasoned one chunk ago") and said:
        result["right"] = round(float(np.mean(said)), 4)
    if name == "told a wrong reasoning":
        wishes = [wrong_of(Scene.of(episode.task), seed) for seed, episode in enumerate(played)]
        result["followed"] = round(
            float(np.mean([_now(e.last, wish).at == wish.goal for e, wish in zip(played, wishes, strict=True)])), 4
        )
    return result


def _rate(result: Mapping[str, Any]) -> str:
    low, high = result["interval_95"]
    return f"{100 * result['success']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


if __name__ == "__main__":
    main()
