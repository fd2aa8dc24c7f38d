"""The streaming protocol on a websocket."""

import asyncio
import logging
import time
from typing import Any

from pydantic import TypeAdapter
from starlette.types import Receive, Send

from policy_client.codec import pack
from policy_models.spec import PolicySpec
from policy_server.catalog import ServedPolicy
from policy_server.errors import ClientError, MalformedMessage, PolicyServerError, TooManySessions, UnsupportedProtocol
from policy_server.gateway.stream.messages import PROTOCOL, Bye, Hello, NotOfThisProtocol, read_message
from policy_server.gateway.stream.outbox import Close, Outbox
from policy_server.gateway.stream.robot import error_message
from policy_server.gateway.stream.sessions import Kept, StreamSessions

logger = logging.getLogger(__name__)

_HELLO_S = 10.0
_PING_S = 1.0
_MOST_HZ = 1e5  # of a policy that costs nothing
_NOT_A_MESSAGE, _REFUSED, _NO_ROOM = 1002, 1008, 1013
_spec_adapter = TypeAdapter(PolicySpec)


async def serve_stream(
    receive: Receive, send: Send, policy: ServedPolicy, sessions: StreamSessions, tenant: str, max_message_bytes: int
) -> None:
    """Serve one connection of a robot until it ends."""
    await receive()  # the robot asks to be let in
    await send({"type": "websocket.accept"})
    outbox = Outbox()
    writer = asyncio.create_task(_write(send, outbox))
    kept: Kept | None = None
    try:
        kept = await _open(receive, policy, sessions, tenant, outbox, max_message_bytes)
        await _converse(receive, kept, outbox)
        if kept.robot.outbox is outbox:
            sessions.end(kept)
            outbox.close(Close(1000))
        await writer
    except _Left:
        pass
    except PolicyServerError as error:
        outbox.put(error_message(error))
        outbox.close(Close(_close_code(error), error.code))
        await writer
    finally:
        writer.cancel()
        if kept is not None:
            sessions.leave(kept, outbox)


class _Left(Exception):
    """The connection is gone."""


async def _open(
    receive: Receive,
    policy: ServedPolicy,
    sessions: StreamSessions,
    tenant: str,
    outbox: Outbox,
    max_message_bytes: int,
) -> Kept:
    try:
        async with asyncio.timeout(_HELLO_S):
            hello = read_message(await _frame(receive))
    except TimeoutError:
        raise MalformedMessage(f"no 'hello' came within {_HELLO_S:g} s") from None
    if not isinstance(hello, Hello):
        raise NotOfThisProtocol("the first message must be a 'hello'")
    if hello.protocol != PROTOCOL:
        raise UnsupportedProtocol(hello.protocol, PROTOCOL)
    left_hz = policy.runtime.admission.left_hz()
    kept, resumed = sessions.open(policy, hello, tenant, outbox)
    outbox.put(_welcome(kept, left_hz, sessions.grace_s, max_message_bytes, resumed=resumed))
    return kept


async def _converse(receive: Receive, kept: Kept, outbox: Outbox) -> None:
    """Take in what the robot says until it says bye, or speaks on another connection.

    Raises:
        _Left: It hung up.
        NotOfThisProtocol: It speaks something else.
    """
    pinger = asyncio.create_task(_ping(outbox))
    try:
        while True:
            frame = await _frame(receive)
            if kept.robot.outbox is not outbox:
                return  # what this connection still says, a bye for instance, is not about the session any more
            try:
                message = read_message(frame)
                if isinstance(message, Hello):
                    raise NotOfThisProtocol("there is one 'hello', at the beginning")
                if isinstance(message, Bye):
                    return
                kept.robot.take(message, time.monotonic())
            except NotOfThisProtocol:
                raise
            except ClientError as error:
                outbox.put(error_message(error))
    finally:
        pinger.cancel()


async def _frame(receive: Receive) -> bytes | None:
    """Return the next frame, None for one of text; raises _Left."""
    # Frames that came together are there at once: without this a robot that sends thousands would stop all the others.
    await asyncio.sleep(0)
    message = await receive()
    if message["type"] != "websocket.receive":
        raise _Left
    data: bytes | None = message.get("bytes")
    return data


async def _write(send: Send, outbox: Outbox) -> None:
    try:
        while not isinstance(message := await outbox.next(), Close):
            await send({"type": "websocket.send", "bytes": pack(message)})
        await send({"type": "websocket.close", "code": message.code, "reason": message.reason})
    except (OSError, RuntimeError):  # uvicorn's for a robot that has said goodbye, but has not hung up yet
        logger.debug("a robot left in mid-conversation")


async def _ping(outbox: Outbox) -> None:
    while True:
        outbox.put({"type": "ping", "sent_ns": time.monotonic_ns()})
        await asyncio.sleep(_PING_S)


def _welcome(kept: Kept, left_hz: float, grace_s: float, max_message_bytes: int, *, resumed: bool) -> dict[str, Any]:
    loaded = kept.policy.loaded
    return {
        "type": "welcome",
        "protocol": PROTOCOL,
        "session": kept.name,
        "resume": kept.token,
        "resumed": resumed,
        "seq": kept.robot.seq,
        "episode": kept.robot.episode,
        "grace_s": grace_s,
        "policy": kept.policy.bundle.name,
        "version": loaded.version.label,
        "engine": loaded.version.engine,
        "spec": _spec_adapter.dump_python(loaded.version.spec, mode="json"),
        "inputs": loaded.version.inputs,
        "max_message_bytes": max_message_bytes,
        "chunk_ms": loaded.chunk_ms,
        "rate_hz": min(left_hz, _MOST_HZ),
    }


def _close_code(error: PolicyServerError) -> int:
    if isinstance(error, NotOfThisProtocol):
        return _NOT_A_MESSAGE
    return _NO_ROOM if isinstance(error, TooManySessions) else _REFUSED
