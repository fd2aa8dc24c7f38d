"""Where a player's chunks come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, Unpack, runtime_checkable

from policy_client.backoff import Deadline
from policy_client.chunk import ActionChunk
from policy_client.clock import Clock
from policy_client.errors import RequestTimeout, StreamRefusal
from policy_client.protocol import InferOptions
from policy_client.stream import PolicyStream

Observation: TypeAlias = Mapping[str, Any]


@runtime_checkable
class Policy(Protocol):
    """Anything that answers an observation with a chunk: `PolicyClient`, or a policy in this process."""

    def infer(self, observation: Observation, **options: Unpack[InferOptions]) -> ActionChunk:
        """Return the actions that follow `observation`."""


@dataclass(frozen=True)
class Request:
    """An observation that wants a chunk."""

    observation: Observation
    captured_s: float  # when it was true; the chunk's first action is due then
    playing: int  # number of the chunk that is being played, 0 for none that the source knows of
    delay_s: float | None  # how long after `captured_s` the answer will begin to be played, None if nobody knows
    options: InferOptions


@dataclass(frozen=True)
class Arrival:
    """A chunk that has come."""

    chunk: ActionChunk
    seq: int  # its number at the source, above 0, rising
    latency_s: float  # from the observation to the chunk


class ChunkSource(Protocol):
    """Answers requests without making anybody wait, one at a time."""

    def first(self, get_observation: Callable[[], Observation], options: InferOptions) -> Arrival:
        """Wait for a chunk that answers an observation of this moment.

        Raises:
            PolicyClientError: There is none to be had.
        """

    def busy(self, now_s: float) -> bool:
        """Return whether an answer is still to be expected."""

    def ask(self, request: Request) -> None:
        """Begin to answer a request.

        Raises:
            PolicyClientError: It cannot be answered now.
            TypeError, ValueError, OverflowError: The observation or an option cannot be sent.
        """

    def take(self) -> Arrival | None:
        """Return a chunk that has come since the last call, None if none has.

        Raises:
            PolicyClientError: The request failed; another may be made.
        """

    def close(self) -> None:
        """Answer no more."""


class InferSource:
    """Asks a policy that makes its callers wait, in a thread of its own.

    Args:
        policy: Asked by one thread at a time.
        clock: Tells how long it takes.
    """

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chunk-source")
        self._answer: Future[Arrival] | None = None
        self._seq = 0

    def first(self, get_observation: Callable[[], Observation], options: InferOptions) -> Arrival:
        """Ask in the caller's thread."""
        return self._infer(Request(get_observation(), self._clock.now_s(), 0, None, options), self._next_seq())

    def busy(self, now_s: float) -> bool:
        """Return whether the policy is at work, or its answer not taken yet."""
        return self._answer is not None

    def ask(self, request: Request) -> None:
        """Hand a request to the thread, which must not be busy."""
        assert self._answer is None, "asked while busy"
        self._answer = self._executor.submit(self._infer, request, self._next_seq())

    def take(self) -> Arrival | None:
        """Return the answer once it is there. Raises what `infer` raised."""
        answer = self._answer
        if answer is None or not answer.done():
            return None
        self._answer = None
        return answer.result()

    def close(self) -> None:
        """Let the thread end. A request in progress ends by its own timeout, or when the client is closed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _infer(self, request: Request, seq: int) -> Arrival:
        chunk = self._policy.infer(request.observation, **request.options)
        # Dated by the tick, not by the client: steps that match the rate then begin exactly on later ticks.
        dated = replace(chunk, made_at_s=request.captured_s)
        return Arrival(dated, seq, self._clock.now_s() - request.captured_s)


class StreamSource:
    """Asks over a stream, which stays open.

    Args:
        stream: Connected.
        patience_s: An answer that has not come in this time was lost on its way: ask again.
        first_timeout_s: Time for the first chunk, which a policy may have to warm up for.
    """

    def __init__(self, stream: PolicyStream, *, patience_s: float = 1.0, first_timeout_s: float = 30.0) -> None:
        self._stream = stream
        self._patience_s, self._first_timeout_s = patience_s, first_timeout_s
        self._asked: int | None = None
        self._asked_at_s = 0.0
        self._reconnects = 0
        self._taken = 0

    def first(self, get_observation: Callable[[], Observation], options: InferOptions) -> Arrival:
        """Send observations until one is answered. Those that came too late for their deadline may be followed."""
        deadline = Deadline(self._first_timeout_s)
        waiting_for: int | None = None
        while True:
            seq = self._stream.send(get_observation(), playing=0, **options)
            waiting_for = waiting_for or seq
            try:
                return self._arrival(self._stream.wait_for(waiting_for, min(self._patience_s, deadline.remaining_s())))
            except StreamRefusal as refusal:
                if refusal.code not in _PASSING or deadline.remaining_s() == 0:
                    raise
                waiting_for = None
            except RequestTimeout as error:
                if deadline.remaining_s() == 0:
                    raise RequestTimeout(f"no first chunk within {deadline.budget_s:g} s") from error

    def busy(self, now_s: float) -> bool:
        """Return whether an answer is to be expected: not of a connection that broke, and not for ever."""
        answerable = self._asked is not None and self._stream.stats.reconnects == self._reconnects
        return answerable and now_s - self._asked_at_s < self._patience_s

    def ask(self, request: Request) -> None:
        """Give the stream an observation."""
        self._reconnects = self._stream.stats.reconnects
        self._asked = self._stream.send(
            request.observation,
            captured_s=request.captured_s,
            playing=request.playing,
            delay_s=request.delay_s,
            **request.options,
        )
        self._asked_at_s = request.captured_s

    def take(self) -> Arrival | None:
        """Return the stream's newest chunk, unless taken before. Raises the refusal of the observation sent last."""
        newest = self._stream.latest()
        if newest is not None and newest.metadata["seq"] > self._taken:
            return self._arrival(newest)
        if self._asked is not None and (refusal := self._stream.refusal_of(self._asked)):
            self._asked = None
            raise refusal
        return None

    def close(self) -> None:
        """Leave the stream as it is."""
        self._asked = None

    def _arrival(self, chunk: ActionChunk) -> Arrival:
        self._taken = chunk.metadata["seq"]
        if self._asked is not None and self._taken >= self._asked:
            self._asked = None
        return Arrival(chunk, self._taken, chunk.metadata["received_s"] - chunk.made_at_s)


def source_of(policy: Policy | PolicyStream | ChunkSource, clock: Clock) -> ChunkSource:
    """Return the source that gets its chunks from `policy`."""
    if isinstance(policy, PolicyStream):
        return StreamSource(policy)
    if isinstance(policy, Policy):
        return InferSource(policy, clock)
    return policy


# Refusals that the next observation need not meet.
_PASSING = frozenset({"deadline_exceeded", "unknown_revision"})
