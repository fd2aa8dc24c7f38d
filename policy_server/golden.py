"""The golden case: one observation with the chunk it must give, replayed by every engine before it serves.

`golden.npz` holds `state`, `goal` and one array per camera (`images/<name>`) as far as the spec has them, the `seed`,
and `actions`, the chunk that the network gave in torch float32 when the bundle was made.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np

from policy_models.program import Dialogue, GraphCall, Program, ReasoningProgram
from policy_models.spec import CameraSpec, Observation, PolicySpec, SamplingOptions
from policy_server.engine.base import Engine
from policy_server.errors import BundleInvalid, GoldenDrift
from policy_server.runtime.sampling import answer, drive


def write_golden(path: Path, program: Program, engine: Engine, *, seed: int, draw: np.random.Generator) -> None:
    """Draw a random observation that fits the spec, answer it with `engine`, and save both."""
    observation = draw_observation(program.spec, draw)
    outcome = drive(answering(program, observation, seed), engine)
    arrays: dict[str, Any] = {f"images/{name}": image for name, image in observation.images.items()}
    for name in ("state", "goal"):
        value = getattr(observation, name)
        if value is not None:
            arrays[name] = np.asarray(value)
    np.savez_compressed(path, seed=np.int64(seed), actions=outcome.actions, **arrays)


def draw_observation(spec: PolicySpec, draw: np.random.Generator) -> Observation:
    """Return a random observation: states within their limits where there are any, else standard normal."""

    def state(rows: int) -> np.ndarray:
        assert spec.state is not None
        if spec.state.low and spec.state.high:
            return draw.uniform(spec.state.low, spec.state.high, (rows, spec.state.width)).astype(np.float32)
        return draw.standard_normal((rows, spec.state.width), dtype=np.float32)

    def image(camera: CameraSpec) -> np.ndarray:
        return draw.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)

    def goal() -> np.ndarray | str | None:
        if spec.goal.kind == "state":
            return state(spec.goal.length)
        if spec.goal.kind == "image":
            assert spec.goal.camera is not None
            return image(spec.goal.camera)
        return str(draw.choice(spec.goal.examples or ("pick up the block",))) if spec.goal.kind == "text" else None

    return Observation(
        images={c.name: image(c) for c in spec.cameras},
        state=state(1)[0] if spec.state else None,
        goal=goal(),
    )


def answering(program: Program, observation: Observation, seed: int) -> Dialogue:
    """Answer an observation; whoever reasons takes all the time it needs, so that slow engines agree with others."""
    reasoning = None
    if program.spec.reasoning is not None:
        reasoning = yield from cast(ReasoningProgram, program).reason(observation, until_s=math.inf)
    return (yield from program.infer(observation, program.begin(), SamplingOptions(seed, reasoning=reasoning)))


class GoldenCase:
    """One bundle's golden case."""

    def __init__(self, path: Path) -> None:
        """Read `golden.npz`; raises BundleInvalid if it is not one."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays: Mapping[str, np.ndarray] = dict(arrays)
            self.seed = int(self._arrays["seed"])
            self.actions = self._arrays["actions"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise BundleInvalid(f"{path} is not a golden case: {error}") from error

    def observation(self) -> Observation:
        """Return what the golden chunk answers."""
        images = {k.removeprefix("images/"): v for k, v in self._arrays.items() if k.startswith("images/")}
        goal = self._arrays.get("goal")
        return Observation(
            images, self._arrays.get("state"), str(goal) if goal is not None and goal.dtype.kind == "U" else goal
        )

    def inputs(self) -> dict[str, Any]:
        """Return the same observation as a robot would send it."""
        observation = self.observation()
        inputs: dict[str, Any] = dict(observation.images)
        if observation.state is not None:
            inputs["state"] = observation.state
        if observation.goal is not None:
            inputs["prompt" if isinstance(observation.goal, str) else "goal"] = observation.goal
        return inputs

    def drift(self, program: Program, engine: Engine) -> float:
        """Replay the case; return the largest deviation as a fraction of each action's range."""
        outcome = drive(answering(program, self.observation(), self.seed), engine)
        return self.drift_of(outcome.actions, program.spec)

    def calls(self, program: Program, engine: Engine) -> list[GraphCall]:
        """Return the calls that the case takes, in their order."""
        calls: list[GraphCall] = []
        dialogue = answering(program, self.observation(), self.seed)
        with contextlib.suppress(StopIteration):
            calls.append(next(dialogue))
            while True:
                calls.append(dialogue.send(answer(calls[-1], engine)))
        return calls

    def drift_of(self, actions: np.ndarray, spec: PolicySpec) -> float:
        """Return how far `actions`, (H, A), are from the golden chunk, as a fraction of each action's range."""
        if actions.shape != self.actions.shape:
            raise BundleInvalid(f"the golden chunk has shape {self.actions.shape}, the policy gives {actions.shape}")
        drift = float(np.max(np.abs(actions - self.actions) / action_range(spec, self.actions)))
        return drift if np.isfinite(drift) else float("inf")


def check_golden(
    name: str, case: GoldenCase, program: Program, engine: Engine, tolerance: Mapping[str, float]
) -> float:
    """Return the drift of an engine; raises GoldenDrift if it is more than the bundle tolerates."""
    drift = case.drift(program, engine)
    check_drift(name, engine.name, drift, tolerance.get(engine.precision, 0.0))
    return drift


def check_drift(name: str, engine: str, drift: float, allowed: float) -> None:
    """Raise GoldenDrift if `drift` is more than `allowed`."""
    if drift > allowed:
        raise GoldenDrift(name, engine, drift, allowed)


def action_range(spec: PolicySpec, actions: np.ndarray) -> np.ndarray:
    """Return how far each action can go, (A,): by the limits, else by a chunk (H, A), at least 1."""
    if spec.action.low and spec.action.high:
        span: np.ndarray = np.subtract(spec.action.high, spec.action.low)
    else:
        span = np.fmax(np.ptp(actions, axis=0), 1.0)
    return span
