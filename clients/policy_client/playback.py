"""One run of a player, without threads, sockets or clocks."""

from __future__ import annotations

import enum
import math
from collections import Counter
from dataclasses import dataclass, replace

from policy_client.buffer import ChunkBuffer
from policy_client.chunk import Action
from policy_client.errors import OutOfActions
from policy_client.latency import LatencyQuantile
from policy_client.sources import Arrival
from policy_client.watchdog import StopRule


class PlayerState(enum.Enum):
    """What a player is doing."""

    WAITING = "waiting"  # for the first chunk
    PLAYING = "playing"
    STALLED = "stalled"  # actions have run out: the stop rule makes them
    STOPPED = "stopped"  # not begun, or over


@dataclass(frozen=True)
class PlayerStats:
    """What happened in a run so far."""

    ticks: int = 0
    ticks_skipped: int = 0  # the loop's body overran them
    stalls: int = 0  # times that actions ran out
    stalled_ticks: int = 0
    chunks: int = 0
    requests: int = 0
    errors: int = 0  # requests that failed
    latency_ms: float | None = None  # quantile of recent answers, None before the second chunk
    remaining_s: float = 0.0  # for how long from the last tick actions are due


@dataclass(frozen=True)
class Pace:
    """When the next chunk is asked for.

    Args:
        margin_s: How many seconds of actions shall be left when the next chunk comes, if it takes as long as usual.
        execute_s: Ask once a chunk has been played for so long, though more remains: 0 is without pause, None never.

    Raises:
        ValueError: A time below 0.
    """

    margin_s: float = 0.05
    execute_s: float | None = None

    def __post_init__(self) -> None:
        for name, value_s in (("margin_s", self.margin_s), ("execute_s", self.execute_s or 0.0)):
            if not value_s >= 0:
                raise ValueError(f"{name} is {value_s}, expected 0 or more")


class Playback:
    """What is played, when more is wanted, and what happened. Times are monotonic seconds, given by the caller.

    Args:
        rate_hz: Ticks per second.
        pace: When the next chunk is wanted.
        latency: How long answers take; told of each.
        buffer: Holds the chunk being played.
        stop: Makes the actions of ticks for which none is due.
        give_up_s: For how long it may do so, None for ever.

    Raises:
        ValueError: A rate that is not positive.
    """

    def __init__(
        self,
        *,
        rate_hz: float,
        pace: Pace,
        latency: LatencyQuantile,
        buffer: ChunkBuffer,
        stop: StopRule,
        give_up_s: float | None,
    ) -> None:
        if not 0 < rate_hz < math.inf:
            raise ValueError(f"rate_hz is {rate_hz}, expected a positive number")
        self.rate_hz = rate_hz
        self.state = PlayerState.WAITING
        self.playing = 0  # number of the chunk being played, 0 for the first
        self._pace, self._latency, self._buffer = pace, latency, buffer
        self._stop, self._give_up_s = stop, give_up_s
        self._start_s = self._since_s = self._now_s = 0.0
        self._last: Action | None = None
        self._counts: Counter[str] = Counter()

    @property
    def stats(self) -> PlayerStats:
        """What happened so far."""
        latency_s = self._latency.value_s(self._now_s)
        return PlayerStats(
            **self._counts,
            latency_ms=None if latency_s is None else 1e3 * latency_s,
            remaining_s=self._buffer.remaining_s(self._now_s),
        )

    def begin(self, first: Arrival, now_s: float) -> None:
        """Play the first chunk, from its first action on: the robot stood still while it was made.

        How long it took says nothing of those to come. It is dated anew, which the server does not know: what comes
        next cannot go on from it, and so `playing` stays 0.
        """
        self._start_s = self._since_s = self._now_s = now_s
        self._buffer.push(replace(first.chunk, made_at_s=now_s))
        self._last = first.chunk.actions[0]
        self._counts["chunks"] += 1

    def take(self, arrival: Arrival, now_s: float) -> None:
        """Play a chunk from the row due on, unless it answers an older observation than the one being played."""
        self._latency.add(arrival.latency_s, now_s)
        self._counts["chunks"] += 1
        if self._buffer.push(arrival.chunk):
            self.playing, self._since_s = arrival.seq, now_s

    def wants_more(self, now_s: float) -> bool:
        """Return whether it is time to ask for the next chunk."""
        latency_s = self._latency.value_s(now_s)
        if latency_s is None:  # nobody knows yet how long it takes
            return True
        # An answer is noticed at the tick after it has come.
        if self._buffer.remaining_s(now_s) < latency_s + self._pace.margin_s + 1 / self.rate_hz:
            return True
        played_s = now_s - self._since_s + _ROUNDING_S
        return self._pace.execute_s is not None and played_s >= self._pace.execute_s

    def delay_s(self, now_s: float) -> float | None:
        """Return how long after `now_s` the answer to an observation of now will begin to be played."""
        latency_s = self._latency.value_s(now_s)
        return None if latency_s is None else math.ceil(latency_s * self.rate_hz - _ROUNDING_S) / self.rate_hz

    def asked(self) -> None:
        """Note that a chunk was asked for."""
        self._counts["requests"] += 1

    def failed(self) -> None:
        """Note that a request failed."""
        self._counts["errors"] += 1

    def action(self, now_s: float) -> Action:
        """Return the action of this tick, (A,).

        Raises:
            OutOfActions: No action has been due for longer than `give_up_s`.
        """
        assert self._last is not None, "played before the first chunk"
        self._now_s = now_s
        self._counts["ticks"] += 1
        due = self._buffer.action_at(now_s)
        if due is not None:
            self.state, self._last = PlayerState.PLAYING, due
            return due
        self._counts["stalls"] += self.state is not PlayerState.STALLED
        self._counts["stalled_ticks"] += 1
        self.state = PlayerState.STALLED
        stalled_s = self._stalled_s(now_s)
        if self._give_up_s is not None and stalled_s > self._give_up_s:
            raise OutOfActions(f"no action has been due for {stalled_s:.3f} s, given up after {self._give_up_s:g} s")
        return self._stop.action(self._last, stalled_s)

    def tick_s(self, tick: int) -> float:
        """Return when a tick is due: ticks are whole multiples of the period from the first, and cannot drift."""
        return self._start_s + tick / self.rate_hz

    def tick_after(self, tick: int, now_s: float) -> int:
        """Return the tick to run next; one that is late by more than half a period is skipped, and counted."""
        following = max(tick + 1, math.ceil((now_s - self._start_s) * self.rate_hz - 0.5))
        self._counts["ticks_skipped"] += following - tick - 1
        return following

    def _stalled_s(self, now_s: float) -> float:
        assert self._buffer.chunk is not None, "stalled before the first chunk"
        return max(0.0, now_s - self._buffer.chunk.ends_at_s)


_ROUNDING_S = 1e-9
