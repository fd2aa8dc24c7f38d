"""The yardstick of MoDE bundles: the same networks and sampler, in eager torch from the images to the actions."""

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.eager import own_weights
from benchmarks.token_routing import token_routed
from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.mode.config import ModeConfig
from policy_models.mode.routing import Routes
from policy_models.spec import Observation
from policy_server.bundle import Bundle


class EagerMode:
    """What a policy's author would run, instructions remembered: no engine, no numpy between the steps."""

    engine = "eager torch"
    precision = "f32"

    def __init__(self, bundle: Bundle, threads: int, *, settled: bool = False, device: str = "cpu") -> None:
        """Build the networks.

        Args:
            bundle: A MoDE policy that is told its goal in words.
            threads: Of torch.
            settled: Whether experts are settled once per noise level; if not, every token is routed, as upstream does.
            device: What computes, as torch calls it.
        """
        assert bundle.manifest.family == "mode" and bundle.assets.tokenizer and bundle.spec.sampler
        self._threads = threads
        self._device = device
        self._settled = settled
        self._config: ModeConfig = bundle.config
        self._spec, self._sampler = bundle.spec, bundle.spec.sampler
        self._normalizer = bundle.assets.normalizer
        self._tokenizer = Tokenizer.from_str(bundle.assets.tokenizer)
        self._routes = Routes(self._config.transformer, bundle.assets.weights)
        self._plan: dict[float, Tensor] = {}
        self._goals: dict[str, Tensor] = {}
        graphs = bundle.family.make_graphs(bundle.spec, bundle.config, own_weights(bundle.weights))
        self._language, self._perceive = (graphs[n].module.to(device) for n in ("language", "perceive"))
        denoiser = graphs["denoise"].module.to(device)
        self._denoiser = denoiser if settled else token_routed(denoiser)

    def prepare(self) -> None:
        """Take the process's threads; before every block that is timed."""
        torch.set_num_threads(self._threads)

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """Return the actions (H, A) that the bundle's program gives for this observation and seed."""
        with torch.inference_mode(), torch.device(self._device):
            return self._chunk(observation, np.random.default_rng(seed))

    def forget(self) -> None:
        """Forget every instruction."""
        self._goals.clear()

    def denoise(self, noisy: Tensor, sigma: float, tokens: Tensor, goal: Tensor) -> Tensor:
        """Estimate the clean actions, (B, H, A), of rows that share a noise level."""
        rows = len(noisy)
        denoised: Tensor = self._denoiser(
            noisy, torch.full((rows,), sigma), tokens, goal, self._route(sigma).expand(rows, -1, -1)
        )
        return denoised

    def _chunk(self, observation: Observation, rng: np.random.Generator) -> np.ndarray:
        shape, spec = self._config.transformer, self._sampler
        sigmas = SCHEDULES[spec.schedule](spec.steps, NoiseLevels(spec.sigma_min, spec.sigma_max, spec.rho))
        assert isinstance(observation.goal, str), "drawn observations have an instruction"
        goal = self._goal(observation.goal)
        images = [self._send(observation.images[camera.name])[None] for camera in self._spec.cameras]
        tokens = self._perceive(goal, *images)

        def noise() -> Tensor:
            return self._send(rng.standard_normal((1, shape.horizon, shape.action_width), dtype=np.float32))

        start = noise() * sigmas[0]
        x = run(SAMPLERS[spec.sampler](start, sigmas, noise), lambda x, sigma: self.denoise(x, sigma, tokens, goal))
        actions: np.ndarray = x[0].cpu().numpy()
        if self._normalizer is None:
            return actions
        return self._normalizer.denormalize_action(self._normalizer.clip_action(actions))

    def _send(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _goal(self, instruction: str) -> Tensor:
        if instruction not in self._goals:
            assert self._config.text is not None
            ids = self._tokenizer.encode(instruction).ids
            padded = ids + [0] * (self._config.text.context - len(ids))
            self._goals[instruction] = self._language(torch.tensor([padded]))
        return self._goals[instruction]

    def _route(self, sigma: float) -> Tensor:
        if not self._settled:
            return torch.zeros(1, self._config.transformer.layers, self._config.transformer.experts)
        if sigma not in self._plan:
            self._plan[sigma] = self._send(self._routes.of([sigma]))
        return self._plan[sigma]
