"""One robot's session, whatever becomes of its messages on their way."""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_models.spec import PolicySpec, Reasoning, VectorSpec
from policy_server.errors import DeadlineExceeded
from policy_server.gateway.stream.messages import Cancel, Hello, Observe, Pong, Reset, Set
from policy_server.gateway.stream.outbox import Outbox
from policy_server.gateway.stream.robot import RobotSession, read_wishes
from policy_server.gateway.traffic import Traffic
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.continuity import Joint
from policy_server.runtime.guard import GuardReport
from policy_server.runtime.thinking import Mind, Thought

SPEC = PolicySpec(action=VectorSpec(("x",), ("m",)), state=VectorSpec(("x",), ("m",)), horizon=2, step_s=0.1)
CHUNK = ActionChunk(np.zeros((2, 1), np.float32), 0.1, 0, GuardReport(), 1.0, "test", "1", Joint("replace"))


@dataclass
class FakeSession:
    """Counts its resets."""

    resets: int = 0
    mind: Mind = field(default_factory=Mind)

    def reset(self) -> None:
        self.resets += 1


@dataclass
class FakeRuntime:
    """Answers when it is told to, one observation at a time."""

    name = "test"
    version = type("Version", (), {"spec": SPEC})
    asked: list = field(default_factory=list)
    answering: "asyncio.Future[ActionChunk] | None" = None
    session: FakeSession = field(default_factory=FakeSession)

    def begin_session(self) -> FakeSession:
        return self.session

    async def act(self, session, request) -> ActionChunk:
        assert self.answering is None, "two observations of one robot were answered at once"
        self.asked.append(request)
        self.answering = asyncio.get_running_loop().create_future()
        try:
            return await self.answering
        finally:
            self.answering = None

    def answer(self, result=CHUNK) -> None:
        """Answer what is being asked, if anything is."""
        if self.answering is not None and not self.answering.done():
            if isinstance(result, Exception):
                self.answering.set_exception(result)
            else:
                self.answering.set_result(result)


class Robot:
    """A session with a fake runtime, and everything that was sent."""

    def __init__(self, **hello) -> None:
        self.runtime = FakeRuntime()
        self.session = RobotSession(self.runtime, "tenant", Traffic())
        self.session.greet(read_wishes(Hello(protocol=1, **hello), SPEC))
        self.outbox = self.session.outbox = Outbox()
        self.sent: list[dict] = []

    def take(self, message, now_s: float = 0.0) -> None:
        self.session.take(message, now_s)

    def observe(self, seq: int, episode: int = 0, **more) -> None:
        self.take(Observe(seq=seq, captured_ns=seq * 10**6, observation={"state": [seq]}, episode=episode, **more))

    async def settle(self) -> None:
        """Let everything happen that waits for nobody."""
        for _ in range(6):
            await asyncio.sleep(0)

    async def answer(self, result=CHUNK) -> None:
        await self.settle()
        self.runtime.answer(result)
        await self.settle()

    async def read(self) -> None:
        """Read what has been sent so far."""
        while True:
            coming = asyncio.create_task(self.outbox.next())
            await asyncio.sleep(0)
            if not coming.done():
                coming.cancel()
                return
            self.sent.append(coming.result())

    def chunks(self) -> list[int]:
        return [frame["seq"] for frame in self.sent if frame["type"] == "chunk"]

    def errors(self) -> list[tuple[str, int]]:
        return [(frame["code"], frame["seq"]) for frame in self.sent if frame["type"] == "error"]


messages = st.one_of(
    st.tuples(st.just("observe"), st.integers(0, 11)),
    st.tuples(st.just("observe"), st.integers(0, 11)),
    st.tuples(st.sampled_from(["answer", "fail", "read"]), st.just(0)),
    st.tuples(st.just("reset"), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(1, 12)),
)


