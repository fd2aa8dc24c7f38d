"""A process that plays some of the robots: sends what is due, and writes down what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import selectors
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from policy_client.bench.arrivals import Arrivals
from policy_client.bench.doors import Answer, Door, Target, make_door
from policy_client.bench.observations import draw_observations
from policy_client.bench.served import ServedPolicy
from policy_client.codec import pack
from policy_client.errors import PolicyClientError, ServerError

_POOL = 8  # observations that a robot sends in turn; packed before the test, so that packing is not measured
_PROGRESS_S = 0.25


@dataclass(frozen=True)
class Work:
    """What one process does.

    Attributes:
        target: Which policy is asked, and where.
        door: By which protocol; a key of `DOORS`.
        policy: What the server says of it.
        robots: Numbers of the robots that this process plays.
        arrivals: When they send.
        seconds: How long.
        seed: Decides observations and arrivals.
        warm_up: Questions of each robot before the test, one after another, not counted.
        patience_s: How long to wait for answers once the last observation is sent.
    """

    target: Target
    door: str
    policy: ServedPolicy
    robots: tuple[int, ...]
    arrivals: Arrivals
    seconds: float
    seed: int
    warm_up: int = 3
    patience_s: float = 10.0


@dataclass
class Sent:
    """One observation and its fate. Times are seconds by the monotonic clock, which processes of a machine share."""

    robot: int
    due_s: float
    sent_s: float
    answer: Answer | None = None
    failure: str = ""


@dataclass
class Log:
    """All that one process sent."""

    sent: list[Sent] = field(default_factory=list)
    settled: int = 0

    def columns(self, begin_s: float) -> dict[str, Any]:
        """Return it as arrays of one length, times counted from `begin_s`, NaN where nothing came."""
        stages = dict.fromkeys(stage for sent in self.sent if sent.answer for stage in sent.answer.stages_ms)
        answers = [sent.answer for sent in self.sent]
        return {
            "robot": np.array([sent.robot for sent in self.sent], np.int64),
            "due_s": np.array([sent.due_s - begin_s for sent in self.sent], np.float64),
            "sent_s": np.array([sent.sent_s - begin_s for sent in self.sent], np.float64),
            "received_s": np.array([a.received_s - begin_s if a else np.nan for a in answers], np.float64),
            "superseded": np.array([bool(a and a.superseded) for a in answers], np.bool_),
            "horizon": np.array([a.horizon if a else 0 for a in answers], np.int64),
            "stages_ms": {
                stage: np.array([a.stages_ms.get(stage, np.nan) if a else np.nan for a in answers], np.float64)
                for stage in stages
            },
            "failures": dict(Counter(sent.failure or "no_answer" for sent in self.sent if sent.answer is None)),
        }


def run_worker(work: Work, parent: Connection) -> None:
    """Play robots, in a process of one's own.

    Says `{"ready": True}` once all are connected, is told when to begin, says how far it is, and in the end what
    became of every observation; or `{"error": ...}`.
    """
    try:
        with asyncio.Runner(loop_factory=_exact_loop) as runner:
            said = runner.run(_run(work, parent))
    except (PolicyClientError, TimeoutError, ValueError) as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    parent.send_bytes(pack(said))


async def _run(work: Work, parent: Connection) -> dict[str, Any]:
    doors = {
        robot: make_door(work.door, work.target, draw_observations(work.policy, _POOL, seed=work.seed + robot))
        for robot in work.robots
    }
    async with contextlib.AsyncExitStack() as stack:
        for door in doors.values():
            stack.push_async_callback(door.close)
            await door.open()
        for number in range(work.warm_up):
            await asyncio.gather(*(_ask_once(door, number, work.patience_s) for door in doors.values()))
        parent.send_bytes(pack({"ready": True}))
        begin_s = float(await asyncio.to_thread(parent.recv_bytes))
        log = await _play(work, doors, begin_s, lambda said: parent.send_bytes(pack(said)))
        return {"done": log.columns(begin_s)}


async def _ask_once(door: Door, number: int, patience_s: float) -> None:
    """Ask and wait; raises what the server refuses, since a test of refusals measures nothing."""
    fate: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    door.ask(number, fate.set_result, fate.set_exception)
    async with asyncio.timeout(patience_s):
        await fate


async def _play(
    work: Work, doors: Mapping[int, Door], begin_s: float, tell: Callable[[Mapping[str, int]], None]
) -> Log:
    loop = asyncio.get_running_loop()
    log = Log()
    over_s = begin_s + work.seconds
    planned = 0
    for robot, door in doors.items():
        times = work.arrivals.times(robot, work.seconds, work.seed)
        planned += len(times)
        if len(times):
            _send_on(loop, log, robot, door, [float(begin_s + after_s) for after_s in times], 0)
    last_s = over_s + work.patience_s
    while (now_s := time.monotonic()) < over_s or (log.settled < planned and now_s < last_s):
        tell({"sent": len(log.sent), "settled": log.settled})
        await asyncio.sleep(min(_PROGRESS_S, max(0.005, over_s - now_s)))
    return log


def _send_on(
    loop: asyncio.AbstractEventLoop, log: Log, robot: int, door: Door, due_s: list[float], number: int
) -> None:
    """Send observation `number` when it is due, and after it the next, whatever becomes of it."""

    def send() -> None:
        entry = Sent(robot, due_s[number], time.monotonic())
        log.sent.append(entry)
        if number + 1 < len(due_s):
            _send_on(loop, log, robot, door, due_s, number + 1)

        def answered(answer: Answer) -> None:
            entry.answer = answer
            log.settled += 1

        def failed(error: Exception) -> None:
            entry.failure = _failure_name(error)
            log.settled += 1

        door.ask(number, answered, failed)

    loop.call_at(due_s[number], send)


def _failure_name(error: Exception) -> str:
    """Return the server's code for a refusal; for all else the error's own name, `connection_lost` and so on."""
    code = error.code if isinstance(error, ServerError) else None
    return code or re.sub(r"(?<=.)([A-Z])", r"_\1", type(error).__name__).lower()


def _exact_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose timers are exact: epoll rounds them up to the millisecond, select does not."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
