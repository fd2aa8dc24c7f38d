"""A policy goes from one version to the next while robots are on it."""

import asyncio
import threading
import time

import numpy as np

from policy_models.program import GraphCall, Outcome
from policy_models.spec import PolicySpec, VectorSpec
from policy_server.runtime.guard import Guard
from policy_server.runtime.policy import PolicyRuntime
from policy_server.runtime.request import Request
from policy_server.runtime.scheduler import Scheduler
from policy_server.runtime.version import Version

SPEC = PolicySpec(action=VectorSpec(("x",), ("m",)), state=VectorSpec(("x",), ("m",)), horizon=1, step_s=0.1)
STATE = {"state": [0.0]}


class Engine:
    """Answers after a while, and says when it was closed."""

    name, precision = "test", "f32"
    differentiable = False
    most_runs = 1

    def __init__(self) -> None:
        self._closed = threading.Event()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def run(self, graph, inputs):
        assert not self.closed, "a version that was still in use was closed"
        time.sleep(0.05)
        return inputs

    def close(self) -> None:
        self._closed.set()

    def wait(self) -> bool:
        return self._closed.wait(20)


class Program:
    """Says which version answers; counts observations if it remembers them."""

    spec = SPEC

    def __init__(self, number: int, remembers: bool) -> None:
        self.number = number
        self.remembers = remembers

    def begin(self):
        return {"count": np.zeros(1, np.int32)} if self.remembers else {}

    def infer(self, observation, memory, options):
        yield GraphCall("denoise", {"x": np.zeros((1, 1), np.float32)})
        memory = {"count": memory["count"] + 1} if self.remembers else memory
        return Outcome(np.full((1, 1), self.number, np.float32), memory)


def _version(number: int, remembers: bool) -> tuple[Version, Engine]:
    engine = Engine()
    scheduler = Scheduler("test", Program(number, remembers), engine)
    return Version(str(number), SPEC, scheduler, engine="test", guard=Guard("test", SPEC)), engine


async def _ask(runtime: PolicyRuntime, session) -> str:
    chunk = await runtime.act(session, Request(STATE))
    assert chunk.actions[0, 0] == float(chunk.version)
    return chunk.version


async def _gone(engine: Engine) -> None:
    assert await asyncio.to_thread(engine.wait)
    await asyncio.sleep(0.05)


def _serve(*, remembers: bool):
    (old, old_engine), (new, new_engine) = _version(1, remembers), _version(2, remembers)
    return PolicyRuntime("test", old, capacity=8, timeout_s=10), new, old_engine, new_engine


async def test_a_policy_that_remembers_nothing_moves_with_the_next_chunk() -> None:
    runtime, new, old_engine, _ = _serve(remembers=False)
    session = runtime.begin_session()
    assert await _ask(runtime, session) == "1"
    under_way = asyncio.create_task(_ask(runtime, session))
    await asyncio.sleep(0.01)
    runtime.swap(new)
    assert runtime.retiring == ("1",)
    assert await under_way == "1"
    assert await _ask(runtime, session) == "2"
    await _gone(old_engine)
    assert runtime.retiring == ()
    runtime.close()


async def test_an_episode_that_is_remembered_ends_where_it_began() -> None:
    runtime, new, old_engine, _ = _serve(remembers=True)
    on_its_way, newcomer = runtime.begin_session(), runtime.begin_session()
    assert await _ask(runtime, on_its_way) == "1"
    runtime.swap(new)
    assert [await _ask(runtime, on_its_way), await _ask(runtime, newcomer)] == ["1", "2"]
    assert await _ask(runtime, runtime.begin_session()) == "2"
    await asyncio.sleep(0.6)
    assert not old_engine.closed
    on_its_way.reset()
    assert await _ask(runtime, on_its_way) == "2"
    assert on_its_way.memory["count"] == 1, "the new episode began with nothing"
    await _gone(old_engine)
    runtime.close()


async def test_a_robot_that_leaves_lets_go_of_its_version() -> None:
    runtime, new, old_engine, _ = _serve(remembers=True)
    session = runtime.begin_session()
    await _ask(runtime, session)
    runtime.swap(new)
    del session
    await _gone(old_engine)
    runtime.close()


async def test_a_server_that_stops_closes_every_version() -> None:
    runtime, new, old_engine, new_engine = _serve(remembers=True)
    session = runtime.begin_session()
    await _ask(runtime, session)
    runtime.swap(new)
    runtime.close()
    assert old_engine.closed
    assert new_engine.closed
    assert session.in_episode
