"""How a chunk goes on from the one that the robot is playing: one class for each way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from policy_models.diffusion.continuity import Schedule, prefix_weights
from policy_models.spec import Continuation, PolicySpec
from policy_server.errors import InvalidOption
from policy_server.runtime.track import Sent, Track, rows_at, rows_left

_ROUNDING_STEPS = 1e-6


@dataclass(frozen=True)
class Moment:
    """When an observation was captured, and what the robot is at.

    Attributes:
        at_s: When it was captured; row 0 of its chunk is due then.
        delay_s: How long after that the chunk will begin to be played.
        playing: The chunk being played, if any.
        gradients: Whether the engine can differentiate.
    """

    at_s: float
    delay_s: float
    playing: Sent | None
    gradients: bool


@dataclass(frozen=True)
class Joint:
    """How one chunk was joined to the one before.

    Attributes:
        mode: The continuity's name.
        frozen: Rows held to the chunk before, since they will be played before this one arrives.
        overlap: Rows for which the chunk before says something too.
        delay_ms: The delay that this was reckoned with.
    """

    mode: str
    frozen: int = 0
    overlap: int = 0
    delay_ms: float = 0.0


class Continuity(Protocol):
    """A way to go on. Frozen, so that sessions can share it."""

    mode: ClassVar[str]
    denoises: ClassVar[bool]  # whether it acts on the denoising, and needs a policy that does that

    def begin(self, moment: Moment, spec: PolicySpec) -> Continuation | None:
        """Return what the sampler is to go on from; None for nothing."""

    def finish(self, said: np.ndarray, moment: Moment, track: Track, spec: PolicySpec) -> np.ndarray:
        """Return what is sent, (H, A), of what the policy said, (H, A)."""


class _AsItComes:
    def begin(self, moment: Moment, spec: PolicySpec) -> Continuation | None:
        return None

    def finish(self, said: np.ndarray, moment: Moment, track: Track, spec: PolicySpec) -> np.ndarray:
        return said


@dataclass(frozen=True)
class Replace(_AsItComes):
    """Whatever came before."""

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "replace"
    denoises: ClassVar[bool] = False


@dataclass(frozen=True)
class RealTimeChunking(_AsItComes):
    """Black et al. 2025; see `policy_models.diffusion.continuity`.

    Attributes:
        schedule: How the weights fall from the frozen rows to the free ones.
        overlap: Over how many rows they fall; None for an eighth of a chunk.
        strength: beta, the highest guidance weight. None for the default: no limit where the engine has gradients, and
            10 (LeRobot's) where it has none.
        noise: Part of the first noise that the denoising begins with. With less than 1 chunks are likelier, and differ
            less from each other.
    """

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "rtc"
    denoises: ClassVar[bool] = True

    schedule: Schedule = "exponential"
    overlap: Annotated[int, Field(ge=0, le=1000)] | None = None
    strength: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    noise: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5

    def begin(self, moment: Moment, spec: PolicySpec) -> Continuation | None:
        """See `Continuity.begin`."""
        plan = _plan(moment, spec)
        if plan is None:
            return None
        frozen = frozen_rows(moment, spec)
        falls_to = min(frozen + (spec.horizon // 8 if self.overlap is None else self.overlap), _left(moment, spec))
        weights = prefix_weights(spec.horizon, frozen, falls_to, self.schedule)
        default = 1e9 if moment.gradients else 10.0
        strength = default if self.strength is None else self.strength
        return Continuation(plan, weights, strength, moment.gradients, noise=self.noise)


@dataclass(frozen=True)
class WarmStart(_AsItComes):
    """Denoising begins at the chunk being played, with the noise of a lower level.

    Attributes:
        steps: How many of the policy's steps are taken.
    """

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "warm"
    denoises: ClassVar[bool] = True

    steps: Annotated[int, Field(ge=1, le=200)] = 2

    def begin(self, moment: Moment, spec: PolicySpec) -> Continuation | None:
        """See `Continuity.begin`."""
        plan = _plan(moment, spec)
        if plan is None:
            return None
        free = np.zeros(spec.horizon, dtype=np.float32)
        return Continuation(plan, free, strength=0.0, warm_steps=self.steps)


@dataclass(frozen=True)
class Ensemble(_AsItComes):
    """Temporal ensembling (Zhao et al. 2023, "ACT", section IV-A): the weighted mean of all chunks, moment by moment.

    Attributes:
        decay: m of the weights exp(-m i), i = 0 for the oldest chunk.
    """

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "ensemble"
    denoises: ClassVar[bool] = False

    decay: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.01

    def finish(self, said: np.ndarray, moment: Moment, track: Track, spec: PolicySpec) -> np.ndarray:
        """See `Continuity.finish`."""
        times_s = moment.at_s + spec.step_s * np.arange(spec.horizon)
        chunks = [sent for sent in track.all() if rows_left(sent, moment.at_s, spec.step_s)]
        total, weights = np.zeros_like(said), np.zeros((spec.horizon, 1), dtype=np.float32)
        for age, sent in enumerate(chunks):
            speaks = (np.arange(spec.horizon) < rows_left(sent, moment.at_s, spec.step_s))[:, None]
            weight = np.float32(math.exp(-self.decay * age)) * speaks
            total += weight * rows_at(sent.said, sent.at_s, times_s, spec.step_s)
            weights += weight
        newest = np.float32(math.exp(-self.decay * len(chunks)))
        mean: np.ndarray = (total + newest * said) / (weights + newest)
        return mean


CONTINUITIES: Mapping[str, type[Continuity]] = {
    way.mode: way for way in (Replace, RealTimeChunking, Ensemble, WarmStart)
}
REPLACE = Replace()


def read_continuity(raw: Any, spec: PolicySpec) -> Continuity:
    """Return the continuity that came over a wire: a mode, or a map with `mode` and its keys; raises InvalidOption."""
    keys = dict(raw) if isinstance(raw, Mapping) else {"mode": raw}
    mode = keys.pop("mode", None)
    if not isinstance(mode, str) or mode not in CONTINUITIES:
        raise InvalidOption(f"'continuity' is {mode!r}, expected one of {', '.join(CONTINUITIES)}")
    way = CONTINUITIES[mode]
    if way.denoises and spec.sampler is None:
        raise InvalidOption(f"'continuity' is {mode!r}, which acts on the denoising, and this policy does not denoise")
    try:
        return TypeAdapter(way).validate_python(keys)
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join(("continuity", *map(str, details["loc"])))
        raise InvalidOption(f"{where!r}: {details['msg']}, got {details['input']!r}") from error


def joint(continuity: Continuity, moment: Moment, spec: PolicySpec) -> Joint:
    """Return how a chunk of that moment is joined to the one before."""
    if moment.playing is None:
        return Joint(continuity.mode)
    frozen = frozen_rows(moment, spec) if isinstance(continuity, RealTimeChunking) else 0
    return Joint(continuity.mode, frozen, _left(moment, spec), 1e3 * moment.delay_s)


def _plan(moment: Moment, spec: PolicySpec) -> np.ndarray | None:
    """Return what the chunk being played says for the rows of the next one, (H, A); None if it says nothing."""
    if moment.playing is None or not _left(moment, spec):
        return None
    times_s = moment.at_s + spec.step_s * np.arange(spec.horizon)
    return rows_at(moment.playing.actions, moment.playing.at_s, times_s, spec.step_s)


def _left(moment: Moment, spec: PolicySpec) -> int:
    return 0 if moment.playing is None else rows_left(moment.playing, moment.at_s, spec.step_s)


def frozen_rows(moment: Moment, spec: PolicySpec) -> int:
    """Return how many rows of a chunk the robot plays of the chunk before, which still says something about them."""
    steps = math.ceil(max(0.0, moment.delay_s) / spec.step_s - _ROUNDING_STEPS)
    return min(steps, _left(moment, spec))
