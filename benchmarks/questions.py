"""Random observations with the answers that a server must give, whichever server it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.contenders import Contender
from benchmarks.robot_socket import frame_of
from policy_client.codec import pack, unpack
from policy_models.spec import Observation, PolicySpec
from policy_server import kserve
from policy_server.bundle import Bundle
from policy_server.golden import action_range, draw_observation
from policy_server.runtime.guard import Guard

# Tolerances are meant for the golden case; the worst of several observations may lie further off.
_SAME = 5.0


@dataclass(frozen=True, eq=False)
class Question:
    """One observation.

    Attributes:
        frame: What a robot sends, ready to be written to its socket.
        seed: What the chunk is drawn with.
        actions: The right answer, (H, A).
    """

    frame: bytes
    seed: int
    actions: np.ndarray


class Judge:
    """What the policy itself says, and how far others may be off it."""

    def __init__(self, bundle: Bundle, contender: Contender) -> None:
        assert bundle.spec.window == 1, "an answer must not depend on the observations before it"
        self._spec = bundle.spec
        self._contender = contender
        self._guard = Guard(bundle.name, bundle.spec)
        self._tolerance = _SAME * bundle.manifest.tolerance[contender.precision]

    def answer(self, observation: Observation, seed: int) -> np.ndarray:
        """Return the right actions, (H, A), within their limits."""
        return self._guard.check(self._contender.chunk(observation, seed)).actions

    def off(self, actions: np.ndarray, right: np.ndarray) -> float:
        """Return how far `actions` are from the right ones: 0 is bitwise the same, 1 as far as is allowed."""
        if actions.shape != right.shape or not np.isfinite(actions).all():
            return float("inf")
        held = self._guard.check(actions).actions
        return float(np.max(np.abs(held - right) / action_range(self._spec, right)) / self._tolerance)


class Examiner:
    """Questions about one policy, and what is a right answer to them."""

    def __init__(self, bundle: Bundle, contender: Contender, count: int, *, seed: int = 0) -> None:
        """Draw `count` questions and have `contender` answer them."""
        self._judge = Judge(bundle, contender)
        draw = np.random.default_rng(seed)
        self.questions = [self._draw(bundle.spec, draw) for _ in range(count)]

    def check(self, sample: Sequence[tuple[Question, bytes]]) -> int:
        """Return how many replies were looked at; raises ValueError if one of them is wrong."""
        for question, payload in sample:
            reply = unpack(payload)
            seed, off = reply["seed"], self._judge.off(reply["actions"], question.actions)
            if seed != question.seed or not off <= 1:
                raise ValueError(
                    f"a server answered seed {question.seed} with a chunk {reply['actions'].shape} of seed {seed} "
                    f"that is {off:.1f} times as far off as is allowed"
                )
        return len(sample)

    def _draw(self, spec: PolicySpec, draw: np.random.Generator) -> Question:
        observation, seed = draw_observation(spec, draw), int(draw.integers(2**63))
        frame = frame_of(pack({**inputs_of(observation), "options": {"seed": seed}}))
        return Question(frame, seed, self._judge.answer(observation, seed))


def inputs_of(observation: Observation) -> dict[str, Any]:
    """Return an observation as a robot would send it."""
    return kserve.unpack_request(kserve.pack_request(observation, {}), 0)
