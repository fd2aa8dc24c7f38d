"""BESO's agent: observation windows, previous actions, the sampler loop, clipping and scaling."""

from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from policy_models.beso.config import BesoConfig
from policy_models.diffusion.guidance import combine, guided_goals
from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels, Sigmas
from policy_models.normalizer import Normalizer
from policy_models.program import Dialogue, GraphCall, Outcome, Tensors, UnsuitableOptions
from policy_models.spec import Observation, PolicySpec, SamplingOptions


@lru_cache(maxsize=256)
def _sigmas(schedule: str, steps: int, levels: NoiseLevels) -> Sigmas:
    try:
        return SCHEDULES[schedule](steps, levels)
    except ValueError as error:
        raise UnsuitableOptions(str(error)) from error


@dataclass(frozen=True)
class BesoMemory:
    """The last T - 1 observations and actions of an episode, oldest first, normalised."""

    states: tuple[np.ndarray, ...] = ()
    actions: tuple[np.ndarray, ...] = ()


class BesoProgram:
    """From a state and a goal to actions, over one graph: `denoise`."""

    def __init__(self, spec: PolicySpec, config: BesoConfig, normalizer: Normalizer) -> None:
        assert spec.sampler is not None and spec.state is not None, "BESO is a diffusion policy over states"
        self.spec = spec
        self.config = config
        self.normalizer = normalizer
        self.sampler = spec.sampler
        self.levels = NoiseLevels(self.sampler.sigma_min, self.sampler.sigma_max, self.sampler.rho)

    def begin(self) -> BesoMemory:
        """Return the memory of a session that has seen nothing."""
        return BesoMemory()

    def infer(self, observation: Observation, memory: BesoMemory, options: SamplingOptions) -> Dialogue:
        """Answer one observation, as BESO's agent does: the window of states, its past actions, one new chunk."""
        assert observation.state is not None, "the observation was checked against the spec"
        states = (*memory.states, self.normalizer.normalize_state(observation.state))[-self.config.window :]
        actions = memory.actions[-(len(states) - 1) :] if len(states) > 1 else ()

        first = len(states) - 1  # row of the first new action
        x = yield from self._sample(states, actions, self._goal(observation), options)
        chunk = self.normalizer.clip_action(x[0, first : first + self.config.horizon])

        kept = self.config.window - 1
        remembered = BesoMemory(states[-kept:], (*actions, chunk[0])[-kept:]) if kept else memory
        return Outcome(self.normalizer.denormalize_action(chunk), remembered)

    def _sample(
        self,
        states: tuple[np.ndarray, ...],
        actions: tuple[np.ndarray, ...],
        goal: np.ndarray | None,
        options: SamplingOptions,
    ) -> Generator[GraphCall, Tensors, np.ndarray]:
        rng = np.random.default_rng(options.seed)
        sigmas = _sigmas(self.sampler.schedule, options.steps or self.sampler.steps, self.levels)
        filled = len(actions) + self.config.horizon

        # The sequence is causal, so a window that is not yet full is padded at its end, where nothing that matters can
        # see it. Every call then has one shape, and robots at different points of an episode can share a batch.
        def noise() -> np.ndarray:
            rows = np.zeros((1, self.config.action_tokens, self.config.action_width), dtype=np.float32)
            rows[:, :filled] = rng.standard_normal((filled, self.config.action_width), dtype=np.float32)
            return rows

        x = np.zeros((1, self.config.action_tokens, self.config.action_width), dtype=np.float32)
        x[:, len(actions) : filled] = (
            rng.standard_normal((self.config.horizon, self.config.action_width), dtype=np.float32) * sigmas[0]
        )
        if actions:
            # Upstream gives clean past actions as if they were at sigma_max and lets the sampler overwrite them.
            x[:, : len(actions)] = np.stack(actions)
        window = np.zeros((1, self.config.window, self.config.state_width), dtype=np.float32)
        window[:, : len(states)] = np.stack(states)

        guidance = self.sampler.guidance if options.guidance is None else options.guidance
        if goal is None:
            goal, guidance = np.zeros((self.config.goal_length, self.config.state_width), dtype=np.float32), 0.0
        goals = guided_goals(goal, guidance)
        rows = len(goals)
        steps = SAMPLERS[options.sampler or self.sampler.sampler](x, sigmas, noise)
        question = next(steps)
        while True:
            noisy, sigma = question
            outputs = yield GraphCall(
                "denoise",
                {
                    "noisy": np.repeat(noisy, rows, axis=0),
                    "sigma": np.full(rows, sigma, dtype=np.float32),
                    "states": np.repeat(window, rows, axis=0),
                    "goal": goals,
                },
            )
            try:
                question = steps.send(combine(outputs["denoised"], guidance))
            except StopIteration as finished:
                return finished.value

    def _goal(self, observation: Observation) -> np.ndarray | None:
        if not isinstance(observation.goal, np.ndarray):
            return None
        goal = self.normalizer.normalize_state(observation.goal).copy()
        goal[:, list(self.config.zeroed_goal_dims)] = 0
        return goal
