"""Closed-loop evaluation in the maze: many robots in lockstep, driven by the very program that the server runs.

Each robot holds its own dialogue with `BesoProgram`. The questions of all robots have one shape, so one forward pass
of the torch network answers them together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from policy_models.beso.program import BesoProgram
from policy_models.program import Dialogue, Outcome
from policy_models.spec import Observation, SamplingOptions
from policy_sim import success
from policy_sim.episode import LIMIT_STEPS, Episode, Task, random_policy, run_episode
from policy_sim.expert import WaypointExpert
from policy_sim.pictures import plot_paths
from policy_sim.point_maze import GRID, PointMaze

DENOISING_STEPS = (1, 3, 10, 30)
GUIDANCES = (0.0, 1.0, 1.5, 2.0)
PICTURED = 40  # drives in each half of the picture

_JUNCTION, _FAR_GOAL = (3, 4), (6, 1)  # cells: three ways lead away from the first, two of them to the second
_ENDLESS_STEPS = 200
# Measured from rest over 5 s, goal-free drives get 0.76 m away at 3 denoising steps and 1.23 m at 30.
_GOAL_FREE_DENOISING_STEPS = 30


@dataclass(frozen=True)
class Policy:
    """A policy as it drives.

    Attributes:
        program: From observation to chunk.
        denoise: Its network D(noisy, sigma, states, goal), in evaluation mode.
        execute: Actions of a chunk that are played before the next is asked for.
    """

    program: BesoProgram
    denoise: nn.Module
    execute: int

    def __post_init__(self) -> None:
        if not 1 <= self.execute <= self.program.spec.horizon:
            raise ValueError(f"cannot execute {self.execute} actions of a chunk of {self.program.spec.horizon}")


class Fleet:
    """Mazes, one for each robot of an evaluation; they are kept, since one takes 50 ms and 10 MB to make."""

    def __init__(self, robots: int) -> None:
        self.mazes = [PointMaze() for _ in range(robots)]

    def drive(
        self,
        policy: Policy,
        tasks: Sequence[Task],
        *,
        steps: int,
        guidance: float = 1.0,
        limit_steps: int = LIMIT_STEPS,
        endless: bool = False,
        seed: int = 0,
    ) -> list[Episode]:
        """Drive every task until its goal is reached or the limit is hit.

        Args:
            policy: What drives.
            tasks: At most as many as there are robots.
            steps: Denoising steps.
            guidance: lambda.
            limit_steps: Control steps after which a robot has failed.
            endless: Drive on past the goal, up to the limit.
            seed: Decides all sampling noise. A robot's noise does not depend on how many others there are.
        """
        robots = [
            _Robot(maze, task, policy, [seed, i]) for i, (maze, task) in enumerate(zip(self.mazes, tasks, strict=False))
        ]
        assert len(robots) == len(tasks), f"{len(tasks)} tasks for {len(self.mazes)} robots"
        for played in range(0, limit_steps, policy.execute):
            driving = [robot for robot in robots if endless or not robot.maze.reached]
            if not driving:
                break
            outcomes = answer([robot.ask(steps, guidance) for robot in driving], policy.denoise)
            for robot, outcome in zip(driving, outcomes, strict=True):
                robot.play(outcome, min(policy.execute, limit_steps - played), endless=endless)
        return [robot.episode() for robot in robots]


class _Robot:
    """One robot on its way: its maze, its session's memory and what it has done."""

    def __init__(self, maze: PointMaze, task: Task, policy: Policy, seed: list[int]) -> None:
        self.maze = maze
        self.program = policy.program
        self.memory: Any = policy.program.begin()
        self.goal = np.concatenate((task.goal, np.zeros(2, dtype=np.float32)))[None]  # (1, 4): its speeds are ignored
        self.states = [maze.reset(0, start=task.start, goal=task.goal)]
        self.actions: list[np.ndarray] = []
        self._rng = np.random.default_rng(seed)

    def ask(self, steps: int, guidance: float) -> Dialogue:
        observation = Observation(images={}, state=self.states[-1], goal=self.goal)
        options = SamplingOptions(seed=int(self._rng.integers(2**32)), steps=steps, guidance=guidance)
        return self.program.infer(observation, self.memory, options)

    def play(self, outcome: Outcome, count: int, *, endless: bool) -> None:
        """Execute the first `count` actions of a chunk, or fewer if they lead to the goal."""
        self.memory = outcome.memory
        for action in outcome.actions[:count]:
            if self.maze.reached and not endless:
                return
            self.states.append(self.maze.step(action))
            self.actions.append(action)

    def episode(self) -> Episode:
        states, actions = np.stack(self.states), np.stack(self.actions)
        return Episode(states, actions, self.maze.goal.copy(), self.maze.reached, len(actions))


