"""The yardstick: the same network and sampler as a BESO bundle, in eager torch from the noise to the actions."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from policy_models.beso.config import BesoConfig
from policy_models.beso.program import BesoProgram
from policy_models.diffusion.guidance import combine, guided_goals
from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES
from policy_models.spec import Observation
from policy_server.bundle import Bundle
from policy_server.engine.torch import load_weights

DEFAULT_THREADS = torch.get_num_threads()


class EagerTorch:
    """What a policy's author would run: no engine, no numpy between the steps."""

    engine = "eager torch"
    precision = "f32"

    def __init__(self, bundle: Bundle, threads: int, *, device: str = "cpu") -> None:
        program = bundle.new_program()
        if not isinstance(program, BesoProgram):
            raise ValueError(f"{bundle.name} is a {bundle.manifest.family} policy; the yardstick knows beso alone")
        self._threads = threads
        self._device = device
        self._config: BesoConfig = bundle.config
        self._program = program
        graphs = bundle.family.make_graphs(bundle.spec, bundle.config, load_weights(bundle.weights))
        self._denoise = graphs["denoise"].module.to(device)

    def prepare(self) -> None:
        """Take the process's threads; before every block that is timed."""
        torch.set_num_threads(self._threads)

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """Return the actions (H, A) of an episode's first observation, as the bundle's program gives them."""
        with torch.inference_mode(), torch.device(self._device):
            return self._chunk(observation, np.random.default_rng(seed))

    def _chunk(self, observation: Observation, rng: np.random.Generator) -> np.ndarray:
        config, spec, normalizer = self._config, self._program.sampler, self._program.normalizer
        sigmas = SCHEDULES[spec.schedule](spec.steps, self._program.levels)

        def noise() -> torch.Tensor:
            drawn = rng.standard_normal((config.horizon, config.action_width), dtype=np.float32)
            rows = torch.zeros(1, config.action_tokens, config.action_width)
            rows[:, : config.horizon] = torch.from_numpy(drawn).to(self._device)
            return rows

        assert observation.state is not None, "a BESO policy has a state"
        states = torch.zeros(1, config.window, config.state_width)
        states[:, 0] = torch.from_numpy(normalizer.normalize_state(observation.state)).to(self._device)
        goals = torch.from_numpy(self._goals(observation)).to(self._device)
        rows = len(goals)
        states = states.repeat(rows, 1, 1)

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            denoised = self._denoise(x.repeat(rows, 1, 1), torch.full((rows,), sigma), states, goals)
            return combine(denoised, spec.guidance)  # type: ignore[return-value]  # only arithmetic

        x = run(SAMPLERS[spec.sampler](noise() * sigmas[0], sigmas, noise), denoise)
        return normalizer.denormalize_action(normalizer.clip_action(x[0, : config.horizon].cpu().numpy()))

    def _goals(self, observation: Observation) -> np.ndarray:
        assert isinstance(observation.goal, np.ndarray), "drawn observations have a goal"
        goal = self._program.normalizer.normalize_state(observation.goal)
        goal[:, list(self._config.zeroed_goal_dims)] = 0
        return guided_goals(goal, self._program.sampler.guidance)


@lru_cache(maxsize=1)
def own_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read weights into memory in torch's own order, as a checkpoint gives them; two yardsticks may share them."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in load_weights(path).items()}
