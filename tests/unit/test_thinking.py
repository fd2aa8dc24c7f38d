"""What a policy thinks beside what it does, with a scripted policy on an engine that computes when it is told to."""

import asyncio
import threading
import time

import numpy as np
import pytest

from policy_models.program import GraphCall, Outcome
from policy_models.spec import GoalSpec, PolicySpec, Reasoning, ReasoningSpec, VectorSpec
from policy_server.errors import DeadlineExceeded, InvalidOption
from policy_server.runtime.guard import Guard
from policy_server.runtime.options import read_options
from policy_server.runtime.policy import PolicyRuntime
from policy_server.runtime.request import Request
from policy_server.runtime.scheduler import Scheduler
from policy_server.runtime.thinking import read_thinking
from policy_server.runtime.version import Version

SPEC = PolicySpec(
    action=VectorSpec(("x",), ("m",)),
    state=VectorSpec(("x",), ("m",)),
    goal=GoalSpec("text"),
    horizon=2,
    step_s=0.1,
    reasoning=ReasoningSpec(tokens=5, every_s=0.0),
)
WORDS = ("Go", " to", " the", " red", " cube")


class Thinker:
    """Says `WORDS`, a token a run; its actions are the number of the reasoning that they are conditioned on, or -1."""

    def __init__(self, spec: PolicySpec = SPEC) -> None:
        self.spec = spec
        self.reasonings = 0

    def begin(self):
        return {}

    def infer(self, observation, memory, options):
        yield GraphCall("denoise", {"x": np.zeros((1, 1), np.float32)})
        features = options.reasoning.features
        value = -1.0 if features is None else features[0]
        return Outcome(np.full((2, 1), value, np.float32), memory)

    def reason(self, observation, *, until_s, question=None):
        self.reasonings += 1
        number, text = self.reasonings, ""
        for word in WORDS:
            while not (yield GraphCall("speak", {"x": np.zeros((1, 1), np.float32)}, said=text))["x"].any():
                if time.monotonic() >= until_s:
                    return Reasoning(text, np.array([number], np.float32), "time")
            text += word
        return Reasoning(question or text, np.array([number], np.float32), "complete")

    def hear(self, observation, text):
        yield GraphCall("hear", {"x": np.zeros((1, 1), np.float32)})
        return Reasoning(text, np.array([100.0 + len(text)], np.float32), "given")


class Paced:
    """Acts at once; says a word whenever it is let, and nothing in all the runs before."""

    name, precision, differentiable, most_runs = "paced", "f32", False, 1

    def __init__(self, words: int = 10**9) -> None:
        self.words = threading.Semaphore(words)
        self.ran: list[str] = []

    def run(self, graph, inputs):
        self.ran.append(graph)
        if graph != "speak":
            return inputs
        time.sleep(1e-3)
        return {"x": inputs["x"] + self.words.acquire(blocking=False)}

    def close(self) -> None:
        """Nothing to give back."""


class Robot:
    """A session of a runtime over the two."""

    def __init__(self, *, words: int = 10**9, spec: PolicySpec = SPEC) -> None:
        self.engine, self.program = Paced(words), Thinker(spec)
        self.scheduler = Scheduler("test", self.program, self.engine)
        version = Version("1", spec, self.scheduler, engine="paced", guard=Guard("test", spec))
        self.runtime = PolicyRuntime("test", version, capacity=8, timeout_s=10.0)
        self.session = self.runtime.begin_session()
        self.told = []
        self.session.mind.listen = self.told.append

    async def act(self, prompt: str = "sort", **options):
        inputs = {"state": np.zeros(1, np.float32), "prompt": prompt}
        return await self.runtime.act(self.session, Request(inputs, read_options(options or None)))

    async def settle(self) -> None:
        """Wait until nothing is being reasoned."""
        for _ in range(1000):
            if not self.session.mind.is_reasoning:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the reasoning does not end")


@pytest.fixture
def robot():
    robot = Robot()
    yield robot
    robot.scheduler.close()


@pytest.fixture
def slow():
    """A robot whose policy has said nothing yet."""
    robot = Robot(words=0)
    yield robot
    robot.engine.words.release(1000)
    robot.scheduler.close()


async def test_the_first_chunk_waits_for_a_reasoning_and_later_ones_do_not(slow) -> None:
    first = asyncio.create_task(slow.act())
    await asyncio.sleep(0.05)
    assert not first.done()
    slow.engine.words.release(len(WORDS))
    chunk = await first
    assert chunk.actions[0, 0] == 1
    assert (chunk.thought.number, chunk.thought.reasoning.text) == (1, "Go to the red cube")
    for _ in range(5):  # the second reasoning began, and says nothing
        chunk = await slow.act()
        assert (chunk.actions[0, 0], chunk.thought.number) == (1, 1)
    assert slow.program.reasonings == 2
    slow.engine.words.release(len(WORDS))
    await slow.settle()
    assert (await slow.act()).thought.number == 2


