"""Robots that ask a server for chunks, as soon as they can or at a rate, in one process that has little to do."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from benchmarks.questions import Question
from benchmarks.robot_socket import Refused, Reply, RobotSocket, connect_robot

ROBOT_KEY, FLOOD_KEY = "robots", "flood"
_WARM_UP = 3  # messages of each connection that are not counted
_CHECK_EVERY = 20
_PATIENCE_S = 30.0
_PAUSE_S = 0.05  # of a flooder that was thrown out
_TICK_S = 1e-3


@dataclass(frozen=True)
class Load:
    """What robots ask of a server.

    Attributes:
        robots: How many there are, each with a connection of its own.
        seconds: How long they ask.
        rate_hz: How often each of them asks, whether or not it was answered; None asks again once it was.
        flooders: Connections of one more robot, with a key of its own, that asks without pause.
    """

    robots: int
    seconds: float
    rate_hz: float | None = None
    flooders: int = 0


@dataclass
class Round:
    """What became of it.

    Attributes:
        latencies_ms: Of all that was asked. At a rate, they count from the time at which a robot should have asked, so
            that neither a slow server nor a busy machine can make a question come later and look quicker.
        answered: How many answers came while robots asked.
        flooded: How many answers the flooder got meanwhile.
        sample: Some questions with their replies, to be checked once nobody is in a hurry.
    """

    latencies_ms: list[float] = field(default_factory=list)
    answered: int = 0
    flooded: int = 0
    sample: list[tuple[Question, bytes]] = field(default_factory=list)

    def note(self, question: Question, reply: Reply, asked_at_s: float, until_s: float) -> None:
        """Add a reply to a question."""
        if len(self.latencies_ms) % _CHECK_EVERY == 0:
            self.sample.append((question, reply.payload))
        self.latencies_ms.append(1e3 * (reply.at_s - asked_at_s))
        self.answered += reply.at_s <= until_s


def run_round(url: str, questions: Sequence[Question], load: Load, seed: int = 0) -> Round:
    """Let robots ask; raises Refused if one of them is not answered."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_round(url, questions, load, np.random.default_rng(seed)))


async def _round(url: str, questions: Sequence[Question], load: Load, draw: np.random.Generator) -> Round:
    result = Round()
    async with asyncio.timeout(2 * _PATIENCE_S + load.seconds), contextlib.AsyncExitStack() as stack:
        robots = [await stack.enter_async_context(_robot(url, ROBOT_KEY)) for _ in range(load.robots)]
        for i in range(_WARM_UP):
            await asyncio.gather(*(robot.ask(questions[i % len(questions)].frame) for robot in robots))
        async with _flood(url, questions, load, result):
            if load.rate_hz is None:
                until_s = time.monotonic() + load.seconds
                await asyncio.gather(*(_ask_on(robot, questions, n, until_s, result) for n, robot in enumerate(robots)))
            else:
                await _ask_at_rate(robots, questions, load.rate_hz, load.seconds, draw, result)
    return result


async def _ask_on(
    robot: RobotSocket, questions: Sequence[Question], number: int, until_s: float, result: Round
) -> None:
    for i in itertools.count(number):
        if (asked_at_s := time.monotonic()) >= until_s:
            return
        question = questions[i % len(questions)]
        result.note(question, await robot.ask(question.frame), asked_at_s, until_s)


async def _ask_at_rate(
    robots: Sequence[RobotSocket],
    questions: Sequence[Question],
    rate_hz: float,
    seconds: float,
    draw: np.random.Generator,
    result: Round,
) -> None:
    loop = asyncio.get_running_loop()
    # uvloop's timers are exact to the millisecond and no further, so robots ask on whole ones.
    begin_s = _TICK_S * np.ceil((time.monotonic() + 0.05) / _TICK_S)
    asked: list[tuple[float, Question, asyncio.Future[Reply]]] = []

    def ask(robot: RobotSocket, question: Question, due_at_s: float) -> None:
        asked.append((due_at_s, question, robot.ask(question.frame)))

    for number, robot in enumerate(robots):
        own_s = (draw.random() + np.arange(int(seconds * rate_hz))) / rate_hz
        for i, after_s in enumerate(_TICK_S * np.ceil(own_s / _TICK_S)):
            due_at_s = float(begin_s + after_s)
            loop.call_at(due_at_s, ask, robot, questions[(number + i) % len(questions)], due_at_s)
    until_s = float(begin_s + seconds)
    await asyncio.sleep(until_s + 2 * _TICK_S - time.monotonic())
    async with asyncio.timeout(_PATIENCE_S):
        for due_at_s, question, answer in asked:
            result.note(question, await answer, due_at_s, until_s)


@asynccontextmanager
async def _flood(url: str, questions: Sequence[Question], load: Load, result: Round) -> AsyncIterator[None]:
    """Ask without pause for as long as the context lasts."""

    async def flood(number: int) -> None:
        while True:
            with contextlib.suppress(Refused):
                async with _robot(url, FLOOD_KEY) as robot:
                    for i in itertools.count(number):
                        await robot.ask(questions[i % len(questions)].frame)
                        result.flooded += 1
            await asyncio.sleep(_PAUSE_S)  # a server may show a flooder the door

    flooders = [asyncio.create_task(flood(number)) for number in range(load.flooders)]
    try:
        yield
    finally:
        for flooder in flooders:
            flooder.cancel()
        await asyncio.gather(*flooders, return_exceptions=True)


@asynccontextmanager
async def _robot(url: str, key: str) -> AsyncIterator[RobotSocket]:
    robot = await connect_robot(url, key)
    try:
        yield robot
    finally:
        robot.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not on every system
        return asyncio.new_event_loop
    return uvloop.new_event_loop
