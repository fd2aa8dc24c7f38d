"""What answers observations: a program and an engine in this process, or a server elsewhere."""

from typing import Protocol

from policy_models.program import Outcome, Tensors
from policy_models.spec import Observation, SamplingOptions
from policy_server.runtime.deadline import Deadline


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
