"""A robot's end of an openpi websocket that costs its processor next to nothing: ready-made frames out, payloads in."""

import asyncio
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from websockets.frames import Frame, Opcode

_UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Api-Key {key}\r\n\r\n"
)
_SWITCHED, _HEAD_END = b"HTTP/1.1 101 ", b"\r\n\r\n"
_FIN = 0x80
# Lengths that do not fit into the second byte of a frame follow it, in so many bytes.
_LONG = {126: struct.Struct("!H"), 127: struct.Struct("!Q")}


class Refused(Exception):
    """A server did not answer with a chunk; says what it sent instead."""


@dataclass(frozen=True)
class Reply:
    """One answer: the bytes of a frame, and the monotonic time at which they had arrived."""

    payload: bytes
    at_s: float


def frame_of(payload: bytes) -> bytes:
    """Return the frame of a client, masked and all, so that sending it again and again costs no more than a copy."""
    return Frame(Opcode.BINARY, payload).serialize(mask=True)


class RobotSocket(asyncio.Protocol):
    """One connection. Answers come in the order of the questions, so many may be asked at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._is_open = False
        self._asked: deque[asyncio.Future[Reply]] = deque()

    def ask(self, frame: bytes) -> asyncio.Future[Reply]:
        """Send a ready-made frame; the future holds its reply, or raises Refused."""
        answer: asyncio.Future[Reply] = self._loop.create_future()
        self._asked.append(answer)
        self._transport.write(frame)
        return answer

    def close(self) -> None:
        """Leave without a word."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        at_s = time.monotonic()
        self._buffer += data
        if not self._is_open:
            head, end, _ = self._buffer.partition(_HEAD_END)
            if not end:
                return
            if not head.startswith(_SWITCHED):
                self._fail(head.decode(errors="replace").partition("\r\n")[0])
                return
            del self._buffer[: len(head) + len(end)]
            self._is_open = True
        while frame := self._next_frame():
            opcode, payload = frame
            if opcode == Opcode.BINARY and self._asked:
                answer = self._asked.popleft()
                if not answer.done():  # nobody waits for it any more
                    answer.set_result(Reply(payload, at_s))
            elif opcode == Opcode.PING:
                self._transport.write(Frame(Opcode.PONG, payload).serialize(mask=True))
            elif opcode != Opcode.PONG:
                self._fail(payload.decode(errors="replace"))
                return

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._fail("the connection was lost")

    def _next_frame(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        assert buffer[0] & _FIN, "servers under measurement send their messages in one frame each"
        length, start = buffer[1], 2
        if long := _LONG.get(length):
            start += long.size
            if len(buffer) < start:
                return None
            (length,) = long.unpack_from(buffer, 2)
        if len(buffer) < start + length:
            return None
        opcode, payload = buffer[0] & ~_FIN, bytes(buffer[start : start + length])
        del buffer[: start + length]
        return opcode, payload

    def _fail(self, reason: str) -> None:
        self._transport.abort()
        while self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(Refused(reason))


async def connect_robot(url: str, key: str) -> RobotSocket:
    """Open a connection, and return once the server has introduced itself; raises Refused and OSError."""
    address = urlsplit(url)
    assert address.hostname and address.port, "the benchmarks name both"
    loop = asyncio.get_running_loop()
    _, robot = await loop.create_connection(RobotSocket, address.hostname, address.port)
    request = _UPGRADE.format(path=address.path or "/", host=address.netloc, key=key)
    await robot.ask(request.encode())
    return robot
