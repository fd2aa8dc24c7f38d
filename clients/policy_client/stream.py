"""The client of the streaming protocol, for robots that send what they see and play what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Self, Unpack

from policy_client.backoff import Backoff
from policy_client.chunk import ActionChunk
from policy_client.connecting import connect_options
from policy_client.errors import PolicyClientError, RequestTimeout, StreamRefusal
from policy_client.protocol import InferOptions
from policy_client.stream_link import StreamLink
from policy_client.stream_protocol import Continuity, Reasoning, StreamProtocol
from policy_client.stream_state import StreamState, StreamStats


class PolicyStream(StreamLink):
    """Sends observations and receives chunks in the background, over a connection that is made again when it breaks.

    Nothing but `connect`, `wait_for` and `close` ever waits. Threads may share a stream.

    Args:
        url: Address of the policy, `ws://host:port/v1/policies/NAME/stream`.
        api_key: Sent as `Authorization: Api-Key <key>`.
        name: What the server's logs and metrics call this robot, up to 64 characters.
        rate_hz: How many observations a second shall be answered; the server refuses what it cannot promise.
        deadline_s: A chunk that comes later than this after its observation is worthless: the server drops it.
        continuity: How a chunk goes on from the one before: a mode, or a map with `mode` and the mode's own keys.
        options: Sampling options of every observation that brings none.
        connect_timeout_s: Time for the first connection, all attempts included, and for each later attempt.
        silence_timeout_s: A connection on which nothing comes for this long is given up. The server pings each second.
        close_timeout_s: Time for the farewell.
        backoff: Pauses between attempts to connect.
        on_chunk: Called with each chunk that is newer than those before, in the stream's own thread.
        on_reasoning: Called with each reasoning as it grows, and once it has ended; in the stream's own thread.
        on_error: Called with each refusal and each failure, in the stream's own threads. Neither may close the stream.

    Raises:
        ValueError: A url that cannot be right.
        TypeError: An option that does not exist.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        name: str | None = None,
        rate_hz: float | None = None,
        deadline_s: float | None = None,
        continuity: Continuity | None = None,
        options: InferOptions | None = None,
        connect_timeout_s: float = 10.0,
        silence_timeout_s: float = 5.0,
        close_timeout_s: float = 1.0,
        backoff: Backoff | None = None,
        on_chunk: Callable[[ActionChunk], None] | None = None,
        on_reasoning: Callable[[Reasoning], None] | None = None,
        on_error: Callable[[PolicyClientError], None] | None = None,
    ) -> None:
        super().__init__(
            url,
            StreamProtocol(name=name, rate_hz=rate_hz, deadline_s=deadline_s, continuity=continuity, options=options),
            # The stream's own pings tell a connection that is dead.
            connect_options={**connect_options(api_key), "close_timeout": close_timeout_s, "ping_interval": None},
            connect_timeout_s=connect_timeout_s,
            silence_timeout_s=silence_timeout_s,
            close_timeout_s=close_timeout_s,
            backoff=backoff or Backoff(),
            on_chunk=on_chunk,
            on_reasoning=on_reasoning,
            on_error=on_error,
        )

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(
        self,
        observation: Mapping[str, Any],
        *,
        captured_s: float | None = None,
        playing: int | None = None,
        delay_s: float | None = None,
        **options: Unpack[InferOptions],
    ) -> int:
        """Give the stream an observation to send, in place of one that it has not sent yet; return its number.

        Args:
            observation: Arrays, strings and numbers by name, flat or nested, as the policy wants them. It is copied.
            captured_s: When it was true, by `time.monotonic`. The chunk's first action is due then. Default: now.
            playing: Number of the observation whose chunk is being played, 0 for none. Default: the last chunk sent.
            delay_s: How long after `captured_s` the answer will begin to be played. Default: the server's estimate.
            **options: Sampling options of this observation alone; see `InferOptions`.

        Raises:
            PolicyClientError: The stream is closed, or what ended it.
            TypeError, ValueError, OverflowError: The observation or an option cannot be sent.
        """
        captured_s = time.monotonic() if captured_s is None else captured_s
        with self._changed:
            self._check_open()
            frame = self._protocol.observation(
                observation, captured_s=captured_s, playing=playing, delay_s=delay_s, options=options
            )
            self._counts["superseded"] += self._outbox.put("observation", frame)
            self._changed.notify_all()
            return self._protocol.seq

    def latest(self) -> ActionChunk | None:
        """Return the newest chunk of this episode, None before any.

        Its `made_at_s` is the observation's `captured_s`; its metadata holds `seq`, `episode`, `seed`, `timings`,
        `continuity`, `guard` and what else the server says, and `received_s`, by `time.monotonic`.
        """
        with self._changed:
            return self._protocol.newest

    def wait_for(self, seq: int, timeout_s: float) -> ActionChunk:
        """Return the first chunk that answers observation `seq` or a later one.

        Raises:
            StreamRefusal: The server refused that observation.
            RequestTimeout: No answer in time. It may still come.
            PolicyClientError: The stream is closed, or what ended it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._settled(seq), timeout_s)
            newest = self._protocol.newest
            if newest is not None and newest.metadata["seq"] >= seq:
                return newest
            if refusal := self._refusals.of(seq):
                raise refusal
            self._check_open()
            raise RequestTimeout(f"no chunk for observation {seq} within {timeout_s:g} s")

    def refusal_of(self, seq: int) -> StreamRefusal | None:
        """Return why the server refused observation `seq`, None if it did not, or long ago."""
        with self._changed:
            return self._refusals.of(seq)

    def set(self, inputs: Mapping[str, Any] | None = None, **options: Unpack[InferOptions]) -> None:
        """Give inputs (a goal, an instruction) and options that hold from the next observation on.

        They replace all that the `set` before said, and outlive connections and sessions.

        Raises:
            PolicyClientError, TypeError, ValueError, OverflowError: As `send`.
        """
        with self._changed:
            self._check_open()
            self._put("set", self._protocol.set(inputs or {}, options))

    def reset(self) -> None:
        """Begin a new episode: the server forgets what it remembered, and `latest` is None again.

        Raises:
            PolicyClientError: The stream is closed, or what ended it.
        """
        with self._changed:
            self._check_open()
            self._outbox.discard("observation")
            self._put("reset", self._protocol.reset())

    def cancel(self) -> None:
        """Give up all observations sent so far, as far as they are not answered.

        Raises:
            PolicyClientError: The stream is closed, or what ended it.
        """
        with self._changed:
            self._check_open()
            self._outbox.discard("observation")
            self._put("cancel", self._protocol.cancel())

    @property
    def welcome(self) -> Mapping[str, Any]:
        """What the server said when the connection was made last; empty before."""
        return self._protocol.welcome

    @property
    def state(self) -> StreamState:
        """What can be expected of the stream now."""
        return self._state

    @property
    def last_error(self) -> PolicyClientError | None:
        """The last refusal or failure, None if there was none."""
        return self._last_error

    @property
    def stats(self) -> StreamStats:
        """What happened so far."""
        with self._changed:
            return StreamStats(**self._counts, errors=dict(self._errors))

    def _put(self, kind: str, frame: bytes) -> None:
        self._outbox.put(kind, frame)
        self._changed.notify_all()

    def _settled(self, seq: int) -> bool:
        newest = self._protocol.newest
        answered = newest is not None and newest.metadata["seq"] >= seq
        return answered or self._refusals.of(seq) is not None or self._state is StreamState.CLOSED
