"""One robot's session: which observation is answered, with what, and what happens to the others. No socket here."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from policy_models.spec import PolicySpec
from policy_server.errors import UnknownRevision
from policy_server.gateway.report import describe
from policy_server.gateway.stream.clock import RobotClock
from policy_server.gateway.stream.messages import Cancel, Hello, Observe, Pong, Reset, Set
from policy_server.gateway.stream.outbox import Outbox
from policy_server.gateway.traffic import Traffic
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.continuity import Continuity, read_continuity
from policy_server.runtime.delay import DelayQuantile
from policy_server.runtime.options import read_options
from policy_server.runtime.policy import PolicyRuntime
from policy_server.runtime.request import Request, Timing
from policy_server.runtime.thinking import Thought

_NS = 1e-9
_NOTHING_SET = Set.model_construct(revision=0, inputs={}, options=None)


@dataclass(frozen=True)
class Wishes:
    """What a robot's hello asks for; see docs/stream.md."""

    rate_hz: float | None = None
    deadline_ms: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    continuity: Continuity | None = None


def read_wishes(hello: Hello, spec: PolicySpec) -> Wishes:
    """Return what a hello asks for; raises InvalidOption if a policy of this spec cannot give it."""
    read_options(hello.options)
    continuity = None if hello.continuity is None else read_continuity(hello.continuity, spec)
    return Wishes(hello.rate_hz, hello.deadline_ms, hello.options or {}, continuity)


@dataclass(frozen=True, eq=False)
class Arrival:
    """An observation, with the monotonic time at which it came, and the `set` that it relies on."""

    message: Observe
    at_s: float
    relies_on: Set


