"""How a policy turns an observation into actions, as a dialogue with whoever runs its graphs.

A program is the part of a policy that is not a neural network: windows, normalisation, the sampler loop, clipping. It
never runs a graph. It yields a `GraphCall` and is sent the graph's outputs, so one text serves every engine, calls of
several robots can share a batch, and a request can be dropped between two steps. No torch here.
"""

from collections.abc import Generator, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from policy_models.normalizer import Normalizer
from policy_models.spec import Observation, PolicySpec, Reasoning, SamplingOptions

Tensors = Mapping[str, np.ndarray]

# Name of the output that answers a call's cotangent, of the input that it is the gradient of, and of the cotangent
# where it is an input itself.
GRADIENT, DIFFERENTIATED, COTANGENT = "gradient", "noisy", "cotangent"


class UnsuitableOptions(ValueError):
    """The options of a request cannot be had from this policy; says why."""


class UnsuitableGoal(ValueError):
    """The goal of a request cannot be given to this policy; says why."""


@dataclass(frozen=True)
class Assets:
    """What a bundle holds for its program, besides spec and configuration.

    Attributes:
        normalizer: Scales states and actions; None for policies that need no scaling.
        tokenizer: The text of `tokenizer.json`, for policies that read instructions.
        weights: The networks' weights by name, each read when it is asked for.
    """

    normalizer: Normalizer | None = None
    tokenizer: str | None = None
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphCall:
    """A question to a compiled graph.

    Attributes:
        graph: The graph's name in the bundle, such as "denoise".
        inputs: Named tensors; the first axis of each is the row axis, of equal length in all.
        way: Calls of the same graph and the same way cost less in one run than calls of different ways, since they take
            the same branches; None where there are no branches.
        cotangent: Shaped like the graph's first output. The answer then holds as `GRADIENT` what it gives multiplied by
            the Jacobian of that output by the input `DIFFERENTIATED`. Only engines that are differentiable do this.
        said: What the policy has said so far, from the first word on, if it has said more since its last call.
    """

    graph: str
    inputs: Tensors
    way: Hashable = None
    cotangent: np.ndarray | None = None
    said: str = ""


class Steered(Protocol):
    """A torch module that is told its way before it runs, so that one recording serves every call of the same way."""

    def steer(self, inputs: Tensors) -> Hashable:
        """Take the way that these inputs ask for, by name, until the next call; the same way has an equal result."""

    def __call__(self, *inputs: Any) -> Any:
        """Run it; values of inputs on the device decide about nothing but values."""


@dataclass(frozen=True)
class Graph:
    """One function of a policy as a torch module, ready to be exported or run.

    Attributes:
        module: A torch module in evaluation mode; it takes the inputs in their order here.
        inputs: Example tensors of batch 2 by name; their first axis is the dynamic batch.
        outputs: Names of what it returns, in order.
        exported: The same function in the form that compiles best, if that is not `module` itself.
        steered: The same function in the form that can be recorded, if the values of inputs decide what `module` runs.
        differentiated: The same function in a form without branches, for its gradient by `DIFFERENTIATED`; None if that
            is not to be exported.
        lengths: Axes of inputs, besides the first, that may have any length: input, axis, and a name that axes of equal
            length share.
    """

    module: Any
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    exported: Any = None
    steered: Steered | None = None
    differentiated: Any = None
    lengths: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a finished program leaves behind.

    Attributes:
        actions: (H, A) float32, in the robot's units.
        memory: What the session must hand to the next request; see `Program.begin`.
        reasoning: What conditioned the actions; None for policies that do not reason.
        collision: Probability of a collision in each direction of `PolicySpec.collision`, (rows, columns) float32; None
            for policies that predict none.
    """

    actions: np.ndarray
    memory: Tensors
    reasoning: Reasoning | None = None
    collision: np.ndarray | None = None


Dialogue = Generator[GraphCall, Tensors, Outcome]
Thought = Generator[GraphCall, Tensors, Reasoning]


class Program(Protocol):
    """One policy's way from observation to chunk."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy needs and gives."""

    def begin(self) -> Tensors:
        """Return the memory of a session that has seen nothing.

        A memory is named arrays of shapes that never change, so that it can travel to wherever the policy runs; empty
        for a policy that looks at the newest observation alone. Memories are immutable.
        """

    def infer(self, observation: Observation, memory: Tensors, options: SamplingOptions) -> Dialogue:
        """Answer one observation.

        What comes before the first graph call runs on the server's event loop, so it must take microseconds: images go
        into graphs as they are.

        Args:
            observation: Fits `spec`.
            memory: From `begin`, or from the session's last Outcome.
            options: What the request asks for.

        Raises:
            UnsuitableOptions: The dialogue raises it when it is begun.
            UnsuitableGoal: Likewise.
        """


class ReasoningProgram(Program, Protocol):
    """A program that can say what it thinks, apart from acting on it.

    Its `infer` reasons first, unless `SamplingOptions.reasoning` says what to act on.
    """

    def reason(self, observation: Observation, *, until_s: float, question: str | None = None) -> Thought:
        """Reason about one observation, a token at a time; what it says travels in `GraphCall.said`.

        Args:
            observation: Fits `spec`.
            until_s: Monotonic time from which on no further token is asked for.
            question: Asked in place of the instruction; what it says is then an answer.

        Raises:
            UnsuitableGoal: The dialogue raises it when it is begun.
        """

    def hear(self, observation: Observation, text: str) -> Thought:
        """Take `text` for what was reasoned about an observation; raises as `reason` does."""