@torch.inference_mode()
def answer(dialogues: Sequence[Dialogue], denoise: nn.Module) -> list[Outcome]:
    """Carry on dialogues that ask in step with each other, all rows of a round in one forward pass, to their ends."""
    calls = [next(dialogue) for dialogue in dialogues]
    while True:
        inputs = [
            torch.from_numpy(np.concatenate([call.inputs[name] for call in calls]))
            for name in ("noisy", "sigma", "states", "goal")
        ]
        answers = np.split(denoise(*inputs).numpy(), len(calls))
        next_calls, outcomes = [], []
        for dialogue, denoised in zip(dialogues, answers, strict=True):
            try:
                next_calls.append(dialogue.send({"denoised": denoised}))
            except StopIteration as finished:
                outcomes.append(finished.value)
        if outcomes:
            assert not next_calls, "robots in lockstep take equally many denoising steps"
            return outcomes
        calls = next_calls


def measure(policy: Policy, fleet: Fleet, tasks: Sequence[Task]) -> dict[str, Any]:
    """Measure success over denoising steps and over guidance, beside the expert and a random policy."""
    default = policy.program.sampler
    conditions = [(steps, default.guidance) for steps in DENOISING_STEPS]
    conditions += [(default.steps, guidance) for guidance in GUIDANCES if (default.steps, guidance) not in conditions]
    measured: dict[tuple[int, float], Mapping[str, Any]] = {}
    for steps, guidance in tqdm(conditions, desc="evaluate", unit="condition"):
        measured[steps, guidance] = summary(fleet.drive(policy, tasks, steps=steps, guidance=guidance))

    maze = fleet.mazes[0]
    expert = WaypointExpert(maze.grid, seed=0)
    by_expert = [run_episode(maze, expert.act, start=t.start, goal=t.goal) for t in tasks]
    by_chance = [run_episode(maze, random_policy(i), start=t.start, goal=t.goal) for i, t in enumerate(tasks)]
    return {
        "tasks": len(tasks),
        "limit_steps": LIMIT_STEPS,
        "denoising_steps": {str(steps): measured[steps, default.guidance] for steps in DENOISING_STEPS},
        "guidance": {str(guidance): measured[default.steps, guidance] for guidance in GUIDANCES},
        "expert": summary(by_expert),
        "random": summary(by_chance),
    }


def summary(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return the success rate, its 95 % interval and the mean steps of the episodes that succeeded (None if none)."""
    return success.summary([episode.steps for episode in episodes if episode.reached], len(episodes))


def draw_goal_free(policy: Policy, fleet: Fleet, path: Path) -> None:
    """Save a picture of drives from one junction: goal-free on the left, towards a goal on the right."""
    start, goal = (GRID.centre_of(cell).astype(np.float32) for cell in (_JUNCTION, _FAR_GOAL))
    tasks = [Task(start, goal)] * PICTURED
    steps, many = policy.program.sampler.steps, _GOAL_FREE_DENOISING_STEPS
    free = fleet.drive(policy, tasks, steps=many, guidance=0.0, limit_steps=_ENDLESS_STEPS, endless=True)
    towards = fleet.drive(policy, tasks, steps=steps)
    panels = []
    for episodes, title in (
        (free, f"{PICTURED} drives not told the goal (λ = 0, {many} denoising steps)"),
        (towards, f"{PICTURED} drives told the goal (λ = 1, {steps} denoising steps)"),
    ):
        plot_paths(episodes, path, title=title)
        panels.append(Image.open(path).convert("RGB"))
    picture = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i * panels[0].width, 0))
    picture.save(path, optimize=True)
