"""Drives a control loop: the action due now, while the next chunk is being computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Unpack

from policy_client.buffer import ChunkBuffer
from policy_client.chunk import Action
from policy_client.clock import Clock, MonotonicClock
from policy_client.errors import PolicyClientError
from policy_client.latency import LatencyQuantile
from policy_client.playback import Pace, Playback, PlayerState, PlayerStats
from policy_client.protocol import InferOptions
from policy_client.sources import ChunkSource, Observation, Policy, Request, source_of
from policy_client.stream import PolicyStream
from policy_client.watchdog import Hold, StopRule

logger = logging.getLogger(__name__)


class ChunkPlayer:
    """Plays the chunks of a policy that is slower than the control loop, at the rate of the loop.

    The next chunk is asked for so early that, by the latency of recent answers, it comes before the actions run out.
    It takes over at the row that is due by then.

    Args:
        policy: A `PolicyStream` that is connected; or anything with `infer`, such as `PolicyClient`, which is asked
            from a thread of the player's own; or a `ChunkSource`, which is closed when a run ends.
        margin_s: How many seconds of actions shall be left when the next chunk comes, if it takes as long as usual.
        execute_s: Ask once a chunk has been played for so long, though more remains: 0 is without pause. Default: ask
            as late as latency allows.
        interpolate: Whether actions between two rows lie on the line between them, in place of the earlier one: for
            loops that are faster than the chunk's steps.
        stop: What to do once actions have run out.
        give_up_s: For how long to do that before the loop ends with `OutOfActions`. Default: for ever.
        latency: How long an answer takes, judged by those before it.
        clock: The time to live by.

    Raises:
        ValueError: A time below 0.
    """

    def __init__(
        self,
        policy: Policy | PolicyStream | ChunkSource,
        *,
        margin_s: float = 0.05,
        execute_s: float | None = None,
        interpolate: bool = False,
        stop: StopRule | None = None,
        give_up_s: float | None = None,
        latency: LatencyQuantile | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._policy = policy
        self._pace = Pace(margin_s, execute_s)
        self._interpolate = interpolate
        self._stop, self._give_up_s = stop or Hold(), give_up_s
        self._latency = latency or LatencyQuantile()
        self._clock = clock or MonotonicClock()
        self._playback: Playback | None = None
        self._running = False
        self._complaint = ""

    @property
    def state(self) -> PlayerState:
        """What the player is doing."""
        return self._playback.state if self._playback is not None and self._running else PlayerState.STOPPED

    @property
    def stats(self) -> PlayerStats:
        """What happened in the present run, or the last one."""
        return PlayerStats() if self._playback is None else self._playback.stats

    def run(
        self, get_observation: Callable[[], Observation], *, rate_hz: float, **options: Unpack[InferOptions]
    ) -> Iterator[Action]:
        """Yield the action due at each tick, (A,), for ever: `for action in player.run(...)`.

        Ticks are at whole multiples of 1 / `rate_hz` from the first. One that is late by more than half a period,
        because the loop's body overran, is skipped. Only the first chunk is waited for. The loop begins when it is
        there, as if observed then, since the robot stood still meanwhile. A later request that fails is logged, and
        made again at the next tick. A player drives one loop at a time.

        Args:
            get_observation: Returns the observation of this moment; called in the loop's thread.
            rate_hz: Ticks per second.
            **options: Sampling options of every request.

        Raises:
            PolicyClientError: The first chunk could not be had.
            OutOfActions: No action was due for longer than `give_up_s`.
            TypeError, ValueError, OverflowError: An observation or option cannot be sent, or a rate that cannot be.
        """
        self._playback = playback = Playback(
            rate_hz=rate_hz,
            pace=self._pace,
            latency=self._latency,
            buffer=ChunkBuffer(interpolate=self._interpolate),
            stop=self._stop,
            give_up_s=self._give_up_s,
        )
        source = source_of(self._policy, self._clock)
        self._running = True
        try:
            playback.asked()
            playback.begin(source.first(get_observation, options), self._clock.now_s())
            tick = 0
            while True:
                now_s = playback.tick_s(tick)
                self._take(source, playback, now_s)
                if not source.busy(now_s) and playback.wants_more(now_s):
                    request = Request(get_observation(), now_s, playback.playing, playback.delay_s(now_s), options)
                    self._ask(source, playback, request)
                yield playback.action(now_s)
                tick = playback.tick_after(tick, self._clock.now_s())
                self._clock.sleep_until(playback.tick_s(tick))
        finally:
            self._running = False
            source.close()

    def _take(self, source: ChunkSource, playback: Playback, now_s: float) -> None:
        try:
            arrival = source.take()
        except PolicyClientError as error:
            self._complain(playback, error)
        else:
            if arrival is not None:
                playback.take(arrival, now_s)
                self._complaint = ""

    def _ask(self, source: ChunkSource, playback: Playback, request: Request) -> None:
        try:
            source.ask(request)
            playback.asked()
        except PolicyClientError as error:
            self._complain(playback, error)

    def _complain(self, playback: Playback, error: PolicyClientError) -> None:
        playback.failed()
        if str(error) != self._complaint:  # at 50 Hz the log shall not say the same at each tick
            logger.warning("no new chunk: %s", error)
            self._complaint = str(error)
