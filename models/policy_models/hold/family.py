"""The program of a policy that keeps a robot where it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy_models.program import Assets, Dialogue, Graph, Outcome, Tensors
from policy_models.spec import Observation, PolicySpec, SamplingOptions


@dataclass(frozen=True)
class Config:
    """Nothing to configure."""

    __pydantic_config__ = {"extra": "forbid"}


class HoldProgram:
    """Repeats the first A numbers of the state, H times."""

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec

    def begin(self) -> Tensors:
        """A hold remembers nothing."""
        return {}

    def infer(self, observation: Observation, memory: Tensors, options: SamplingOptions) -> Dialogue:
        """Answer at once, without asking any graph."""
        assert observation.state is not None, "the observation was checked against the spec"
        actions = np.empty((self.spec.horizon, self.spec.action.width), dtype=np.float32)
        actions[:] = observation.state[: self.spec.action.width]
        # A dialogue of no questions.
        yield from ()
        return Outcome(actions, memory)


def make_program(spec: PolicySpec, config: Config, assets: Assets) -> HoldProgram:
    """Return the program of one bundle; raises ValueError if the state is too narrow to hold."""
    if spec.state is None or spec.state.width < spec.action.width:
        raise ValueError(f"hold repeats the state as the action, so it needs {spec.action.width} state numbers or more")
    return HoldProgram(spec)


def make_graphs(spec: PolicySpec, config: Config, weights: Mapping[str, Any]) -> dict[str, Graph]:
    """There are none."""
    return {}
