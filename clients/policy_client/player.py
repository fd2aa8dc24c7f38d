"""Plays chunks: the action due now, while the next chunk is being computed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, Unpack

from policy_client.chunk import Action, ActionChunk
from policy_client.errors import PolicyClientError
from policy_client.protocol import InferOptions

logger = logging.getLogger(__name__)

Observation = Mapping[str, Any]


class Policy(Protocol):
    """Anything that answers an observation with a chunk: `PolicyClient`, or a policy in this process."""

    def infer(self, observation: Observation, **options: Unpack[InferOptions]) -> ActionChunk:
        """Return the actions that follow `observation`."""


class Clock(Protocol):
    """The time a player lives by."""

    def now_s(self) -> float:
        """Return the time in seconds; it never goes back."""

    def sleep_until(self, when_s: float) -> None:
        """Wait until `when_s`; return at once if it has passed."""


class MonotonicClock:
    """The monotonic clock of this machine."""

    def now_s(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def sleep_until(self, when_s: float) -> None:
        """Wait until `when_s`; return at once if it has passed."""
        time.sleep(max(0.0, when_s - time.monotonic()))


class ChunkBuffer:
    """Holds the newest chunk. Times are monotonic seconds, given by the caller. Not for several threads."""

    def __init__(self) -> None:
        self.chunk: ActionChunk | None = None

    def push(self, chunk: ActionChunk) -> bool:
        """Take `chunk` for the one held, unless it answers an older observation; return whether taken."""
        if self.chunk is not None and chunk.made_at_s < self.chunk.made_at_s:
            return False
        self.chunk = chunk
        return True

    def action_at(self, now_s: float) -> Action | None:
        """Return the action due at `now_s`, (A,), or None before any chunk and once it has run out."""
        return None if self.chunk is None else self.chunk.action_at(now_s)

    def remaining_s(self, now_s: float) -> float:
        """Return for how long from `now_s` actions will be due, 0 if none is."""
        return 0.0 if self.chunk is None else max(0.0, self.chunk.ends_at_s - now_s)


def repeat_last(action: Action) -> Action:
    """Hold by repeating the last action: right where actions are positions, wrong for velocities."""
    return action


class ChunkPlayer:
    """Drives a control loop from a policy that is slower than the loop.

    Args:
        policy: Asked for chunks, from a thread of the player's own.
        refill_s: Ask for the next chunk when fewer seconds of actions remain. Less than an answer takes, and
            the robot holds in between; more than a chunk lasts, and the policy is asked without pause.
        hold: Makes the action of a tick for which none is due, (A,), from the action of the tick before,
            (A,).
        clock: The time to live by.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        refill_s: float,
        hold: Callable[[Action], Action] = repeat_last,
        clock: Clock | None = None,
    ) -> None:
        self._policy = policy
        self._refill_s = refill_s
        self._hold = hold
        self._clock = clock or MonotonicClock()

    def run(
        self, get_observation: Callable[[], Observation], *, rate_hz: float, **options: Unpack[InferOptions]
    ) -> Iterator[Action]:
        """Yield the action due at each tick, (A,) read-only, for ever: `for action in player.run(...)`.

        Ticks are at whole multiples of 1 / `rate_hz` from the first; ticks that the loop's body overran are
        skipped. Only the first chunk is waited for. The loop begins when it is there, as if observed then,
        since the robot stood still meanwhile. A later request that fails is logged, and made again at the
        next tick.

        Args:
            get_observation: Returns the observation of this moment; called in the loop's thread.
            rate_hz: Ticks per second.
            **options: Passed to `infer`.

        Raises:
            PolicyClientError: The first chunk could not be had.
            TypeError, ValueError, OverflowError: An observation or option cannot be sent.
        """
        first = self._policy.infer(get_observation(), **options)
        start_s = self._clock.now_s()
        buffer = ChunkBuffer()
        buffer.push(replace(first, made_at_s=start_s))
        action = first.actions[0]
        refill: Future[ActionChunk] | None = None
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chunk-refill")
        try:
            tick = 0
            while True:
                tick_s = start_s + tick / rate_hz
                if refill is not None and refill.done():
                    _take(refill, buffer)
                    refill = None
                if refill is None and buffer.remaining_s(tick_s) < self._refill_s:
                    refill = executor.submit(self._infer, get_observation(), tick_s, options)
                due = buffer.action_at(tick_s)
                action = self._hold(action) if due is None else due
                yield action
                tick = max(tick + 1, math.ceil((self._clock.now_s() - start_s) * rate_hz))
                self._clock.sleep_until(start_s + tick / rate_hz)
        finally:
            # The request in progress ends by its own timeout, or when the client is closed.
            executor.shutdown(wait=False, cancel_futures=True)

    def _infer(self, observation: Observation, observed_at_s: float, options: InferOptions) -> ActionChunk:
        # Dated by the tick, not by the client: steps that match the rate then begin exactly on later ticks.
        return replace(self._policy.infer(observation, **options), made_at_s=observed_at_s)


def _take(refill: Future[ActionChunk], buffer: ChunkBuffer) -> None:
    try:
        buffer.push(refill.result())
    except PolicyClientError as error:
        logger.warning("no new chunk: %s", error)
