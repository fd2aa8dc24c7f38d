"""A websocket proxy between robots and a server, which treats their messages as a bad network would."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State

from benchmarks.faults import FaultPlan, Faults, Line

logger = logging.getLogger(__name__)
T = TypeVar("T")

HOST = "127.0.0.1"
_TIMEOUT_S = 10.0
# A line that holds more takes nothing more from its sender, as full socket buffers would not.
_FULL_BYTES = 1 << 20
# The proxy's two connections make these headers themselves.
_OWN_HEADERS = frozenset({"host", "upgrade", "connection", "user-agent"})
_HOP_HEADERS = frozenset({"connection", "transfer-encoding", "content-length"})


@dataclass
class Counts:
    """What happened in one direction so far, in messages; `aborted`, `torn` and `hung` in connections."""

    received: int = 0
    forwarded: int = 0
    dropped: int = 0
    duplicated: int = 0
    reordered: int = 0
    aborted: int = 0
    torn: int = 0
    hung: int = 0


@dataclass
class ProxyCounts:
    """What happened so far.

    Attributes:
        connections: Those that came about.
        refused: Upgrades that the server refused.
        up: From robots to the server.
        down: From the server to robots.
    """

    connections: int = 0
    refused: int = 0
    up: Counts = field(default_factory=Counts)
    down: Counts = field(default_factory=Counts)


class FaultProxy:
    """A proxy in a thread of its own, for as long as its context lasts.

    Headers, paths, refused upgrades, text, bytes and close codes pass as they are. Pings do not: the proxy answers
    them, unless the direction they come from hangs. Connection n of a proxy has the nth faults of its seed, so robots
    that are to be treated alike in every run need a proxy each.

    Attributes:
        counts: What happened so far.
        url: Where robots connect; known once the context is entered.
    """

    url: str

    def __init__(self, server_port: int, *, up: Faults | None = None, down: Faults | None = None) -> None:
        """Plan a proxy.

        Args:
            server_port: Where the server listens on this machine.
            up: What happens to messages of robots; nothing by default.
            down: What happens to messages of the server.
        """
        self.counts = ProxyCounts()
        self._server_port = server_port
        self._up, self._down = up or Faults(), down or Faults()
        self._servers: dict[ServerConnection, ClientConnection] = {}
        self._robots: dict[ServerConnection, asyncio.Task[None]] = {}

    def __enter__(self) -> Self:
        """Listen; raises OSError if that is impossible."""
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        listening: asyncio.Future[int] = self._loop.create_future()
        self._running = asyncio.run_coroutine_threadsafe(self._run(listening), self._loop)
        self.url = f"ws://{HOST}:{self._do(asyncio.wait_for(listening, _TIMEOUT_S))}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        try:
            self._running.result(_TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_TIMEOUT_S)
            self._loop.close()

    def cut(self) -> int:
        """Cut every connection now; returns how many there were."""

        async def cut() -> int:
            for robot in self._robots:
                _abort(robot, self._servers[robot])
            return len(self._robots)

        return self._do(cut())

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(_TIMEOUT_S)

    async def _run(self, listening: asyncio.Future[int]) -> None:
        try:
            server = await serve(
                self._forward,
                HOST,
                0,
                process_request=self._reach,
                server_header=None,
                compression=None,
                max_size=None,
                ping_interval=None,
            )
        except OSError as error:
            listening.set_exception(error)
            return
        listening.set_result(server.sockets[0].getsockname()[1])
        await self._ended.wait()
        server.close(close_connections=False)
        for robot, task in list(self._robots.items()):
            _abort(robot)
            task.cancel()
        for connection in self._servers.values():
            _abort(connection)
        await server.wait_closed()

    async def _reach(self, robot: ServerConnection, request: Request) -> Response | None:
        """Connect to the server before the robot is let in; returns the server's refusal."""
        headers = [
            (name, value)
            for name, value in request.headers.raw_items()
            if name.lower() not in _OWN_HEADERS and not name.lower().startswith("sec-websocket-")
        ]
        try:
            self._servers[robot] = await connect(
                f"ws://{HOST}:{self._server_port}{request.path}",
                additional_headers=headers,
                user_agent_header=request.headers.get("User-Agent"),
                compression=None,
                max_size=None,
                ping_interval=None,
                open_timeout=_TIMEOUT_S,
                proxy=None,
            )
        except InvalidStatus as refused:
            self.counts.refused += 1
            return _passed_on(refused.response)
        except (OSError, InvalidHandshake) as error:
            logger.debug("the server is out of reach: %s", error)
            _abort(robot)  # what a robot sees when nothing listens
            return robot.respond(502, "")
        if robot.state is State.CLOSED:  # it did not wait, and `_forward` will not be called
            _abort(self._servers.pop(robot))
        return None

    async def _forward(self, robot: ServerConnection) -> None:
        server = self._servers[robot]
        number, self.counts.connections = self.counts.connections, self.counts.connections + 1
        ways = (
            _Way(robot, server, self._up, FaultPlan(self._up, f"{number} up"), self.counts.up),
            _Way(server, robot, self._down, FaultPlan(self._down, f"{number} down"), self.counts.down),
        )
        task = asyncio.current_task()
        assert task is not None
        self._robots[robot] = task
        try:
            async with asyncio.TaskGroup() as group:
                for way in ways:
                    group.create_task(way.run())
        finally:
            _abort(robot, server)
            del self._robots[robot], self._servers[robot]


