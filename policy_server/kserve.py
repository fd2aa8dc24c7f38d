"""The tensors by which a policy is asked on a Triton server, and answers: KServe v2, a row for each robot.

Written once here: the repository's configuration, the model that runs inside Triton and the gateway's client follow it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from policy_models.program import Outcome, Tensors
from policy_models.spec import Continuation, Observation, PolicySpec, Reasoning, SamplingOptions

ACTIONS = "actions"
# SHA-256 of the `policy.yaml` that answered, which holds the digest of every other file of the bundle.
BUNDLE = "bundle"
REASONING = "reasoning"  # what the actions were conditioned on, in words
STATE, GOAL, PROMPT = "state", "goal", "prompt"
# The chunk that the robot is playing, and how much each row of the next one is pulled towards it.
PLAN, WEIGHTS = "plan", "plan_weights"
# Parameters of a request that say how it is pulled; the others are options as every door has them.
PULL = ("strength", "noise", "warm_steps")
_IMAGE, _MEMORY = "image_", "memory_"

Kind = Literal["float32", "uint8", "int32", "int64", "text"]


@dataclass(frozen=True)
class Port:
    """One input or output of a policy's model.

    Attributes:
        name: The tensor's name.
        kind: Type of its elements.
        shape: Without the row axis.
        optional: Whether a request may leave it out.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    optional: bool = False


def input_ports(spec: PolicySpec, beginning: Tensors) -> tuple[Port, ...]:
    """Return what a request holds, for a policy whose sessions begin with the memory `beginning`."""
    images = [Port(_IMAGE + c.name, "uint8", (c.height, c.width, 3)) for c in spec.cameras]
    state = [Port(STATE, "float32", (spec.state.width,))] if spec.state else []
    plan = [Port(PLAN, "float32", (spec.horizon, spec.action.width), optional=True)] if spec.sampler else []
    weights = [Port(WEIGHTS, "float32", (spec.horizon,), optional=True)] if spec.sampler else []
    return (*images, *state, *_goal_port(spec), *_memory_ports(beginning, optional=True), *plan, *weights)


def output_ports(spec: PolicySpec, beginning: Tensors) -> tuple[Port, ...]:
    """Return what a reply holds."""
    actions = Port(ACTIONS, "float32", (spec.horizon, spec.action.width))
    words = (Port(REASONING, "text", (1,)),) if spec.reasoning else ()
    return (actions, Port(BUNDLE, "text", (1,)), *words, *_memory_ports(beginning, optional=False))


def pack_request(
    observation: Observation, memory: Tensors, continuation: Continuation | None = None
) -> dict[str, np.ndarray]:
    """Return the tensors of one robot's request, the row axis included; text is an array of bytes objects."""
    tensors = {_IMAGE + name: image for name, image in observation.images.items()}
    if observation.state is not None:
        tensors[STATE] = observation.state
    if isinstance(observation.goal, str):
        tensors[PROMPT] = _text(observation.goal)
    elif observation.goal is not None:
        tensors[GOAL] = observation.goal
    tensors.update({_MEMORY + name: array for name, array in memory.items()})
    if continuation is not None:
        tensors.update({PLAN: continuation.actions, WEIGHTS: continuation.weights})
    return {name: array[None] for name, array in tensors.items()}


def unpack_request(tensors: Tensors, row: int) -> dict[str, Any]:
    """Return one row of a request as a robot would have sent it: inputs by name, still to be checked."""
    inputs: dict[str, Any] = {}
    for name, array in tensors.items():
        if name == PROMPT:
            inputs[name] = array[row, 0].decode("utf-8", errors="replace")
        elif name not in (PLAN, WEIGHTS) and not name.startswith(_MEMORY):
            inputs[name.removeprefix(_IMAGE)] = array[row]
    return inputs


def unpack_memory(tensors: Tensors, row: int, beginning: Tensors) -> Tensors:
    """Return one row's memory; what is left out is as at the beginning of an episode."""
    if not beginning:
        return beginning
    return {
        name: tensors[_MEMORY + name][row] if _MEMORY + name in tensors else array for name, array in beginning.items()
    }


def unpack_continuation(
    tensors: Tensors, row: int, asked: Mapping[str, Any], *, gradients: bool
) -> Continuation | None:
    """Return what one row goes on from; None if it brings no plan.

    Args:
        tensors: Of the request.
        row: Which.
        asked: The request's parameters.
        gradients: Whether the engine can differentiate.
    """
    if PLAN not in tensors or WEIGHTS not in tensors:
        return None
    return Continuation(
        tensors[PLAN][row],
        tensors[WEIGHTS][row],
        strength=float(asked.get("strength", 0.0)),
        gradients=gradients,
        warm_steps=asked.get("warm_steps"),
        noise=float(asked.get("noise", 1.0)),
    )


def pack_reply(outcome: Outcome, bundle: str) -> dict[str, np.ndarray]:
    """Return the tensors of one row of a reply, without the row axis."""
    words = {} if outcome.reasoning is None else {REASONING: _text(outcome.reasoning.text)}
    memory = {_MEMORY + name: array for name, array in outcome.memory.items()}
    return {ACTIONS: outcome.actions, BUNDLE: _text(bundle), **words, **memory}


def unpack_reply(tensors: Tensors, memory: Tensors) -> Outcome:
    """Return the outcome in a reply of one row; `memory` has the names of the session's."""
    said = tensors.get(REASONING)
    reasoning = None if said is None else Reasoning(said[0, 0].decode("utf-8", errors="replace"), ended="complete")
    return Outcome(tensors[ACTIONS][0], unpack_memory(tensors, 0, memory), reasoning)


def pack_options(options: SamplingOptions) -> dict[str, int | str]:
    """Return the request parameters that ask for `options`."""
    asked = {"steps": options.steps, "sampler": options.sampler}
    # Servers older than 24.09 know no numbers with a fraction.
    guidance = None if options.guidance is None else repr(float(options.guidance))
    chunk = options.continuation
    joined: dict[str, int | str | None] = {}
    if chunk is not None:
        joined = {"strength": repr(chunk.strength), "noise": repr(chunk.noise), "warm_steps": chunk.warm_steps}
    every = {**asked, "guidance": guidance, **joined}
    return {"seed": options.seed, **{name: value for name, value in every.items() if value is not None}}


def _goal_port(spec: PolicySpec) -> tuple[Port, ...]:
    optional = not spec.goal.required
    if spec.goal.kind == "text":
        return (Port(PROMPT, "text", (1,), optional),)
    if spec.goal.kind == "image":
        assert spec.goal.camera is not None, "the spec was checked when it was read"
        return (Port(GOAL, "uint8", (spec.goal.camera.height, spec.goal.camera.width, 3), optional),)
    if spec.goal.kind == "state":
        assert spec.state is not None, "the spec was checked when it was read"
        return (Port(GOAL, "float32", (spec.goal.length, spec.state.width), optional),)
    return ()


def _memory_ports(beginning: Tensors, *, optional: bool) -> tuple[Port, ...]:
    kinds: Mapping[str, Kind] = {"float32": "float32", "int32": "int32"}
    return tuple(Port(_MEMORY + name, kinds[a.dtype.name], a.shape, optional) for name, a in beginning.items())


def _text(text: str) -> np.ndarray:
    return np.array([text.encode()], dtype=object)
