"""What can drive a DiVLA policy, part by part: this project's engines, and eager torch (in `eager_divla`)."""

import os
import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from benchmarks.contenders import AUTO, EAGER
from policy_models.program import GraphCall, ReasoningProgram, Tensors
from policy_models.spec import Observation, Reasoning, SamplingOptions
from policy_server.bundle import Bundle
from policy_server.catalog import load_engine
from policy_server.engine.base import ENGINES, Engine
from policy_server.runtime.sampling import drive

EAGER_BF16 = "eager torch, bf16"
FAST_F32 = "openvino"
SERVED = ("openvino-bf16", FAST_F32, "onnx")
# The same for all, so that none has a core that another has not.
THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Said:
    """A reasoning, and how long it took.

    Attributes:
        reasoning: It.
        tokens: How many followed the first.
        tokens_ms: What they took.
        whole_ms: From the images to its features.
    """

    reasoning: Reasoning
    tokens: int
    tokens_ms: float
    whole_ms: float


class DivlaContender(Protocol):
    """One way to compute what a DiVLA policy computes.

    Attributes:
        engine: What runs the networks.
        precision: What it computes in.
    """

    engine: str
    precision: str

    def prepare(self) -> None:
        """Get ready for what is timed next; not timed."""

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """Reason, then act, as published; returns actions (H, A)."""

    def denoise(self, inputs: Tensors) -> np.ndarray:
        """Return one step of the head, (B, H, A)."""

    def sample(self, observation: Observation, context: np.ndarray, seed: int) -> np.ndarray:
        """Return the actions (H, A) of a head that is told `context`, (1, C): all steps and nothing else."""

    def reason(self, observation: Observation) -> Said:
        """Reason about an observation."""

    def act(self, observation: Observation, reasoning: Reasoning, seed: int, *, again: bool) -> np.ndarray:
        """Return the actions (H, A) that follow a reasoning about this observation.

        Args:
            again: Look and read again, as for an observation that the reasoning is not about.
        """


class ServedDivla:
    """The bundle's program over one of this project's engines."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.engine = engine.name
        self.precision = engine.precision
        self._engine = engine
        program = bundle.new_program()
        self._program: ReasoningProgram = program  # type: ignore[assignment]  # a DiVLA policy's

    def prepare(self) -> None:
        """Engines hold their threads."""

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """See `DivlaContender.chunk`."""
        return self.act(observation, self.reason(observation).reasoning, seed, again=False)

    def denoise(self, inputs: Tensors) -> np.ndarray:
        """See `DivlaContender.denoise`."""
        return self._engine.run("denoise", inputs)["denoised"]

    def sample(self, observation: Observation, context: np.ndarray, seed: int) -> np.ndarray:
        """See `DivlaContender.sample`."""
        told = Reasoning(about=observation, seen={"projected": context, "pooled": np.zeros_like(context)})
        return self.act(observation, told, seed, again=False)

    def reason(self, observation: Observation) -> Said:
        """See `DivlaContender.reason`."""
        began_s = time.perf_counter()
        dialogue = self._program.reason(observation, until_s=float("inf"))
        call: GraphCall = next(dialogue)
        tokens, first_at_s, last_at_s = 0, began_s, began_s
        while True:
            if call.graph == "speak":
                first_at_s = first_at_s if tokens else time.perf_counter()
                tokens += 1
            elif tokens:
                last_at_s = time.perf_counter()
            try:
                call = dialogue.send(self._engine.run(call.graph, call.inputs))
            except StopIteration as finished:
                whole_ms = 1e3 * (time.perf_counter() - began_s)
                return Said(finished.value, tokens, 1e3 * (last_at_s - first_at_s), whole_ms)

    def act(self, observation: Observation, reasoning: Reasoning, seed: int, *, again: bool) -> np.ndarray:
        """See `DivlaContender.act`."""
        known = replace(reasoning, about=None, seen={}) if again else reasoning
        options = SamplingOptions(seed, reasoning=known)
        actions: np.ndarray = drive(
            self._program.infer(observation, self._program.begin(), options), self._engine
        ).actions
        return actions


def make_divla(bundle: Bundle, name: str) -> DivlaContender:
    """Return `AUTO`, one of `ENGINES`, `EAGER` or `EAGER_BF16`; raises ImportError if its library is not installed."""
    if name == AUTO:
        return ServedDivla(bundle, load_engine(bundle, AUTO, THREADS).engine)
    if name in ENGINES:
        return ServedDivla(bundle, ENGINES[name].make(bundle, THREADS))
    from benchmarks.eager_divla import EagerDivla

    assert name in (EAGER, EAGER_BF16), "there is no other"
    return EagerDivla(bundle, THREADS, in_bfloat16=name == EAGER_BF16)
