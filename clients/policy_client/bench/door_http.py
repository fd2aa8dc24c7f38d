"""The HTTP door, in msgpack, over one connection that is kept alive."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from policy_client.bench.doors import Answer, Observations, Target
from policy_client.codec import DecodeError, pack, unpack
from policy_client.errors import ConnectFailed, ConnectionLost, PolicyClientError, ProtocolError, ServerError
from policy_client.protocol import read_actions

_MSGPACK = "application/msgpack"


class HttpDoor:
    """Sends each observation as a request, in a thread of its own.

    HTTP/1.1 takes one request after another, so one that finds the connection busy waits here, and its latency
    counts that, as it does for a robot.
    """

    def __init__(self, url: str, target: Target, observations: Observations) -> None:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(parts.netloc, timeout=target.connect_timeout_s)
        self._path = parts.path
        self._session = f"policy-bench-{uuid.uuid4().hex}"
        self._headers = {"Content-Type": _MSGPACK, "Accept": _MSGPACK}
        if target.api_key:
            self._headers["Authorization"] = f"Api-Key {target.api_key}"
        self._bodies = [pack({"observation": observation, "session": self._session}) for observation in observations]
        self._thread = ThreadPoolExecutor(1, "policy-bench-http")

    async def open(self) -> None:
        """Connect."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.connect)
        except OSError as error:
            raise ConnectFailed(
                f"cannot connect to {self._connection.host}:{self._connection.port}: {error}"
            ) from error

    def ask(self, number: int, answered: Callable[[Answer], None], failed: Callable[[Exception], None]) -> None:
        """Send an observation."""
        loop = asyncio.get_running_loop()

        def post() -> None:
            try:
                answer = self._post(self._bodies[number % len(self._bodies)])
            except PolicyClientError as error:
                _call_in(loop, failed, error)
            else:
                _call_in(loop, answered, answer)

        self._thread.submit(post)

    async def close(self) -> None:
        """End the session, and disconnect."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._end_session)

    def _end_session(self) -> None:
        self._thread.shutdown(wait=True)  # the request under way ends by its timeout
        with suppress(OSError, HTTPException):
            sessions = self._path.removesuffix("/act") + f"/sessions/{self._session}"
            self._connection.request("DELETE", sessions, headers=self._headers)
            self._connection.getresponse().read()
        self._connection.close()

    def _post(self, body: bytes) -> Answer:
        try:
            self._connection.request("POST", self._path, body, self._headers)
            response = self._connection.getresponse()
            payload = response.read()
        except (OSError, HTTPException) as error:
            self._connection.close()  # the next request connects anew
            raise ConnectionLost(f"the connection broke before the reply came: {error!r}") from error
        received_s = time.monotonic()
        if response.status != 200:
            raise ServerError(_refusal(response.status, payload))
        try:
            reply = unpack(payload)
        except DecodeError as error:
            raise ProtocolError(f"the reply cannot be read: {error}") from error
        if not isinstance(reply, Mapping):
            raise ProtocolError(f"the reply is a {type(reply).__name__}, expected a map")
        infer_ms = reply.get("infer_ms")
        stages_ms = {"inference": float(infer_ms)} if isinstance(infer_ms, int | float) else {}
        return Answer(received_s, len(read_actions(reply.get("actions"))), stages_ms)


def _refusal(status: int, payload: bytes) -> str:
    """Return a refusal as the websockets would say it, `code: message`."""
    try:
        error: Any = json.loads(payload)["error"]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"http_{status}: {payload[:200].decode(errors='replace')}"


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], argument: Any) -> None:
    with suppress(RuntimeError):  # the test is over, and its loop closed
        loop.call_soon_threadsafe(call, argument)