@given(st.lists(st.integers(0, 1), min_size=12, max_size=12), st.lists(messages, max_size=40))
@settings(max_examples=150, deadline=None)
def test_whatever_is_lost_doubled_or_late_chunks_rise_and_the_last_observation_is_answered(turns, network) -> None:
    """Twelve observations, each in its episode; the network delivers any of them, in any order, any number of times."""
    episodes = np.cumsum(turns).tolist()

    async def live() -> None:
        robot = Robot()
        newest, last, arrived, dropped = (
            0,
            None,
            0,
            0,
        )  # by a model of our own: highest seq, and who waits for an answer
        episode = 0
        for kind, number in network:
            if kind == "observe":
                seq, its_episode = number + 1, episodes[number]
                arrived += 1
                if seq > newest and its_episode >= episode:
                    newest, last, episode = seq, seq, its_episode
                else:
                    dropped += 1
                robot.observe(seq, its_episode)
            elif kind == "reset":
                if number > episode:
                    episode, last = number, None
                robot.take(Reset(episode=number))
            elif kind == "cancel":
                last = None if last is not None and last <= number else last
                robot.take(Cancel(seq=number))
            elif kind == "read":
                begun = len(robot.sent)
                await robot.read()
                for frame in robot.sent[begun:]:
                    assert frame["type"] != "chunk" or frame["episode"] == episode, "a chunk of an old episode was sent"
            else:
                await robot.answer(DeadlineExceeded(1.0) if kind == "fail" else CHUNK)
                if kind == "fail" and robot.runtime.answering is None:
                    last = None  # whatever it was, it was answered with an error
        for _ in range(3):
            await robot.answer()
        await robot.read()
        chunks = robot.chunks()
        assert chunks == sorted(set(chunks)), "the numbers of chunks do not rise"
        assert robot.session.stale == dropped
        assert robot.session.superseded <= arrived - dropped
        assert (robot.session.seq, robot.session.episode) == (newest, episode)
        if last is not None:
            assert chunks[-1:] == [last], "the last observation has no answer"
        assert robot.runtime.answering is None

    asyncio.run(live())


async def test_while_one_is_answered_the_newest_of_the_others_waits() -> None:
    robot = Robot()
    for seq in (1, 2, 3, 7):
        robot.observe(seq)
        await robot.settle()
    await robot.answer()
    await robot.answer()
    await robot.read()
    assert [request.timing.seq for request in robot.runtime.asked] == [1, 7]
    assert robot.session.superseded == 2
    assert robot.sent[-1]["superseded"] == 2
    assert robot.sent[-1]["seq"] == 7, "chunk 1 was never read, and 7 took its place"


async def test_what_came_twice_or_late_is_counted_and_not_answered() -> None:
    robot = Robot()
    for seq in (5, 5, 3):
        robot.observe(seq)
    await robot.answer()
    await robot.read()
    assert robot.chunks() == [5]
    assert robot.session.stale == 2


async def test_a_new_episode_gives_up_the_old_one_and_forgets() -> None:
    robot = Robot()
    robot.observe(1)
    await robot.settle()
    robot.observe(2, episode=1)
    await robot.settle()
    assert robot.runtime.session.resets == 1
    robot.observe(3, episode=0)
    await robot.answer()
    await robot.read()
    assert robot.chunks() == [2]
    assert robot.session.stale == 1


async def test_a_chunk_that_has_not_left_when_its_episode_ends_never_does() -> None:
    robot = Robot()
    robot.observe(1)
    await robot.answer()
    robot.take(Reset(episode=1))
    await robot.read()
    assert robot.chunks() == []


async def test_a_cancelled_observation_is_not_answered_and_a_later_one_is() -> None:
    robot = Robot()
    robot.observe(1)
    await robot.settle()
    robot.observe(2)
    robot.take(Cancel(seq=2))
    await robot.settle()
    assert robot.runtime.answering is None
    robot.observe(3)
    await robot.answer()
    await robot.read()
    assert robot.chunks() == [3]


