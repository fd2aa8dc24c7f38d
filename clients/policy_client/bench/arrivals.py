"""When robots send their observations: open loop, decided before the test begins, whatever the server does.

Every pattern is a pure function of a seed and a robot's number, so that worker processes need not talk to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Times: TypeAlias = NDArray[np.float64]  # seconds since the test began, in order


class Arrivals(Protocol):
    """A pattern of sending."""

    def times(self, robot: int, seconds: float, seed: int) -> Times:
        """Return when one robot sends within `seconds`, in seconds since the beginning, in order."""

    def rate_at(self, seconds: float) -> float:
        """Return the mean rate of one robot over a test of `seconds`, in Hz."""


@dataclass(frozen=True)
class Periodic:
    """A control loop: one observation each period, at a phase of the robot's own."""

    rate_hz: float

    def times(self, robot: int, seconds: float, seed: int) -> Times:
        """Return the ticks of a robot's loop."""
        phase = _generator(robot, seed).random()
        ticks = np.arange(np.ceil(seconds * self.rate_hz), dtype=np.float64)
        return _within((phase + ticks) / self.rate_hz, seconds)

    def rate_at(self, seconds: float) -> float:
        """Return the rate of the loop."""
        return self.rate_hz


@dataclass(frozen=True)
class Poisson:
    """Requests that know nothing of each other: exponential pauses, the usual model of many independent clients."""

    rate_hz: float

    def times(self, robot: int, seconds: float, seed: int) -> Times:
        """Return as many moments as chance has it, spread evenly over the test."""
        draw = _generator(robot, seed)
        return np.sort(draw.uniform(0, seconds, draw.poisson(self.rate_hz * seconds)))

    def rate_at(self, seconds: float) -> float:
        """Return the expected rate."""
        return self.rate_hz


@dataclass(frozen=True)
class Bursts:
    """Several observations at once, then a pause; bursts of one robot come periodically, at a phase of its own."""

    rate_hz: float
    size: int

    def times(self, robot: int, seconds: float, seed: int) -> Times:
        """Return the moment of each burst `size` times."""
        return np.repeat(Periodic(self.rate_hz / self.size).times(robot, seconds, seed), self.size)

    def rate_at(self, seconds: float) -> float:
        """Return the mean rate, pauses included."""
        return self.rate_hz


@dataclass(frozen=True)
class Ramp:
    """A control loop whose rate rises, or falls, evenly from the beginning to the end of the test."""

    from_hz: float
    to_hz: float

    def times(self, robot: int, seconds: float, seed: int) -> Times:
        """Return the moments at which the integral of the rate passes whole numbers and the robot's phase."""
        phase = _generator(robot, seed).random()
        wanted = phase + np.arange(np.ceil(self.rate_at(seconds) * seconds))
        slope = (self.to_hz - self.from_hz) / seconds
        # Solves from_hz t + slope t^2 / 2 = wanted in the form that is also right where the slope is 0.
        root = np.sqrt(np.maximum(self.from_hz**2 + 2 * slope * wanted, 0))
        return _within(2 * wanted / (self.from_hz + root), seconds)

    def rate_at(self, seconds: float) -> float:
        """Return the mean of both ends."""
        return (self.from_hz + self.to_hz) / 2


@dataclass(frozen=True)
class Trace:
    """What was recorded, again: robot n takes the trace's robot n, and begins anew with the first after the last.

    Attributes:
        robots: For each recorded robot its moments in seconds, in order.
    """

    robots: tuple[tuple[float, ...], ...]

    def times(self, robot: int, seconds: float, seed: int) -> Times:
        """Return what the robot's recording holds of the first `seconds`."""
        return _within(np.array(self.robots[robot % len(self.robots)], np.float64), seconds)

    def rate_at(self, seconds: float) -> float:
        """Return the mean rate of the recorded robots."""
        return float(np.mean([np.searchsorted(times, seconds) for times in self.robots])) / seconds


def read_trace(path: Path) -> Trace:
    """Read a trace: lines of `seconds` or `seconds robot`, separated by blanks or commas; `#` begins a comment.

    Raises:
        ValueError: The file holds something else, or nothing.
    """
    robots: dict[str, list[float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            time_s = float(words[0])
        except ValueError:
            time_s = -1.0
        if not 0 <= time_s < np.inf or len(words) > 2:
            raise ValueError(f"{path}, line {number}: {line!r}, expected 'seconds' or 'seconds robot'")
        robots.setdefault(words[1] if len(words) == 2 else "", []).append(time_s)
    if not robots:
        raise ValueError(f"{path} holds no times, expected lines of 'seconds' or 'seconds robot'")
    return Trace(tuple(tuple(sorted(times)) for times in robots.values()))


def read_arrivals(text: str, rate_hz: float) -> Arrivals:
    """Return the pattern that a command line names: periodic, poisson, bursts:SIZE, ramp:FROM..TO or trace:FILE.

    Raises:
        ValueError: There is no such pattern.
    """
    kind, _, detail = text.partition(":")
    if kind == "periodic" and not detail:
        return Periodic(rate_hz)
    if kind == "poisson" and not detail:
        return Poisson(rate_hz)
    if kind == "bursts" and detail.isdecimal() and int(detail) > 0:
        return Bursts(rate_hz, int(detail))
    if kind == "ramp":
        low, _, high = detail.partition("..")
        try:
            ramp = Ramp(float(low), float(high))
        except ValueError:
            ramp = Ramp(0.0, 0.0)
        if min(ramp.from_hz, ramp.to_hz) >= 0 and 0 < ramp.from_hz + ramp.to_hz < np.inf:
            return ramp
    if kind == "trace" and detail:
        return read_trace(Path(detail))
    raise ValueError(f"arrivals {text!r}, expected periodic, poisson, bursts:SIZE, ramp:FROM..TO or trace:FILE")


def _generator(robot: int, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, robot))


def _within(times: Times, seconds: float) -> Times:
    return times[times < seconds]