class RobotSession:
    """What a robot said and was sent, over all its connections.

    One observation is answered at a time. The newest of those that come meanwhile waits for its turn, in place of
    whichever waited before it, so that a robot may send as often as it likes.

    Attributes:
        seq: Highest number of an observation so far.
        episode: The episode of that.
        superseded: Observations given up for a newer one.
        stale: Observations that came twice, or after a newer one.
        clock: The robot's.
        delays: From capture to arrival at the robot, of recent chunks.
        outbox: Of the connection that the robot has now; None while it has none.
    """

    def __init__(self, runtime: PolicyRuntime, tenant: str, traffic: Traffic) -> None:
        self.seq = self.episode = self.superseded = self.stale = 0
        self.clock = RobotClock()
        self.delays = DelayQuantile()
        self.outbox: Outbox | None = None
        self._runtime = runtime
        self._tenant = tenant
        self._traffic = traffic
        self._session = runtime.begin_session()
        self._session.mind.listen = self._tell
        self._set: Set = _NOTHING_SET
        self._origin_ns: int | None = None
        self._waiting: Arrival | None = None
        self._answering: tuple[Arrival, asyncio.Task[None]] | None = None
        self._wishes = Wishes()

    def greet(self, wishes: Wishes) -> None:
        """Take in what a connection begins with."""
        self._wishes = wishes

    def take(self, message: Observe | Set | Reset | Cancel | Pong, now_s: float) -> None:
        """Take in a message that came at `now_s`, by our monotonic clock; raises InvalidOption."""
        take: Mapping[type, Callable[..., None]] = {
            Observe: self._observe,
            Set: self._keep,
            Reset: self._reset,
            Cancel: self._cancel,
            Pong: self._pong,
        }
        take[type(message)](message, now_s)

    def close(self) -> None:
        """Give up whatever is being answered or waits."""
        self._give_up()

    def _observe(self, message: Observe, now_s: float) -> None:
        if message.seq <= self.seq or message.episode < self.episode:
            self.stale += 1
            return
        self.seq = message.seq
        if self._origin_ns is None:
            self._origin_ns = message.captured_ns
        self._reset(Reset(episode=message.episode), now_s)
        if message.revision not in (0, self._set.revision):
            self._refuse(UnknownRevision(message.revision, self._set.revision), message.seq)
            return
        if self._waiting is not None:
            self.superseded += 1
        self._waiting = Arrival(message, now_s, self._set if message.revision else _NOTHING_SET)
        self._go_on()

    def _keep(self, message: Set, now_s: float) -> None:
        if message.revision > self._set.revision:
            read_options(message.options)
            self._set = message

    def _reset(self, message: Reset, now_s: float) -> None:
        if message.episode > self.episode:
            self.episode = message.episode
            self._give_up()
            if self.outbox is not None:
                self.outbox.drop_chunk()
            self._session.reset()

    def _cancel(self, message: Cancel, now_s: float) -> None:
        if self._waiting is not None and self._waiting.message.seq <= message.seq:
            self._waiting = None
        if self._answering is not None and self._answering[0].message.seq <= message.seq:
            self._answering[1].cancel()

    def _pong(self, message: Pong, now_s: float) -> None:
        self.clock.answered(_NS * message.sent_ns, _NS * message.robot_ns, now_s)

    def _give_up(self) -> None:
        self._waiting = None
        if self._answering is not None:
            self._answering[1].cancel()

    def _go_on(self) -> None:
        """Answer what waits, unless something is being answered."""
        if self._answering is None and self._waiting is not None:
            arrival, self._waiting = self._waiting, None
            task = asyncio.create_task(self._answer(arrival))
            self._answering = arrival, task
            task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering = None
        with suppress(asyncio.CancelledError):
            task.result()
        self._go_on()

    async def _answer(self, arrival: Arrival) -> None:
        message = arrival.message
        captured_at_s = self.clock.ours_s(_NS * message.captured_ns, arrival.at_s)
        begun_at_s = time.monotonic()
        try:
            with self._traffic:
                chunk = await self._runtime.act(self._session, self._request(arrival, captured_at_s, begun_at_s))
        except Exception as error:
            self._refuse(error, message.seq)
            return
        sent_at_s = time.monotonic()
        self.delays.note(sent_at_s - captured_at_s + self.clock.way_s)
        if self.outbox is not None:
            timings = {
                "received_ms": 1e3 * (arrival.at_s - captured_at_s),
                "waited_ms": 1e3 * (begun_at_s - arrival.at_s),
                "infer_ms": chunk.infer_ms,
                "total_ms": 1e3 * (sent_at_s - captured_at_s),
            }
            self.outbox.put_chunk(self._reply(message, chunk, timings))

    def _request(self, arrival: Arrival, captured_at_s: float, now_s: float) -> Request:
        message, held = arrival.message, arrival.relies_on
        options = read_options({**self._wishes.options, **(held.options or {}), **(message.options or {})})
        if self._wishes.deadline_ms is not None:
            # What is left for us of the time until the chunk must be there: it has a way to go yet.
            left_ms = self._wishes.deadline_ms - 1e3 * (now_s - captured_at_s + self.clock.way_s)
            budget_ms = min(left_ms, left_ms if options.budget_ms is None else options.budget_ms)
            options = options.model_copy(update={"budget_ms": max(budget_ms, 1e-6)})
        delay_s = self.delays.value_s if message.delay_ms is None else 1e-3 * message.delay_ms
        return Request(
            {**held.inputs, **message.observation},
            options,
            self._wishes.continuity if options.continuity is None else None,  # the runtime reads that of options
            # Since the first observation: a float holds the nanoseconds of a session, but not those of an epoch.
            Timing(_NS * (message.captured_ns - (self._origin_ns or 0)), delay_s, message.playing, message.seq),
            self._tenant,
        )

    def _tell(self, thought: Thought) -> None:
        if self.outbox is not None:
            self.outbox.put_reasoning({"type": "reasoning", "episode": self.episode, **_thought(thought)})

    def _reply(self, message: Observe, chunk: ActionChunk, timings: Mapping[str, float]) -> dict[str, Any]:
        return {
            "type": "chunk",
            "seq": message.seq,
            "episode": message.episode,
            "captured_ns": message.captured_ns,
            "actions": chunk.actions,
            "step_s": chunk.step_s,
            "seed": chunk.seed,
            "policy": self._runtime.name,
            "version": chunk.version,
            "engine": chunk.engine,
            "superseded": self.superseded,
            "stale": self.stale,
            "timings": timings,
            "continuity": {
                "mode": chunk.joint.mode,
                "frozen": chunk.joint.frozen,
                "overlap": chunk.joint.overlap,
                "delay_ms": chunk.joint.delay_ms,
            },
            "guard": {
                "clamped": chunk.guard.clamped,
                "by": chunk.guard.by,
                "unmet": chunk.guard.unmet,
                "fallback": chunk.guard.fallback,
            },
            **({} if chunk.radius is None else {"radius": chunk.radius}),
            **({} if chunk.thought is None else {"reasoning": _thought(chunk.thought)}),
        }

    def _refuse(self, error: Exception, seq: int) -> None:
        if self.outbox is not None:
            self.outbox.put(error_message(error, seq))


def _thought(thought: Thought) -> dict[str, Any]:
    return {
        "number": thought.number,
        "text": thought.reasoning.text,
        "ended": "" if thought.goes_on else thought.reasoning.ended,
        "age_ms": 1e3 * (time.monotonic() - thought.begun_at_s),
    }


def error_message(error: Exception, seq: int | None = None) -> dict[str, Any]:
    """Return the message that tells a robot of an error, about its observation `seq` if there is one."""
    code, text = describe(error)
    message = {"type": "error", "code": code, "message": text.removeprefix(f"{code}: ")}
    return message if seq is None else {**message, "seq": seq}
