"""Both clients against a real websocket server: what they make of every kind of answer, and of none."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time

import numpy as np
import pytest
from websockets.http11 import Request
from websockets.server import ServerProtocol

from policy_client import (
    AsyncPolicyClient,
    Backoff,
    ConnectFailed,
    ConnectionLost,
    PolicyClient,
    ProtocolError,
    RequestTimeout,
    ServerError,
    pack,
)
from tests.contract.scripted_server import METADATA, REFUSAL, TRACEBACK, actions, numbered, running

OBSERVATION = {"state": np.zeros(4, np.float32)}
QUICK = Backoff(first_s=0.01, longest_s=0.02)


class Awaited:
    """A client of either kind with awaited verbs, so that one suite tests both."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        value = getattr(self.client, name)
        if not inspect.ismethod(value) or inspect.iscoroutinefunction(value):
            return value
        return lambda *args, **kwargs: asyncio.to_thread(value, *args, **kwargs)


@pytest.fixture(params=[PolicyClient, AsyncPolicyClient], ids=["blocking", "asyncio"])
async def make_client(request, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    made = []

    def make(url, **settings):
        made.append(Awaited(request.param(url, backoff=QUICK, **settings)))
        return made[-1]

    yield make
    for client in made:
        await client.close()


async def test_a_reply_becomes_a_chunk(make_client):
    reply = {
        "actions": np.array([[1, 2, 3], [4, 5, 6]], np.float64),
        "state": np.zeros(4),
        "seed": 7,
        "policy": "beso",
        "server_timing": {"infer_ms": 3.0},
    }
    async with running(lambda *_: pack(reply)) as server:
        client = make_client(server.url)
        before_s = time.monotonic()
        chunk = await client.infer(OBSERVATION)
        assert before_s <= chunk.made_at_s <= time.monotonic()
        assert chunk.actions.dtype == np.float32
        assert chunk.actions.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert not chunk.actions.flags.writeable
        assert chunk.step_s == 0.05
        assert len(chunk) == 2
        assert set(chunk.metadata) == {"state", "seed", "policy", "server_timing"}
        assert client.metadata == METADATA


@pytest.mark.parametrize(("settings", "header"), [({"api_key": "secret"}, "Api-Key secret"), ({}, None)])
async def test_the_handshake_carries_the_key_and_no_compression(make_client, settings, header):
    async with running(numbered) as server:
        await make_client(server.url, **settings).connect()
        headers = server.connection.request.headers
        assert headers.get("Authorization") == header
        assert "Sec-WebSocket-Extensions" not in headers


@pytest.mark.parametrize(("reply", "code"), [(REFUSAL, "shape_mismatch"), (TRACEBACK, None)])
async def test_an_error_is_reported_and_the_next_request_connects_again(make_client, reply, code):
    async with running(lambda _, count: reply if count == 1 else actions()) as server:
        client = make_client(server.url)
        with pytest.raises(ServerError, match="'state'") as caught:
            await client.infer(OBSERVATION)
        assert caught.value.code == code
        await client.infer(OBSERVATION)
        assert server.sessions_begun == 2


async def test_a_reply_that_is_no_chunk_is_refused_and_ends_the_session(make_client):
    async with running(lambda _, count: pack([]) if count == 1 else actions()) as server:
        client = make_client(server.url)
        with pytest.raises(ProtocolError, match="the reply is a list, expected a map"):
            await client.infer(OBSERVATION)
        await client.infer(OBSERVATION)
        assert server.sessions_begun == 2


async def test_a_connection_that_ended_between_requests_is_made_again_unnoticed(make_client):
    async with running(numbered) as server:
        client = make_client(server.url)
        await client.infer(OBSERVATION)
        await server.connection.close()
        await client.infer(OBSERVATION)
        assert server.sessions_begun == 2


async def test_a_connection_lost_is_reported_and_the_next_request_connects_again(make_client):
    async with running(lambda _, count: None if count == 1 else actions()) as server:
        client = make_client(server.url)
        with pytest.raises(ConnectionLost, match="the connection broke before the reply came"):
            await client.infer(OBSERVATION)
        await client.infer(OBSERVATION)
        assert server.sessions_begun == 2


async def test_a_stale_reply_is_never_taken_for_the_answer_to_a_later_request(make_client):
    late = asyncio.Event()

    async def answer(request, count):
        if count == 1:
            await late.wait()
        return actions(request["n"])

    async with running(answer) as server:
        client = make_client(server.url, request_timeout_s=0.2)
        with pytest.raises(RequestTimeout, match=r"no reply within 0\.2 s"):
            await client.infer({"n": 1})
        client.client.request_timeout_s = 5.0
        late.set()
        assert (await client.infer({"n": 2})).actions[0, 0] == 2
        assert (await client.infer({"n": 3})).actions[0, 0] == 3
        assert server.sessions_begun == 2


async def test_requests_that_share_a_client_take_turns_and_get_their_own_answers(make_client):
    async def answer(request, _count):
        await asyncio.sleep(0)
        return actions(request["n"])

    async with running(answer) as server:
        client = make_client(server.url)
        chunks = await asyncio.gather(*(client.infer({"n": n}) for n in range(10)))
        assert [chunk.actions[0, 0] for chunk in chunks] == list(range(10))
        assert server.sessions_begun == 1


async def test_a_server_that_stops_reading_holds_nobody(make_client):
    async def reads_only_the_handshake(reader, writer):
        protocol = ServerProtocol()
        protocol.receive_data(await reader.readuntil(b"\r\n\r\n"))
        (request,) = protocol.events_received()
        assert isinstance(request, Request)
        protocol.send_response(protocol.accept(request))
        protocol.send_binary(pack(METADATA))
        writer.writelines(protocol.data_to_send())
        writer.transport.pause_reading()
        await done.wait()
        writer.transport.abort()

    done = asyncio.Event()
    async with await asyncio.start_server(reads_only_the_handshake, "127.0.0.1", 0) as server:
        client = make_client(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", request_timeout_s=0.3)
        with pytest.raises(RequestTimeout, match=r"no reply within 0\.3 s"):
            await client.infer({"image": np.zeros(32 << 20, np.uint8)})
        done.set()


async def test_a_refused_upgrade_is_not_tried_again_and_says_what_the_server_said(make_client):
    refused = []

    def refuse(connection, request):
        refused.append(request.path)
        return connection.respond(401, "no such key\n")

    async with running(numbered, process_request=refuse) as server:
        client = make_client(server.url, api_key="wrong")
        with pytest.raises(ConnectFailed, match=r"cannot connect to ws://.*: HTTP 401: no such key$") as caught:
            await client.connect()
        assert caught.value.status == 401
        assert refused == ["/"]


async def test_a_server_that_is_still_starting_is_tried_until_it_is_ready(make_client):
    statuses = iter([503, 503])

    def starting(connection, _request):
        status = next(statuses, None)
        return connection.respond(status, "warming up\n") if status else None

    async with running(numbered, process_request=starting) as server:
        assert len(await make_client(server.url).infer(OBSERVATION)) == 2


async def test_a_server_that_comes_up_late_is_waited_for(make_client):
    port = free_port()
    connecting = asyncio.create_task(make_client(f"ws://127.0.0.1:{port}").connect())
    await asyncio.sleep(0.1)
    assert not connecting.done()
    async with running(numbered, port=port) as server:
        await connecting
        assert server.sessions_begun == 1


async def test_a_server_that_never_comes_up_is_given_up_with_the_last_failure(make_client):
    client = make_client(f"ws://127.0.0.1:{free_port()}", connect_timeout_s=0.2)
    with pytest.raises(ConnectFailed, match=r"within 0\.2 s and \d+ attempts; the last failure: \w+Error: "):
        await client.connect()


async def test_metadata_that_never_arrives_is_not_waited_for_for_ever(make_client):
    async with running(numbered, metadata=None) as server:
        client = make_client(server.url, connect_timeout_s=0.5)
        with pytest.raises(ConnectFailed, match=r"the last failure: RequestTimeout: no metadata within 0\.5 s"):
            await client.connect()


async def test_an_error_in_place_of_the_metadata_is_reported(make_client):
    async with running(numbered, metadata="overloaded: 64 robots are connected, at most 64 may") as server:
        with pytest.raises(ServerError) as caught:
            await make_client(server.url).connect()
        assert caught.value.code == "overloaded"


async def test_a_reset_speaks_roboarenas_dialect_and_keeps_the_session(make_client):
    async with running(lambda request, _: "reset successful" if "endpoint" in request else actions()) as server:
        client = make_client(server.url)
        await client.infer(OBSERVATION)
        await client.reset()
        assert server.requests[-1] == {"endpoint": "reset"}
        await client.infer(OBSERVATION)
        assert server.sessions_begun == 1


async def test_closing_ends_the_request_in_progress_and_forbids_others_until_connected_again(make_client):
    asked = asyncio.Event()

    def answer(_request, count):
        asked.set()
        return b"" if count == 1 else actions()

    async with running(answer) as server:
        client = make_client(server.url)
        request = asyncio.create_task(client.infer(OBSERVATION))
        await asked.wait()
        await client.close()
        with pytest.raises(ConnectionLost):
            await request
        with pytest.raises(ConnectionLost, match="this client is closed"):
            await client.infer(OBSERVATION)
        await client.connect()
        await client.infer(OBSERVATION)
        assert server.sessions_begun == 2


async def test_closing_ends_the_wait_for_a_server(make_client):
    asked = asyncio.Event()

    def not_ready(connection, _request):
        asked.set()
        return connection.respond(503, "warming up\n")

    async with running(numbered, process_request=not_ready) as server:
        client = make_client(server.url, connect_timeout_s=60.0)
        connecting = asyncio.create_task(client.connect())
        await asked.wait()
        await client.close()
        with pytest.raises(ConnectionLost, match="this client is closed"):
            await connecting


async def test_a_cancelled_request_leaves_no_reply_behind(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    asked, late = asyncio.Event(), asyncio.Event()

    async def answer(request, count):
        asked.set()
        if count == 1:
            await late.wait()
        return actions(request["n"])

    async with running(answer) as server, AsyncPolicyClient(server.url) as client:
        request = asyncio.create_task(client.infer({"n": 1}))
        await asked.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        late.set()
        assert (await client.infer({"n": 2})).actions[0, 0] == 2


async def test_the_blocking_client_is_a_context(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    def episode(url):
        with PolicyClient(url) as client:
            return client.infer(OBSERVATION)

    async with running(numbered) as server:
        assert len(await asyncio.to_thread(episode, server.url)) == 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
