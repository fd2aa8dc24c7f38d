"""The parts between a checked observation and a chunk, each alone."""

import asyncio
import time

import numpy as np
import pytest

from policy_models.program import GraphCall, Outcome, UnsuitableOptions
from policy_models.spec import PolicySpec, VectorSpec
from policy_server.errors import DeadlineExceeded, InvalidOption, Overloaded, StartupError
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.guard import Guard
from policy_server.runtime.options import read_options
from policy_server.runtime.policy import PolicyRuntime
from policy_server.runtime.queue import Queue
from policy_server.runtime.request import Request
from policy_server.runtime.sampling import drive
from policy_server.runtime.scheduler import Scheduler
from policy_server.runtime.session import Session, Sessions
from policy_server.runtime.version import Version
from policy_server.settings import Settings


class CountingEngine:
    """Answers every call with its inputs, and counts."""

    name, precision = "counting", "f32"
    differentiable = False
    most_runs = 1

    def __init__(self) -> None:
        self.calls = 0

    def run(self, graph, inputs):
        self.calls += 1
        return inputs

    def close(self) -> None:
        """Nothing to give back."""


KEPT = {"count": np.ones(1, dtype=np.int32)}


def _dialogue(steps: int, after_each=lambda: None):
    for _ in range(steps):
        yield GraphCall("denoise", {"x": np.zeros(1)})
        after_each()
    return Outcome(np.ones((2, 2), dtype=np.float32), KEPT)


def test_a_dialogue_is_driven_to_its_end() -> None:
    engine = CountingEngine()
    outcome = drive(_dialogue(5), engine)
    assert engine.calls == 5
    assert outcome.memory is KEPT


def test_a_dialogue_without_questions_needs_no_engine() -> None:
    assert drive(_dialogue(0), CountingEngine()).memory is KEPT


def test_steps_after_the_deadline_are_never_computed() -> None:
    engine = CountingEngine()
    with pytest.raises(DeadlineExceeded):
        drive(_dialogue(100, after_each=lambda: time.sleep(0.01)), engine, Deadline.after(0.05))
    assert 1 <= engine.calls < 100


def test_a_request_past_its_deadline_is_refused_before_anything_is_computed() -> None:
    engine = CountingEngine()
    with pytest.raises(DeadlineExceeded):
        drive(_dialogue(3), engine, Deadline.after(-1))
    assert engine.calls == 0


def test_a_full_queue_refuses_at_once_and_empties_again() -> None:
    queue = Queue(capacity=2)
    with queue, queue, pytest.raises(Overloaded, match="2 requests already wait"), queue:
        pass
    with queue:
        assert queue.taken == 1
    assert queue.taken == 0


async def test_options_that_the_policy_cannot_meet_are_the_clients_mistake() -> None:
    def unsuitable():
        raise UnsuitableOptions("fewer than 30 steps")
        yield

    scheduler = Scheduler("test", Stepping(), CountingEngine())
    with pytest.raises(InvalidOption, match="fewer than 30 steps"):
        await scheduler.run(unsuitable(), Deadline.after(10))
    scheduler.close()


LIMITED = VectorSpec(("a", "b"), ("rad", "rad"), (-1.0, 0.0), (1.0, 0.5))


def test_named_sessions_are_kept_until_there_are_too_many() -> None:
    sessions = Sessions(_new_session, capacity=2)
    first = sessions.get("first")
    sessions.get("second")
    assert sessions.get("first") is first
    sessions.get("third")  # pushes out the one that was used longest ago
    assert sessions.get("first") is first
    assert len(sessions) == 2


def test_a_session_that_was_idle_for_too_long_begins_anew() -> None:
    sessions = Sessions(_new_session, idle_s=-1)
    assert sessions.get("robot") is not sessions.get("robot")


def test_a_session_is_forgotten_when_asked_to() -> None:
    sessions = Sessions(_new_session)
    before = sessions.get("robot")
    assert sessions.forget("robot")
    assert not sessions.forget("robot")
    assert sessions.get("robot") is not before


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"steps": 0}, "options.steps"),
        ({"steps": 201}, "options.steps"),
        ({"steps": "many"}, "options.steps"),
        ({"guidance": float("nan")}, "options.guidance"),
        ({"guidance": -1}, "options.guidance"),
        ({"seed": -1}, "options.seed"),
        ({"seed": 2**63}, "options.seed"),
        ({"budget_ms": 0}, "options.budget_ms"),
        ({"sampler": "magic"}, "there is no sampler 'magic'"),
        ({"spets": 3}, "options.spets"),
        ([3], "'options' is list, expected a map"),
    ],
)
def test_an_option_out_of_range_is_named(raw, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        read_options(raw)


def test_left_out_options_are_the_policys_own() -> None:
    assert read_options(None) == read_options({})
    assert read_options({"steps": 3}).sampling().steps == 3


def test_every_chunk_has_a_fresh_seed_unless_one_was_asked_for() -> None:
    assert read_options(None).sampling().seed != read_options(None).sampling().seed
    assert read_options({"seed": 7}).sampling().seed == 7


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "robot.local"])
def test_a_server_that_others_can_reach_needs_keys(host: str, tmp_path) -> None:
    with pytest.raises(StartupError, match="no API key is set"):
        Settings(bundles=(tmp_path,), host=host)
    Settings(bundles=(tmp_path,), host=host, api_keys=("secret",))
    Settings(bundles=(tmp_path,), host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_none(host: str, tmp_path) -> None:
    assert Settings(bundles=(tmp_path,), host=host).api_keys == ()


class SlowEngine(CountingEngine):
    """Takes a while for every call."""

    def run(self, graph, inputs):
        time.sleep(0.2)
        return super().run(graph, inputs)


class Stepping:
    """A program over one number, with as many steps as asked for."""

    spec = PolicySpec(action=LIMITED, state=VectorSpec(("x",), ("m",)), horizon=2, step_s=0.1)

    def begin(self):
        return {}

    def infer(self, observation, memory, options):
        return _dialogue(options.steps)


def _version(engine, label="1") -> Version:
    scheduler = Scheduler("test", Stepping(), engine)
    return Version(label, Stepping.spec, scheduler, engine="counting", guard=Guard("test", Stepping.spec))


def _new_session() -> Session:
    return Session(_version(CountingEngine()))


async def _runtime_answers(engine, *requests):
    runtime = PolicyRuntime("test", _version(engine), capacity=8, timeout_s=10)
    asked = [
        runtime.act(runtime.begin_session(), Request({"state": [0.0]}, read_options(options))) for options in requests
    ]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert runtime.queue.taken == 0
    runtime.close()
    return answers


async def test_a_chunk_that_is_ready_too_late_is_refused() -> None:
    (answer,) = await _runtime_answers(SlowEngine(), {"steps": 1, "budget_ms": 50})
    assert isinstance(answer, DeadlineExceeded)


async def test_a_request_is_refused_at_its_deadline_and_not_when_its_turn_comes() -> None:
    engine = SlowEngine()
    first, second = await _runtime_answers(engine, {"steps": 5}, {"steps": 1, "budget_ms": 50})
    assert isinstance(first, ActionChunk)
    assert isinstance(second, DeadlineExceeded)
    assert engine.calls == 5, "what nobody waits for was computed"
