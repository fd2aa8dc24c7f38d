"""DiVLA's agent: images and instruction to words, words to what the head is told, then the sampler loop."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from policy_models.diffusion.continuity import SPREAD, Pull
from policy_models.diffusion.denoising import denoise, is_warm, levels_left, noise_part
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels, Sigmas
from policy_models.divla.cache import Cache
from policy_models.divla.config import DivlaConfig
from policy_models.divla.prompt import Prompt, Template, Vocabulary
from policy_models.normalizer import Normalizer
from policy_models.program import Dialogue, GraphCall, Outcome, Tensors, Thought, UnsuitableGoal, UnsuitableOptions
from policy_models.spec import Continuation, Observation, PolicySpec, Reasoning, SamplingOptions

_INSTRUCTIONS = 1024
# Of normalised actions, which is what guidance towards a plan is measured against.
_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class _Read:
    """What the language model made of one observation.

    Attributes:
        prompt: What it read.
        logits: Of the first token of an answer, (V,).
        cache: (1, layers, 2, kv heads, L, head width).
        seen: What the head is told of it, "projected" and "pooled", (1, C) each.
    """

    prompt: Prompt
    logits: np.ndarray
    cache: np.ndarray
    seen: Mapping[str, np.ndarray]


class DivlaProgram:
    """From images and an instruction to words and a chunk.

    Its graphs: `see` (images to tokens), `read` (the prompt), `speak` (a token of an answer), `hear` (an answer of
    somebody else), `weigh` (an answer's hidden states to features), `inject` (features to what the head is told), and
    `denoise`.
    """

    def __init__(self, spec: PolicySpec, config: DivlaConfig, vocabulary: Vocabulary, normalizer: Normalizer) -> None:
        assert spec.sampler is not None and spec.reasoning is not None, "DiVLA is a diffusion policy that reasons"
        self.spec = spec
        self.config = config
        self.sampler = spec.sampler
        self._vocabulary = vocabulary
        self._normalizer = normalizer
        self._levels = NoiseLevels(self.sampler.sigma_min, self.sampler.sigma_max, self.sampler.rho)
        camera = spec.cameras[0]
        template = Template(vocabulary, config, images=len(spec.cameras), height=camera.height, width=camera.width)
        self._prompt = lru_cache(_INSTRUCTIONS)(template.write)
        self._most = spec.reasoning.tokens

    def begin(self) -> Tensors:
        """Return the memory of a session: none. What it thinks travels in `SamplingOptions.reasoning`."""
        return {}

    def infer(self, observation: Observation, memory: Tensors, options: SamplingOptions) -> Dialogue:
        """Answer one observation; reasons first, as published, if the options hold no reasoning."""
        assert self.spec.reasoning is not None, "checked when the program was made"
        sigmas = levels_left(self._sigmas(options.steps or self.sampler.steps), options.continuation)
        thought = options.reasoning
        if thought is None:
            thought = yield from self.reason(observation, until_s=time.monotonic() + self.spec.reasoning.budget_s)
        seen = thought.seen
        if thought.about is not observation:
            seen = (yield from self._read(observation, self._instruction(observation))).seen
        context = yield from self._inject(seen, thought.features)
        actions = yield from self._sample(observation, context, sigmas, options)
        return Outcome(self._normalizer.denormalize_action(actions), memory, thought)

    def reason(self, observation: Observation, *, until_s: float, question: str | None = None) -> Thought:
        """See `ReasoningProgram.reason`: the likeliest token each time, as published."""
        read = yield from self._read(observation, self._instruction(observation) if question is None else question)
        listener, end = self._vocabulary.listen(), self._vocabulary.special.end
        cache = Cache(read.cache, read.prompt.mask, len(read.prompt.mask) + self._most)
        hidden: list[np.ndarray] = []
        token, text, told = int(read.logits.argmax()), "", ""
        ended: Literal["complete", "tokens", "time"] = "complete"
        while token != end:
            text += listener.hear(token)
            # The last token is never read, so an answer of the most tokens is read but for one.
            if len(hidden) == self._most - 1 or time.monotonic() >= until_s:
                ended = "tokens" if len(hidden) == self._most - 1 else "time"
                break
            said, told = (text, text) if text != told else ("", told)
            spoken = yield self._speak(token, read.prompt.next_position + len(hidden), cache, said)
            cache.add(spoken["entries"])
            hidden.append(spoken["hidden"][0])
            token = int(spoken["logits"][0].argmax())
        text = (text + listener.close()).strip()
        if question is not None or not hidden:
            return Reasoning(text, None, ended, observation, read.seen if question is None else {})
        weighed = yield GraphCall("weigh", self._padded(np.stack(hidden)))
        return Reasoning(text, weighed["features"][0], ended, observation, read.seen)

    def hear(self, observation: Observation, text: str) -> Thought:
        """See `ReasoningProgram.hear`."""
        words = self._vocabulary.answer(text)[:-1]  # the end of an answer is never read
        if len(words) >= self._most:
            raise UnsuitableGoal(f"the reasoning has {len(words)} tokens, there may be {self._most - 1}")
        read = yield from self._read(observation, self._instruction(observation))
        longest = self.config.reasoning_tokens
        tokens, heard = (np.zeros((1, longest), dtype=np.int64) for _ in range(2))
        tokens[0, : len(words)], heard[0, : len(words)] = words, 1
        positions = np.tile(read.prompt.next_position + np.arange(longest), (1, 3, 1))
        inputs = {
            "tokens": tokens,
            "positions": positions,
            "heard": heard,
            "cache": read.cache,
            "mask": read.prompt.mask[None],
        }
        features = (yield GraphCall("hear", inputs))["features"][0]
        return Reasoning(text, features, "given", observation, read.seen)

    def _instruction(self, observation: Observation) -> str:
        return str(observation.goal or "")

    def _read(self, observation: Observation, words: str) -> Generator[GraphCall, Tensors, _Read]:
        prompt = self._prompt(words)
        images = np.stack([observation.images[camera.name] for camera in self.spec.cameras])
        looked = yield GraphCall("see", {"images": images[None]})
        inputs = {
            "tokens": prompt.tokens[None],
            "places": prompt.places[None],
            "images": looked["tokens"],
            "positions": prompt.positions[None],
            "mask": prompt.mask[None],
        }
        read = yield GraphCall("read", inputs)
        return _Read(prompt, read["logits"][0], read["cache"], {name: read[name] for name in ("projected", "pooled")})

    def _speak(self, token: int, position: int, cache: Cache, said: str) -> GraphCall:
        inputs = {
            "token": np.full((1, 1), token, dtype=np.int64),
            "position": np.full((1, 3, 1), position, dtype=np.int64),
            "cache": cache.entries,
            "mask": cache.mask,
        }
        return GraphCall("speak", inputs, said=said)

    def _padded(self, hidden: np.ndarray) -> Tensors:
        """Return hidden states, (R, C), as every robot's go into a run: as many as there may be."""
        longest = self.config.reasoning_tokens
        padded = np.zeros((1, longest, hidden.shape[1]), dtype=np.float32)
        padded[0, : len(hidden)] = hidden
        mask = np.zeros((1, longest), dtype=np.int64)
        mask[0, : len(hidden)] = 1
        return {"hidden": padded, "mask": mask}

    def _inject(
        self, seen: Mapping[str, np.ndarray], features: np.ndarray | None
    ) -> Generator[GraphCall, Tensors, np.ndarray]:
        """Return what the head is told, (1, C)."""
        if features is None:
            return seen["projected"] + seen["pooled"]
        return (yield GraphCall("inject", {**seen, "features": features[None]}))["context"]

    def _sample(
        self, observation: Observation, context: np.ndarray, sigmas: Sigmas, options: SamplingOptions
    ) -> Generator[GraphCall, Tensors, np.ndarray]:
        """Return normalised actions, (H, A)."""
        shape = (1, self.spec.horizon, self.spec.action.width)
        rng = np.random.default_rng(options.seed)

        def noise() -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        assert observation.state is not None, "the observation was checked against the spec"
        state = self._normalizer.normalize_state(observation.state)[None]

        def ask(noisy: np.ndarray, sigma: float) -> GraphCall:
            level = np.full(1, sigma, dtype=np.float32)
            inputs = {"noisy": noisy.astype(np.float32, copy=False), "sigma": level, "context": context, "state": state}
            return GraphCall("denoise", inputs)

        # The head was trained with noise of variance 1 that the actions are mixed into; here the noise is added.
        scale = np.float32(np.sqrt(1 + sigmas[0] ** 2) * noise_part(options.continuation))
        x, pull = noise() * scale, None
        if options.continuation is not None:
            pull = self._pull(options.continuation)
            x = x + pull.plan if is_warm(options.continuation) else x
        sampler = options.sampler or self.sampler.sampler
        x = yield from denoise(x, sigmas, noise, sampler=sampler, guidance=1.0, ask=ask, pull=pull)
        return np.clip(x[0], -1.0, 1.0)

    def _pull(self, continuation: Continuation) -> Pull:
        plan = self._normalizer.normalize_action(continuation.actions)[None]
        weights = continuation.weights[None, :, None]
        return Pull(plan, weights, continuation.strength, SPREAD * _SIGMA_DATA, continuation.gradients)

    def _sigmas(self, steps: int) -> Sigmas:
        try:
            return SCHEDULES[self.sampler.schedule](steps, self._levels)
        except ValueError as error:
            raise UnsuitableOptions(str(error)) from error
