"""The streaming protocol, where the newest observation wins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from policy_client.bench.doors import Answer, Observations, Target
from policy_client.chunk import ActionChunk
from policy_client.errors import PolicyClientError, StreamRefusal
from policy_client.stream import PolicyStream


class StreamDoor:
    """Sends over a `PolicyStream`.

    An observation counts as answered when a chunk comes for it or for a newer one: of what a server could not
    answer in time it answers the newest, and that serves the robot.
    """

    def __init__(self, url: str, target: Target, observations: Observations) -> None:
        self._observations = observations
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, tuple[Callable[[Answer], None], Callable[[Exception], None]]] = {}  # by seq, rising
        self._stream = PolicyStream(
            url,
            api_key=target.api_key,
            name="policy-bench",
            connect_timeout_s=target.connect_timeout_s,
            on_chunk=lambda chunk: self._pass_on(self._take, chunk),
            on_error=lambda error: self._pass_on(self._refuse, error),
        )

    async def open(self) -> None:
        """Connect, and stay connected until `close`."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._stream.connect)

    def ask(self, number: int, answered: Callable[[Answer], None], failed: Callable[[Exception], None]) -> None:
        """Send an observation."""
        try:
            seq = self._stream.send(self._observations[number % len(self._observations)])
        except PolicyClientError as error:
            failed(error)
        else:
            self._waiting[seq] = (answered, failed)

    async def close(self) -> None:
        """Disconnect."""
        self._loop = None
        await asyncio.to_thread(self._stream.close)

    def _pass_on(self, take: Callable[[Any], None], what: Any) -> None:
        """Bring something from the stream's thread into the event loop."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(take, what)

    def _take(self, chunk: ActionChunk) -> None:
        received_s = float(chunk.metadata.get("received_s", time.monotonic()))
        seq = int(chunk.metadata["seq"])
        stages_ms = _stages_ms(chunk.metadata)
        for number in [number for number in self._waiting if number <= seq]:
            answered, _ = self._waiting.pop(number)
            superseded = number < seq
            answered(Answer(received_s, len(chunk), {} if superseded else stages_ms, superseded))

    def _refuse(self, error: PolicyClientError) -> None:
        if isinstance(error, StreamRefusal) and error.seq in self._waiting:
            self._waiting.pop(error.seq)[1](error)


_STAGES = {"received_ms": "way there", "waited_ms": "waiting for a turn", "infer_ms": "inference"}


def _stages_ms(metadata: Mapping[str, Any]) -> dict[str, float]:
    timings = metadata.get("timings")
    if not isinstance(timings, Mapping):
        return {}
    return {stage: float(timings[key]) for key, stage in _STAGES.items() if key in timings}
