"""BESO's agent: observation windows, previous actions, the sampler loop, clipping and scaling."""

from collections.abc import Generator
from functools import lru_cache

import numpy as np

from policy_models.beso.config import BesoConfig
from policy_models.diffusion.continuity import SPREAD, Pull
from policy_models.diffusion.denoising import denoise, is_warm, levels_left, noise_part
from policy_models.diffusion.guidance import guided_goals
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels, Sigmas
from policy_models.normalizer import Normalizer
from policy_models.program import Dialogue, GraphCall, Outcome, Tensors, UnsuitableOptions
from policy_models.spec import Continuation, Observation, PolicySpec, SamplingOptions


@lru_cache(maxsize=256)
def _sigmas(schedule: str, steps: int, levels: NoiseLevels) -> Sigmas:
    try:
        return SCHEDULES[schedule](steps, levels)
    except ValueError as error:
        raise UnsuitableOptions(str(error)) from error


class BesoProgram:
    """From a state and a goal to actions, over one graph: `denoise`."""

    def __init__(self, spec: PolicySpec, config: BesoConfig, normalizer: Normalizer) -> None:
        assert spec.sampler is not None and spec.state is not None, "BESO is a diffusion policy over states"
        self.spec = spec
        self.config = config
        self.normalizer = normalizer
        self.sampler = spec.sampler
        self.levels = NoiseLevels(self.sampler.sigma_min, self.sampler.sigma_max, self.sampler.rho)

    def begin(self) -> Tensors:
        """Return the memory of a session that has seen nothing.

        The last T - 1 states and actions of an episode, normalised, (T - 1, S) and (T - 1, A), oldest first, filled up
        with zeros at the end; and how many are real, (1,). Empty for a window of one.
        """
        kept = self.config.window - 1
        if not kept:
            return {}
        return {
            "states": np.zeros((kept, self.config.state_width), dtype=np.float32),
            "actions": np.zeros((kept, self.config.action_width), dtype=np.float32),
            "count": np.zeros(1, dtype=np.int32),
        }

    def infer(self, observation: Observation, memory: Tensors, options: SamplingOptions) -> Dialogue:
        """Answer one observation, as BESO's agent does: the window of states, its past actions, one new chunk."""
        assert observation.state is not None, "the observation was checked against the spec"
        past_states, actions = _recall(memory)
        states = (*past_states, self.normalizer.normalize_state(observation.state))

        first = len(states) - 1  # row of the first new action
        x = yield from self._sample(states, actions, self._goal(observation), options)
        chunk = self.normalizer.clip_action(x[0, first : first + self.config.horizon])

        remembered = self._remember(states, (*actions, chunk[0])) if memory else memory
        return Outcome(self.normalizer.denormalize_action(chunk), remembered)

    def _remember(self, states: tuple[np.ndarray, ...], actions: tuple[np.ndarray, ...]) -> Tensors:
        memory = self.begin()
        kept = min(len(states), self.config.window - 1)
        memory["states"][:kept] = states[-kept:]
        memory["actions"][:kept] = actions[-kept:]
        memory["count"][0] = kept
        return memory

    def _sample(
        self,
        states: tuple[np.ndarray, ...],
        actions: tuple[np.ndarray, ...],
        goal: np.ndarray | None,
        options: SamplingOptions,
    ) -> Generator[GraphCall, Tensors, np.ndarray]:
        rng = np.random.default_rng(options.seed)
        sigmas = levels_left(
            _sigmas(self.sampler.schedule, options.steps or self.sampler.steps, self.levels), options.continuation
        )
        filled = len(actions) + self.config.horizon

        # The sequence is causal, so a window that is not yet full is padded at its end, where nothing that matters can
        # see it. Every call then has one shape, and robots at different points of an episode can share a batch.
        def noise() -> np.ndarray:
            rows = np.zeros((1, self.config.action_tokens, self.config.action_width), dtype=np.float32)
            rows[:, :filled] = rng.standard_normal((filled, self.config.action_width), dtype=np.float32)
            return rows

        x = np.zeros((1, self.config.action_tokens, self.config.action_width), dtype=np.float32)
        drawn = rng.standard_normal((self.config.horizon, self.config.action_width), dtype=np.float32)
        x[:, len(actions) : filled] = drawn * (sigmas[0] * noise_part(options.continuation))
        if actions:
            # Upstream gives clean past actions as if they were at sigma_max and lets the sampler overwrite them.
            x[0, : len(actions)] = actions
        window = np.zeros((1, self.config.window, self.config.state_width), dtype=np.float32)
        window[0, : len(states)] = states

        guidance = self.sampler.guidance if options.guidance is None else options.guidance
        if goal is None:
            goal, guidance = np.zeros((self.config.goal_length, self.config.state_width), dtype=np.float32), 0.0
        goals = guided_goals(goal, guidance)
        rows = len(goals)
        windows = np.repeat(window, rows, axis=0)

        def ask(noisy: np.ndarray, sigma: float) -> GraphCall:
            level = np.full(rows, sigma, dtype=np.float32)
            return GraphCall(
                "denoise", {"noisy": np.repeat(noisy, rows, axis=0), "sigma": level, "states": windows, "goal": goals}
            )

        pull = None
        if options.continuation is not None:
            pull = self._pull(options.continuation, first=len(actions))
            x = x + pull.plan if is_warm(options.continuation) else x
        sampler = options.sampler or self.sampler.sampler
        return (yield from denoise(x, sigmas, noise, sampler=sampler, guidance=guidance, ask=ask, pull=pull))

    def _pull(self, continuation: Continuation, *, first: int) -> Pull:
        rows = slice(first, first + self.config.horizon)
        plan = np.zeros((1, self.config.action_tokens, self.config.action_width), dtype=np.float32)
        plan[0, rows] = self.normalizer.normalize_action(continuation.actions)
        weights = np.zeros((1, self.config.action_tokens, 1), dtype=np.float32)
        weights[0, rows, 0] = continuation.weights
        return Pull(plan, weights, continuation.strength, SPREAD * self.config.sigma_data, continuation.gradients)

    def _goal(self, observation: Observation) -> np.ndarray | None:
        if not isinstance(observation.goal, np.ndarray):
            return None
        goal = self.normalizer.normalize_state(observation.goal).copy()
        goal[:, list(self.config.zeroed_goal_dims)] = 0
        return goal


def _recall(memory: Tensors) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return the states, each (S,), and actions, each (A,), that a memory holds."""
    if not memory:
        return (), ()
    count = max(0, int(memory["count"][0]))
    return tuple(memory["states"][:count]), tuple(memory["actions"][:count])
