"""Moments of a stream that no network can be made to hit: the server's side, its socket in the hands of the test."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from policy_client.codec import pack, unpack
from policy_server.bundle import Bundle
from policy_server.catalog import ServedPolicy, load_catalog
from policy_server.gateway.stream import door, outbox
from policy_server.gateway.stream.sessions import StreamSessions
from policy_server.gateway.traffic import Traffic
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.request import Request
from policy_server.runtime.session import Session
from policy_server.settings import Settings

WAIT_S = 5.0
HERE = {"state": [0.5, -0.25], "top": np.zeros((48, 64, 3), np.uint8), "wrist": np.zeros((32, 32, 3), np.uint8)}


class Socket:
    """One connection, from the robot's side of the ASGI application."""

    def __init__(self) -> None:
        self.to_server: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.to_robot: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.writable = asyncio.Event()
        self.writable.set()
        self.to_server.put_nowait({"type": "websocket.connect"})

    def say(self, type_: str, **fields: Any) -> None:
        self.to_server.put_nowait({"type": "websocket.receive", "bytes": pack({"type": type_, **fields})})

    def observe(self, seq: int, **fields: Any) -> None:
        self.say("observation", **{"seq": seq, "captured_ns": 0, "observation": HERE, **fields})

    def leave(self) -> None:
        self.to_server.put_nowait({"type": "websocket.disconnect", "code": 1005})

    async def send(self, message: dict[str, Any]) -> None:
        await self.writable.wait()
        self.to_robot.put_nowait(message)

    async def hear(self, type_: str) -> dict[str, Any]:
        """Return the next message of this type; "close" is the end of the connection."""
        async with asyncio.timeout(WAIT_S):
            while True:
                event = await self.to_robot.get()
                if event["type"] == "websocket.close" and type_ == "close":
                    return event
                if event["type"] == "websocket.send" and (message := unpack(event["bytes"]))["type"] == type_:
                    return dict(message)


class Server:
    """A policy that holds still, and answers when the test says so."""

    def __init__(self, policy: ServedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy = policy
        self.sessions = StreamSessions(Traffic(), grace_s=60.0, capacity=4)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.requests: list[Request] = []
        act = policy.runtime.act

        async def hold(session: Session, request: Request) -> ActionChunk:
            self.requests.append(request)
            await self.may_answer.wait()
            return await act(session, request)

        monkeypatch.setattr(policy.runtime, "act", hold)

    @asynccontextmanager
    async def connection(self, **hello: Any) -> AsyncIterator[Socket]:
        """Serve one connection for as long as the context lasts."""
        socket = Socket()
        serving = asyncio.create_task(
            door.serve_stream(socket.to_server.get, socket.send, self.policy, self.sessions, "", 1 << 20)
        )
        if hello:
            socket.say("hello", **hello)
        yield socket
        socket.leave()
        async with asyncio.timeout(WAIT_S):
            await serving


@pytest.fixture(scope="module")
def policy(camera_bundle: Bundle) -> Iterator[ServedPolicy]:
    catalog = load_catalog(Settings((camera_bundle.path,)))
    yield catalog["camera"]
    catalog.close()


@pytest.fixture
async def server(policy: ServedPolicy, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(policy, monkeypatch)


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_who_says_no_hello_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HELLO_S", 0.01)
    async with server.connection() as socket:
        assert "no 'hello'" in (await socket.hear("error"))["message"]
        assert (await socket.hear("close"))["code"] == 1008
    assert len(server.sessions) == 0


async def test_the_goodbye_of_a_connection_that_was_replaced_does_not_end_the_session(server: Server) -> None:
    async with server.connection(protocol=1) as old:
        token = (await old.hear("welcome"))["resume"]
        old.writable.clear()  # its close cannot leave yet
        async with server.connection(protocol=1, resume=token) as new:
            assert (await new.hear("welcome"))["resumed"]
            old.observe(seq=7)
            old.say("bye")
            await _settled()
            new.observe(seq=1)
            chunk = await new.hear("chunk")
            assert (chunk["seq"], chunk["stale"]) == (1, 0)
            assert len(server.sessions) == 1
            old.writable.set()
            assert (await old.hear("close"))["code"] == 4001


async def test_an_observation_is_answered_with_the_set_that_it_named(server: Server) -> None:
    async with server.connection(protocol=1) as socket:
        server.may_answer.clear()
        socket.observe(seq=1)
        for revision in (1, 2):
            socket.say("set", revision=revision, options={"seed": revision})
            if revision == 1:
                socket.observe(seq=2, revision=1)
        await _settled()
        server.may_answer.set()
        assert (await socket.hear("chunk"))["seq"] == 1
        chunk = await socket.hear("chunk")
        assert (chunk["seq"], chunk["seed"]) == (2, 1)


async def test_what_an_episode_leaves_behind_does_not_reach_the_next(server: Server) -> None:
    async with server.connection(protocol=1) as socket:
        server.may_answer.clear()
        socket.observe(seq=1)
        await _settled()
        socket.say("reset", episode=1)
        server.may_answer.set()  # the answer is ready in the very moment of the reset
        socket.observe(seq=2, episode=1)
        chunk = await socket.hear("chunk")
        assert (chunk["seq"], chunk["episode"], chunk["continuity"]["overlap"]) == (2, 1, 0)
    assert server.policy.runtime.queue.taken == 0


async def test_a_fault_of_ours_is_told_by_an_id_alone_and_the_conversation_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> ActionChunk:
        raise ZeroDivisionError("secret")

    async with server.connection(protocol=1) as socket:
        with monkeypatch.context() as broken:
            broken.setattr(server.policy.runtime, "act", fail)
            socket.observe(seq=1)
            error = await socket.hear("error")
        assert (error["code"], error["seq"]) == ("internal", 1)
        assert "secret" not in error["message"]
        socket.observe(seq=2)
        assert (await socket.hear("chunk"))["seq"] == 2


async def test_a_session_that_ends_gives_up_what_it_is_answered(server: Server) -> None:
    async with server.connection(protocol=1) as socket:
        server.may_answer.clear()
        socket.observe(seq=1)
        socket.observe(seq=2)
        await _settled()
        socket.say("bye")
        assert (await socket.hear("close"))["code"] == 1000
    await _settled()
    assert len(server.requests) == 1
    assert len(server.sessions) == 0
    assert len(asyncio.all_tasks()) == 1, "something is left running"


async def test_a_robot_that_reads_nothing_finds_its_newest_chunk_and_a_bounded_number_of_others() -> None:
    waiting = outbox.Outbox()
    for n in range(1000):
        waiting.put({"type": "error", "n": n})
        waiting.put_chunk({"type": "chunk", "n": n})
    waiting.close(outbox.Close(1000))
    got = []
    while not isinstance(message := await waiting.next(), outbox.Close):
        got.append(message)
    assert [message["n"] for message in got] == [*range(936, 1000), 999]


async def test_many_messages_at_once_let_others_have_their_turn(server: Server) -> None:
    async with server.connection(protocol=1) as flooding, server.connection(protocol=1) as other:
        await flooding.hear("welcome")
        for n in range(5000):
            flooding.say("reset", episode=n)
        other.observe(seq=1)
        await other.hear("chunk")
        assert not flooding.to_server.empty()
