"""Which experts serve which noise level: settled once per level, outside the network.

MoDE's routers see the noise level and nothing else, so their choice belongs to the schedule, not to the robot. Here it
is made in numpy from the routers' own weights, once for every level that a sampler will ask about, and handed to the
network by index. The network then holds no router, and no expert is ever copied: upstream fuses the chosen experts'
weights for each level instead, 12 GB for a released policy.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import Sigmas
from policy_models.mode.config import TransformerConfig

_erf = np.frompyfunc(math.erf, 1, 1)
_PREFIX = "denoiser.inner_model."


class Routes:
    """The routers of one policy."""

    def __init__(self, config: TransformerConfig, weights: Mapping[str, np.ndarray]) -> None:
        """Keep `weights`, which may be read lazily: the routers of a released policy are 100 MB."""
        self.config = config
        self._weights = weights

    def of(self, sigmas: Sequence[float], goal: np.ndarray | None = None) -> np.ndarray:
        """Route every noise level.

        Args:
            sigmas: Noise levels, (N,), all positive.
            goal: Embedded goal, (goal width,); policies without goal routing ignore it.

        Returns:
            Weight of every expert at every level, (N, blocks, kept) float32; 0 for experts that are not chosen. Where
            experts were merged, one that answers for several has the sum of their weights, and where blocks keep
            different numbers, zeros fill up the rest.
        """
        probabilities = self.probabilities(sigmas, goal)
        # A stable sort gives equal probabilities to the expert of lower number, on every machine.
        indices = np.argsort(-probabilities, axis=-1, kind="stable")[..., : self.config.top_k]
        route = np.zeros_like(probabilities)
        np.put_along_axis(route, indices, np.take_along_axis(probabilities, indices, -1), -1)
        route /= route.sum(-1, keepdims=True)
        if not self.config.merged:
            return route
        answers = np.eye(max(self.config.kept), dtype=np.float32)[np.array(self.config.merged)]  # (blocks, E, kept)
        return np.einsum("nbe,bek->nbk", route, answers)

    def probabilities(self, sigmas: Sequence[float], goal: np.ndarray | None = None) -> np.ndarray:
        """Return what every router gives each of its experts, (N, blocks, E) float32; arguments are those of `of`."""
        levels = np.log(np.asarray(sigmas, dtype=np.float32))[:, None] / 4
        c = (levels @ self._read("sigma_emb.weight").T + self._read("sigma_emb.bias")) @ self._read(
            "sigma_linear.weight"
        ).T
        if self.config.goal_routing and goal is not None:
            c = c + goal @ self._read("goal_emb.weight").T
        return np.stack([self._router(f"blocks.{i}.router.router.mlp", c) for i in range(self.config.layers)], axis=1)

    def _router(self, router: str, c: np.ndarray) -> np.ndarray:
        hidden = c @ self._read(f"{router}.0.weight").T + self._read(f"{router}.0.bias")
        hidden = hidden * 0.5 * (1 + _erf(hidden / math.sqrt(2)).astype(np.float32))  # GELU
        logits = hidden @ self._read(f"{router}.3.weight").T + self._read(f"{router}.3.bias")
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        return np.clip(odds / odds.sum(-1, keepdims=True), 1e-9, 1 - 1e-9)

    def _read(self, name: str) -> np.ndarray:
        return self._weights[_PREFIX + name]


def asked_levels(sampler: str, sigmas: Sigmas) -> tuple[float, ...]:
    """Return the noise levels that `sampler` asks about on its way down `sigmas`, in order of asking.

    They do not depend on what it is answered, so a dry run tells.
    """
    levels = []
    steps = SAMPLERS[sampler](np.zeros(1), sigmas, lambda: np.zeros(1))
    question = next(steps)
    while True:
        levels.append(question[1])
        try:
            question = steps.send(np.zeros(1))
        except StopIteration:
            return tuple(levels)
