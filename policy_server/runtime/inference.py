"""What answers observations: a program and an engine in this process, or a server elsewhere."""

from collections.abc import Callable
from typing import Protocol

from policy_models.program import Outcome, Tensors
from policy_models.spec import Observation, Reasoning, SamplingOptions
from policy_server.runtime.deadline import Deadline

# Is told what a policy has said so far, from the first word on.
Listen = Callable[[str], None]


class Inference(Protocol):
    """Answers the observations of one version of a policy, for many sessions at once. Used on the event loop."""

    @property
    def differentiable(self) -> bool:
        """Whether continuations may ask for gradients."""

    @property
    def capacity_hz(self) -> float:
        """How many chunks a second it can answer, as far as was measured."""

    @property
    def reachable(self) -> bool:
        """Whether it can answer now, as far as is known."""

    @property
    def thinks(self) -> bool:
        """Whether it is a `ThinkingInference`. If not, a policy that reasons does so within `infer`."""

    def begin(self) -> Tensors:
        """Return the memory of a session that has seen nothing; see `Program.begin`."""

    async def infer(
        self, observation: Observation, memory: Tensors, options: SamplingOptions, deadline: Deadline, tenant: str
    ) -> Outcome:
        """Answer one observation; cancelling this drops the work that is left. Tenants get equal shares.

        Raises:
            InvalidOption: The policy cannot be sampled like that.
            UnusableGoal: The policy can make nothing of the goal.
            Unavailable: It cannot be answered now, or not by the deadline.
        """

    def retire(self) -> None:
        """Give back what this version alone holds, since another has taken its place. May block."""

    def close(self) -> None:
        """Stop, since the server stops. May block."""


class ThinkingInference(Inference, Protocol):
    """One whose policy can say what it thinks, apart from acting on it."""

    async def reason(
        self,
        observation: Observation,
        *,
        until_s: float,
        tenant: str,
        listen: Listen | None = None,
        question: str | None = None,
    ) -> Reasoning:
        """Reason about one observation, behind whatever acts; see `ReasoningProgram.reason`.

        Args:
            listen: Called on the event loop.

        Raises:
            UnusableGoal: The policy can make nothing of the goal, or of the question.
            Unavailable: It cannot be answered now.
        """

    async def hear(self, observation: Observation, text: str, deadline: Deadline, tenant: str) -> Reasoning:
        """Take `text` for what was reasoned about an observation; raises as `infer` does."""