class _Way:
    """One direction of one connection."""

    def __init__(self, source: Connection, sink: Connection, faults: Faults, plan: FaultPlan, counts: Counts) -> None:
        self._source = source
        self._sink = sink
        self._faults = faults
        self._plan = plan
        self._counts = counts
        self._line = Line(faults.bytes_per_s)
        self._changed = asyncio.Event()  # something came, left, or ended
        self._end: ConnectionClosed | None = None

    async def run(self) -> None:
        """Forward until the source has closed and all it sent has arrived, or nobody is left to take it."""
        reading = asyncio.create_task(self._read())
        try:
            await self._write(reading)
        except ConnectionClosed:
            logger.debug("a receiver left before its messages arrived")
        finally:
            reading.cancel()

    async def _read(self) -> None:
        clock = asyncio.get_running_loop().time
        counts = self._counts
        while True:
            try:
                message = await self._source.recv()
            except ConnectionClosed as closed:
                self._end = closed
                self._changed.set()
                return
            fate = self._plan.next()
            counts.received += 1
            counts.dropped += fate.copies == 0
            counts.duplicated += fate.copies == 2
            counts.reordered += fate.overtaken
            self._line.push(message, fate, clock())
            self._changed.set()
            while self._line.waiting_bytes > _FULL_BYTES:
                self._changed.clear()
                await self._changed.wait()

    async def _write(self, reading: asyncio.Task[None]) -> None:
        clock = asyncio.get_running_loop().time
        cut = self._plan.cut
        cut_at_s = clock() + cut.after_s if cut else None
        while True:
            is_cut = cut_at_s is not None and clock() >= cut_at_s
            if cut and is_cut and cut.kind == "abort":
                self._counts.aborted += 1
                return _abort(self._source, self._sink)
            if cut and is_cut and cut.kind == "hang":
                return await self._hang(reading)
            message = self._line.pop(clock())
            if message is not None and is_cut:
                return self._tear(message)
            if message is not None:
                await self._sink.send(message)
                self._counts.forwarded += 1
                self._changed.set()
                continue
            due_at_s = self._line.due_at_s
            if self._end and due_at_s is None:
                return await self._close(self._end.rcvd)
            self._changed.clear()
            times_s = [at_s for at_s in (due_at_s, None if is_cut else cut_at_s) if at_s is not None]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(times_s, default=None)):
                    await self._changed.wait()

    async def _close(self, close: Close | None) -> None:
        if close is None:
            _abort(self._sink)
        else:
            code = CloseCode.NORMAL_CLOSURE if close.code == CloseCode.NO_STATUS_RCVD else close.code
            await self._sink.close(code, close.reason)

    async def _hang(self, reading: asyncio.Task[None]) -> None:
        self._counts.hung += 1
        reading.cancel()
        self._source.transport.pause_reading()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._faults.hang_s):
                await self._source.wait_closed()
        _abort(self._source, self._sink)

    def _tear(self, message: bytes | str) -> None:
        """Send half a frame, and nothing after it."""
        self._counts.torn += 1
        opcode, data = (Opcode.TEXT, message.encode()) if isinstance(message, str) else (Opcode.BINARY, message)
        frame = Frame(opcode, data).serialize(mask=isinstance(self._sink, ClientConnection))
        self._sink.transport.write(frame[: len(frame) // 2])
        _abort(self._source, self._sink)


def _abort(*connections: Connection) -> None:
    for connection in connections:
        connection.transport.abort()


def _passed_on(response: Response) -> Response:
    """Return a refusal with the headers that belong to it and not to the connection it came over."""
    body = bytes(response.body or b"")
    headers = Headers((n, v) for n, v in response.headers.raw_items() if n.lower() not in _HOP_HEADERS)
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    return Response(response.status_code, response.reason_phrase, headers, body)
