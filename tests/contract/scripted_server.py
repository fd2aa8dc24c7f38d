"""A policy server whose every answer is written by the test."""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager, suppress

import numpy as np
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosedError

from policy_client import pack, unpack

METADATA = {"policy": "beso", "step_s": 0.05, "horizon": 2}
TRACEBACK = "Traceback (most recent call last):\n  File \"policy.py\", line 1\nKeyError: 'state'\n"
REFUSAL = "shape_mismatch: 'state' has shape (3,), expected (4,)"


class Server:
    """Speaks openpi's protocol.

    `answer(frame, count)` returns the reply to the session's frame, b"" for none, or None to hang up without one.
    """

    def __init__(self, answer, metadata=METADATA):
        self.answer, self.metadata = answer, metadata
        self.url = ""
        self.requests = []
        self.connection = None
        self.sessions_begun = 0

    async def session(self, connection):
        self.connection = connection
        self.sessions_begun += 1
        if self.metadata is not None:
            await connection.send(self.metadata if isinstance(self.metadata, str) else pack(self.metadata))
        with suppress(ConnectionClosedError):
            async for frame in connection:
                self.requests.append(unpack(frame))
                await self.reply(connection, self.answer(self.requests[-1], len(self.requests)))

    async def reply(self, connection, reply):
        reply = await reply if inspect.isawaitable(reply) else reply
        if reply:
            await connection.send(reply)
        if reply in (None, TRACEBACK, REFUSAL):
            await connection.close(1011, "Internal server error. Traceback included in previous frame.")


@asynccontextmanager
async def running(answer, metadata=METADATA, port=0, **options):
    server = Server(answer, metadata)
    async with serve(server.session, "127.0.0.1", port, compression=None, max_size=None, **options) as listening:
        server.url = f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield server


def actions(value=0.0):
    return pack({"actions": np.full((2, 3), value, np.float32)})


def numbered(_request, count):
    return actions(count)
