"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar, Unpack

from websockets.asyncio.client import ClientConnection, connect
from websockets.protocol import State

from policy_client.backoff import Deadline
from policy_client.base import BaseClient
from policy_client.chunk import ActionChunk
from policy_client.connecting import ATTEMPT_FAILURES, Attempts, awaiting
from policy_client.errors import ConnectionLost
from policy_client.protocol import Frame, InferOptions

T = TypeVar("T")


class AsyncPolicyClient(BaseClient[ClientConnection]):
    """`PolicyClient` for one event loop: the same arguments, verbs, rules and errors, awaited.

    Tasks may share a client: their requests take turns. To cancel a request drops the connection, since its
    reply would otherwise be taken for that of the next.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._turn = asyncio.Lock()
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect now, unless connected; see `PolicyClient.connect`."""
        self._closed.clear()
        async with self._turn:
            await self._ready()

    async def close(self) -> None:
        """End the session. A request in progress in another task fails with `ConnectionLost`."""
        self._closed.set()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def infer(self, observation: Mapping[str, Any], **options: Unpack[InferOptions]) -> ActionChunk:
        """Return the actions that follow an observation of this moment; see `PolicyClient.infer`."""
        made_at_s = time.monotonic()
        request = self._protocol.infer_request(observation, options)
        return await self._ask(request, lambda reply: self._protocol.infer_reply(reply, made_at_s))

    async def reset(self) -> None:
        """Tell the server that the episode ended; see `PolicyClient.reset`."""
        await self._ask(self._protocol.reset_request(), self._protocol.reset_reply)

    async def _ask(self, request: bytes, read_reply: Callable[[Frame], T]) -> T:
        async with self._turn:
            connection = await self._ready()
            try:
                deadline = Deadline(self.request_timeout_s)
                with awaiting("reply", deadline):
                    async with asyncio.timeout(deadline.remaining_s()):
                        await connection.send(request)
                        reply = await connection.recv()
                return read_reply(reply)
            except BaseException:  # its reply may still come, and would be taken for the next one's
                self._drop(connection)
                raise

    async def _ready(self) -> ClientConnection:
        connection = self._connection
        if connection is not None and connection.state is State.OPEN:
            return connection
        attempts = Attempts(self.url, self.connect_timeout_s, self.backoff)
        while not self._closed.is_set():
            try:
                return await self._open(attempts.deadline)
            except ATTEMPT_FAILURES as error:
                pause_s = attempts.pause_after_s(error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), pause_s)
        raise ConnectionLost("this client is closed")

    async def _open(self, deadline: Deadline) -> ClientConnection:
        connection = await connect(self.url, open_timeout=deadline.remaining_s(), **self._connect_options())
        try:
            with awaiting("metadata", deadline):
                async with asyncio.timeout(deadline.remaining_s()):
                    self._protocol.greet(await connection.recv())
            self._connection = connection
            if self._closed.is_set():  # meanwhile, by a task that found no connection to close
                raise ConnectionLost("this client is closed")
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def _drop(self, connection: ClientConnection) -> None:
        """Break a connection at once: a server that hangs would not answer a closing handshake."""
        self._connection = None
        connection.transport.abort()
