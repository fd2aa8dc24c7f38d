"""What waits to be sent to one robot. Bounded: the newest of what is superseded takes the place of one not sent yet."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

_MOST = 64

Frame = dict[str, Any]


@dataclass(frozen=True)
class Close:
    """The end of a connection, with its websocket close code."""

    code: int
    reason: str = ""


class Outbox:
    """The messages of one connection, in their order; the newest reasoning after them, and the newest chunk last.

    A robot that reads slowly misses chunks; one that hardly reads at all misses the oldest of the others too.
    """

    def __init__(self) -> None:
        self._others: deque[Frame] = deque(maxlen=_MOST)
        self._reasoning: Frame | None = None
        self._chunk: Frame | None = None
        self._close: Close | None = None
        self._wake = asyncio.Event()

    def put(self, message: Frame) -> None:
        """Add a message."""
        self._others.append(message)
        self._wake.set()

    def put_reasoning(self, reasoning: Frame) -> None:
        """Add a reasoning, as far as it has come, in place of one that waits."""
        self._reasoning = reasoning
        self._wake.set()

    def put_chunk(self, chunk: Frame) -> None:
        """Add a chunk, in place of one that waits."""
        self._chunk = chunk
        self._wake.set()

    def drop_chunk(self) -> None:
        """Take out a chunk that waits: nobody wants it any more."""
        self._chunk = None

    def close(self, close: Close) -> None:
        """End the connection once everything before has been sent."""
        self._close = close
        self._wake.set()

    async def next(self) -> Frame | Close:
        """Wait for the next message, and take it out."""
        while True:
            if self._others:
                return self._others.popleft()
            if self._reasoning is not None:
                reasoning, self._reasoning = self._reasoning, None
                return reasoning
            if self._chunk is not None:
                chunk, self._chunk = self._chunk, None
                return chunk
            if self._close is not None:
                return self._close
            self._wake.clear()
            await self._wake.wait()