async def test_a_reasoning_is_told_word_by_word_and_then_that_it_is_complete(robot) -> None:
    await robot.act()
    said = [(t.reasoning.text, t.goes_on) for t in robot.told if t.number == 1]
    growing = ["Go", "Go to", "Go to the", "Go to the red"]
    assert list(dict.fromkeys(said)) == [*((text, True) for text in growing), ("Go to the red cube", False)]


async def test_another_instruction_is_reasoned_about_before_anything_is_done_for_it(slow) -> None:
    slow.engine.words.release(len(WORDS))
    await slow.act("sort")
    later = asyncio.create_task(slow.act("stack"))
    await asyncio.sleep(0.05)
    assert not later.done()
    slow.engine.words.release(3 * len(WORDS))
    chunk = await later
    assert (chunk.thought.instruction, chunk.actions[0, 0] > 1) == ("stack", True)


async def test_a_reasoning_that_is_young_enough_is_not_refreshed(robot) -> None:
    for _ in range(3):
        await robot.act(reasoning={"mode": "latest", "every_s": 3600})
        await robot.settle()
    assert robot.program.reasonings == 1


async def test_a_fresh_reasoning_is_had_for_each_chunk(robot) -> None:
    assert [(await robot.act(reasoning="fresh")).actions[0, 0] for _ in range(3)] == [1, 2, 3]


async def test_without_reasoning_nothing_is_injected_and_nothing_is_said(robot) -> None:
    chunk = await robot.act(reasoning="none")
    assert (chunk.actions[0, 0], chunk.thought.reasoning.text) == (-1, "")
    assert robot.engine.ran == ["denoise"]


async def test_what_a_client_says_is_heard_once_and_holds_until_it_says_something_else(robot) -> None:
    for _ in range(3):
        chunk = await robot.act(reasoning={"mode": "given", "text": "Left."})
        assert (chunk.actions[0, 0], chunk.thought.reasoning.ended) == (105, "given")
    assert robot.engine.ran.count("hear") == 1
    assert (await robot.act(reasoning={"mode": "given", "text": "Right."})).actions[0, 0] == 106
    assert (await robot.act()).thought.reasoning.ended == "complete", "the policy thinks for itself again"


async def test_a_chunk_whose_reasoning_takes_too_long_is_refused_and_the_reasoning_goes_on(slow) -> None:
    with pytest.raises(DeadlineExceeded):
        await slow.act(budget_ms=50)
    slow.engine.words.release(len(WORDS))
    await slow.settle()
    assert (await slow.act(budget_ms=5000)).thought.number == 1


async def test_runaway_reasoning_ends_in_time_and_is_acted_on() -> None:
    robot = Robot(words=2, spec=PolicySpec(**{**vars(SPEC), "reasoning": ReasoningSpec(tokens=5, budget_s=0.1)}))
    acting = asyncio.create_task(robot.act())
    await asyncio.sleep(0.2)
    robot.engine.words.release(1000)
    chunk = await acting
    assert chunk.thought.reasoning.ended == "time"
    assert "Go to the red cube".startswith(chunk.thought.reasoning.text)
    robot.scheduler.close()


async def test_an_episode_ends_with_its_thoughts(slow) -> None:
    acting = asyncio.create_task(slow.act())
    await asyncio.sleep(0.05)
    slow.session.reset()
    assert not slow.session.mind.is_reasoning
    with pytest.raises(asyncio.CancelledError):
        await acting


async def test_whatever_acts_goes_before_the_next_word(slow) -> None:
    other = slow.runtime.begin_session()
    inputs = {"state": np.zeros(1, np.float32), "prompt": "sort"}
    reasoning = asyncio.create_task(slow.act())
    await asyncio.sleep(0.02)
    for _ in range(20):
        runs = len(slow.engine.ran)
        await slow.runtime.act(other, Request(inputs, read_options({"reasoning": "none"})))
        assert slow.engine.ran[runs:].index("denoise") <= 1, "the word that is being said ends, and no other begins"
    slow.engine.words.release(1000)
    await reasoning


async def test_a_question_is_answered_in_words(robot) -> None:
    inputs = {"state": np.zeros(1, np.float32)}
    answer = await robot.runtime.ask(inputs, "What is there?", tenant="")
    assert answer.text == "What is there?"


async def test_policies_that_do_not_reason_refuse_the_option_and_questions() -> None:
    robot = Robot(spec=PolicySpec(**{**vars(SPEC), "reasoning": None}))
    with pytest.raises(InvalidOption, match="does not reason"):
        await robot.act(reasoning="latest")
    with pytest.raises(InvalidOption, match="answers no questions"):
        await robot.runtime.ask({}, "Why?", tenant="")
    robot.scheduler.close()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("deep", "'reasoning' is 'deep', expected one of latest, fresh, none, given"),
        ({"mode": "given"}, "reasoning.text"),
        ({"mode": "given", "text": ""}, "reasoning.text"),
        ({"mode": "latest", "every_s": -1}, "reasoning.every_s"),
        ({"mode": "none", "text": "x"}, "reasoning.text"),
        (7, "expected one of"),
    ],
)
def test_ways_that_do_not_exist_are_refused(raw, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        read_thinking(raw)
