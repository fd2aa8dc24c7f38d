"""The openpi websocket, with questions sent ahead of answers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from policy_client.backoff import Backoff, Deadline
from policy_client.bench.doors import Answer, Observations, Target
from policy_client.connecting import ATTEMPT_FAILURES, Attempts, awaiting, connect_options
from policy_client.errors import ConnectionLost, PolicyClientError
from policy_client.protocol import PolicyProtocol


class OpenpiDoor:
    """Sends each observation at its time; replies come in the order of the requests.

    A server that refuses something hangs up, as openpi's do. What waited is lost then, and so is what is asked until
    the next connection is made.
    """

    def __init__(self, url: str, target: Target, observations: Observations) -> None:
        self._url, self._target = url, target
        self._protocol = PolicyProtocol(target.step_s)
        self._frames = [self._protocol.infer_request(observation, {}) for observation in observations]
        self._connection: ClientConnection | None = None
        self._to_send: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting: deque[tuple[Callable[[Answer], None], Callable[[Exception], None]]] = deque()
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, and stay connected until `close`."""
        self._connection = await self._connect()
        self._keeper = asyncio.create_task(self._keep(self._connection))

    def ask(self, number: int, answered: Callable[[Answer], None], failed: Callable[[Exception], None]) -> None:
        """Send an observation."""
        if self._connection is None:
            failed(ConnectionLost("asked between two connections"))
            return
        self._waiting.append((answered, failed))
        self._to_send.put_nowait(self._frames[number % len(self._frames)])

    async def close(self) -> None:
        """Disconnect."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _connect(self) -> ClientConnection:
        attempts = Attempts(self._url, self._target.connect_timeout_s, Backoff())
        while True:
            try:
                return await self._open_once(attempts.deadline)
            except ATTEMPT_FAILURES as error:
                await asyncio.sleep(attempts.pause_after_s(error))

    async def _open_once(self, deadline: Deadline) -> ClientConnection:
        # A stock openpi server answers no pings while it infers.
        options = {**connect_options(self._target.api_key), "ping_interval": None}
        connection = await connect(self._url, open_timeout=deadline.remaining_s(), **options)
        try:
            with awaiting("metadata", deadline):
                async with asyncio.timeout(deadline.remaining_s()):
                    self._protocol.greet(await connection.recv())
        except BaseException:
            connection.transport.abort()
            raise
        return connection

    async def _keep(self, connection: ClientConnection) -> None:
        while True:
            lost = await self._converse(connection)
            self._connection, self._to_send = None, asyncio.Queue()
            while self._waiting:
                self._waiting.popleft()[1](lost)
            connection.transport.abort()
            try:
                connection = self._connection = await self._connect()
            except PolicyClientError:  # what is asked from now on fails, one by one
                return

    async def _converse(self, connection: ClientConnection) -> Exception:
        """Send and receive until the connection is lost; return why."""
        sender = asyncio.create_task(self._send(connection))
        try:
            while True:
                frame = await connection.recv()
                received_s = time.monotonic()
                try:
                    chunk = self._protocol.infer_reply(frame, received_s)
                except PolicyClientError as error:
                    if self._waiting:
                        self._waiting.popleft()[1](error)
                    continue
                if self._waiting:
                    self._waiting.popleft()[0](Answer(received_s, len(chunk), _stages_ms(chunk.metadata)))
        except ConnectionClosed as error:
            return ConnectionLost(f"the connection broke before the reply came: {error}")
        finally:
            sender.cancel()

    async def _send(self, connection: ClientConnection) -> None:
        with suppress(ConnectionClosed):  # the receiving side sees it too, and says why
            while True:
                await connection.send(await self._to_send.get())


def _stages_ms(reply: Mapping[str, Any]) -> dict[str, float]:
    """Return inference, and what the server needed around it."""
    infer_ms, server_ms = (_infer_ms(reply.get(key)) for key in ("policy_timing", "server_timing"))
    if infer_ms is None:
        return {} if server_ms is None else {"server": server_ms}
    around = {} if server_ms is None else {"around inference": max(0.0, server_ms - infer_ms)}
    return {"inference": infer_ms, **around}


def _infer_ms(timing: Any) -> float | None:
    value = timing.get("infer_ms") if isinstance(timing, Mapping) else None
    return float(value) if isinstance(value, int | float) else None