async def test_an_error_is_about_its_observation_and_the_session_goes_on() -> None:
    robot = Robot()
    robot.observe(1)
    await robot.answer(DeadlineExceeded(3.0))
    robot.observe(2)
    await robot.answer()
    await robot.read()
    assert robot.errors() == [("deadline_exceeded", 1)]
    assert robot.chunks() == [2]


async def test_an_observation_that_relies_on_a_set_that_never_came_is_refused() -> None:
    robot = Robot()
    robot.observe(1, revision=2)
    robot.take(Set(revision=2, inputs={"goal": [1.0]}, options={"steps": 5}))
    robot.take(Set(revision=1, inputs={"goal": [2.0]}))
    robot.observe(2, revision=2, options={"seed": 7})
    await robot.answer()
    robot.observe(3)
    await robot.answer()
    await robot.read()
    assert robot.errors() == [("unknown_revision", 1)]
    first, second = robot.runtime.asked
    assert first.inputs == {"goal": [1.0], "state": [2]}
    assert (first.options.steps, first.options.seed) == (5, 7)
    assert second.inputs == {"state": [3]}


async def test_a_deadline_leaves_the_server_what_the_ways_do_not_take() -> None:
    robot = Robot(deadline_ms=100.0)
    # The robot's clock shows the same as ours, and a ping takes 10 ms each way.
    robot.take(Pong(sent_ns=0, robot_ns=10 * 10**6), now_s=0.020)
    robot.observe(1, options={"budget_ms": 500.0})
    await robot.settle()
    (request,) = robot.runtime.asked
    assert request.options.budget_ms <= 90.0


async def test_a_session_without_a_connection_goes_on_and_says_nothing() -> None:
    robot = Robot()
    robot.observe(1)
    await robot.settle()
    robot.session.outbox = None
    await robot.answer()
    robot.session.outbox = robot.outbox
    robot.observe(2)
    await robot.answer()
    await robot.read()
    assert robot.chunks() == [2]


async def test_a_session_that_is_closed_asks_nothing_more() -> None:
    robot = Robot()
    robot.observe(1)
    await robot.settle()
    robot.observe(2)
    robot.session.close()
    await robot.settle()
    assert robot.runtime.answering is None
    assert len(robot.runtime.asked) == 1


@pytest.mark.parametrize("said_ms", [None, 120.0])
async def test_the_delay_is_what_the_robot_says_or_what_recent_chunks_took(said_ms: float | None) -> None:
    robot = Robot()
    robot.session.delays.note(0.35)
    robot.observe(1, delay_ms=said_ms, playing=9)
    await robot.settle()
    (request,) = robot.runtime.asked
    assert request.timing.delay_s == pytest.approx(0.35 if said_ms is None else 0.12)
    assert request.timing.playing == 9


async def test_a_reasoning_that_grows_is_told_as_far_as_it_has_come_and_waits_for_no_slow_robot() -> None:
    robot = Robot()
    mind = robot.runtime.session.mind
    for text in ("The", "The red", "The red cube"):
        mind.listen(Thought(1, Reasoning(text), "sort", 0.0, goes_on=True))
    told = await robot.outbox.next()
    assert (told["type"], told["number"], told["text"], told["ended"]) == ("reasoning", 1, "The red cube", "")
    mind.listen(Thought(1, Reasoning("The red cube", ended="complete"), "sort", 0.0))
    assert (await robot.outbox.next())["ended"] == "complete"


async def test_a_chunk_names_the_reasoning_that_it_acts_on() -> None:
    robot = Robot()
    robot.observe(1)
    thought = Thought(3, Reasoning("Go left.", ended="complete"), "sort", 0.0)
    await robot.answer(replace(CHUNK, thought=thought))
    chunk = await robot.outbox.next()
    assert {k: chunk["reasoning"][k] for k in ("number", "text", "ended")} == {
        "number": 3,
        "text": "Go left.",
        "ended": "complete",
    }
