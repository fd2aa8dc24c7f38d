"""MoDE's agent: instruction and images to context once per chunk, then the sampler loop with settled routes."""

import threading
from collections import OrderedDict
from collections.abc import Generator
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from policy_models.diffusion.continuity import SPREAD, Pull
from policy_models.diffusion.denoising import denoise, is_warm, levels_left, noise_part
from policy_models.diffusion.guidance import guided_goals
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels, Sigmas
from policy_models.mode.config import ModeConfig
from policy_models.mode.routing import Routes, asked_levels
from policy_models.normalizer import Normalizer
from policy_models.program import Dialogue, GraphCall, Outcome, Tensors, UnsuitableGoal, UnsuitableOptions
from policy_models.spec import Continuation, Observation, PolicySpec, SamplingOptions

# A sampler and a step count that some request asked for keep their routes; a released policy's take 20 kB.
_PLANS = 64
_INSTRUCTIONS = 4096


class GoalMemory:
    """Embedded instructions by their text, the least recently used forgotten first. Threads may share it."""

    def __init__(self, capacity: int = _INSTRUCTIONS) -> None:
        self.capacity = capacity
        self._goals: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._goals)

    def get(self, text: str) -> np.ndarray | None:
        """Return the embedding of `text`, (goal width,), if it is still known."""
        with self._lock:
            goal = self._goals.get(text)
            if goal is not None:
                self._goals.move_to_end(text)
            return goal

    def put(self, text: str, goal: np.ndarray) -> None:
        """Remember an embedding."""
        with self._lock:
            self._goals[text] = goal
            while len(self._goals) > self.capacity:
                self._goals.popitem(last=False)


class ModeProgram:
    """From images and a goal to a chunk, over the graphs `language` (or `look_at_goal`), `perceive` and `denoise`."""

    def __init__(
        self,
        spec: PolicySpec,
        config: ModeConfig,
        routes: Routes,
        *,
        tokenizer: Tokenizer | None,
        normalizer: Normalizer | None = None,
    ) -> None:
        assert spec.sampler is not None, "MoDE is a diffusion policy"
        self.spec = spec
        self.config = config
        self.sampler = spec.sampler
        self.goals = GoalMemory()
        self._routes = routes
        self._tokenizer = tokenizer
        self._normalizer = normalizer
        self._levels = NoiseLevels(self.sampler.sigma_min, self.sampler.sigma_max, self.sampler.rho)
        self._schedule = lru_cache(_PLANS)(self._make_schedule)
        self._plan = lru_cache(_PLANS)(self._make_plan)
        if not config.transformer.goal_routing:
            # What most requests ask for is settled before the first of them comes.
            self._plan(self.sampler.sampler, self.sampler.steps, self.sampler.steps)

    def begin(self) -> Tensors:
        """Return the memory of a session: none, since MoDE looks at the newest observation alone."""
        return {}

    def infer(self, observation: Observation, memory: Tensors, options: SamplingOptions) -> Dialogue:
        """Answer one observation."""
        sampler, steps = options.sampler or self.sampler.sampler, options.steps or self.sampler.steps
        sigmas = levels_left(self._schedule(steps), options.continuation)
        guidance = self.sampler.guidance if options.guidance is None else options.guidance

        goal = yield from self._goal(observation)
        images = {f"image_{name}": observation.images[name][None] for name in observation.images}
        perceived = yield GraphCall("perceive", {"goal": goal[None], **images})

        if observation.goal is None:
            guidance = 0.0
        goals = guided_goals(goal, guidance)
        tokens = np.repeat(perceived["tokens"], len(goals), axis=0)
        if self.config.transformer.goal_routing:
            levels = asked_levels(sampler, sigmas)
            routes = np.stack([self._routes.of(levels, row) for row in goals], axis=1)
        else:
            routes = np.repeat(self._plan(sampler, steps, len(sigmas) - 1), len(goals), axis=1)

        shape = (1, self.spec.horizon, self.config.transformer.action_width)
        rng = np.random.default_rng(options.seed)

        def noise() -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        ways = iter(routes)

        def ask(noisy: np.ndarray, sigma: float) -> GraphCall:
            level = np.full(len(goals), sigma, dtype=np.float32)
            noisy = np.repeat(noisy, len(goals), axis=0).astype(np.float32, copy=False)
            inputs = {"noisy": noisy, "sigma": level, "tokens": tokens, "goal": goals, "route": next(ways)}
            return GraphCall("denoise", inputs, way=sigma)

        x, pull = noise() * np.float32(sigmas[0] * noise_part(options.continuation)), None
        if options.continuation is not None:
            pull = self._pull(options.continuation)
            x = x + pull.plan if is_warm(options.continuation) else x
        x = yield from denoise(x, sigmas, noise, sampler=sampler, guidance=guidance, ask=ask, pull=pull)
        return Outcome(self._in_robot_units(x[0]), memory)

    def _goal(self, observation: Observation) -> Generator[GraphCall, Tensors, np.ndarray]:
        if observation.goal is None:
            return np.zeros(self.config.transformer.goal_width, dtype=np.float32)
        if not isinstance(observation.goal, str):
            embedded = yield GraphCall("look_at_goal", {"image": observation.goal[None]})
            return embedded["goal"][0]
        known = self.goals.get(observation.goal)
        if known is None:
            embedded = yield GraphCall("language", {"tokens": self._tokens(observation.goal)})
            known = embedded["goal"][0]
            self.goals.put(observation.goal, known)
        return known

    def _tokens(self, instruction: str) -> np.ndarray:
        """Return (1, context) int64, padded with zeros; raises UnsuitableGoal if they do not fit."""
        assert self._tokenizer is not None and self.config.text is not None, "checked when the program was made"
        ids, context = self._tokenizer.encode(instruction).ids, self.config.text.context
        if len(ids) > context:
            raise UnsuitableGoal(f"the instruction has {len(ids)} tokens, the language model reads {context}")
        tokens = np.zeros((1, context), dtype=np.int64)
        tokens[0, : len(ids)] = ids
        return tokens

    def _make_schedule(self, steps: int) -> Sigmas:
        try:
            return SCHEDULES[self.sampler.schedule](steps, self._levels)
        except ValueError as error:
            raise UnsuitableOptions(str(error)) from error

    def _make_plan(self, sampler: str, steps: int, last: int) -> np.ndarray:
        """Return the routes of every question in the last steps of the sampler, (questions, 1, blocks, E)."""
        return self._routes.of(asked_levels(sampler, self._schedule(steps)[-1 - last :]))[:, None]

    def _pull(self, continuation: Continuation) -> Pull:
        plan = (
            continuation.actions
            if self._normalizer is None
            else self._normalizer.normalize_action(continuation.actions)
        )
        spread = SPREAD * self.config.transformer.sigma_data
        weights = continuation.weights[None, :, None]
        return Pull(plan[None], weights, continuation.strength, spread, continuation.gradients)

    def _in_robot_units(self, actions: np.ndarray) -> np.ndarray:
        if self._normalizer is None:
            return actions.astype(np.float32, copy=False)
        return self._normalizer.denormalize_action(self._normalizer.clip_action(actions))
