"""A robot that speaks docs/stream.md with nothing between the test and the frames."""

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import httpx
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from policy_client.codec import pack, unpack
from tests.conftest import RunningServer
from tests.service.robot import PATIENCE_S, in_json

Message = dict[str, Any]


class StreamRobot:
    """One connection. Pings are answered while something is awaited.

    Attributes:
        seq: Number of the last observation.
        clock_ns: What its clock shows more than this machine's.
    """

    def __init__(
        self,
        server: RunningServer,
        policy: str = "tiny",
        *,
        seq: int = 0,
        clock_ns: int = 0,
        headers: Mapping[str, str] | None = None,
        greet: bool = True,
        **hello: Any,
    ) -> None:
        url = f"{server.websocket_url}/v1/policies/{policy}/stream"
        # Entered by hand: a robot outlives this call, and websockets wants its connections entered.
        self.socket: ClientConnection = connect(
            url, compression=None, max_size=None, additional_headers=headers
        ).__enter__()
        self.seq, self.clock_ns = seq, clock_ns
        self.pings = 0
        if greet:
            self.send("hello", **{"protocol": 1, **hello})

    def __enter__(self) -> Self:
        self.welcome = self.receive("welcome")
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def now_ns(self) -> int:
        """What its clock shows."""
        return time.monotonic_ns() + self.clock_ns

    def send(self, type_: str, **fields: Any) -> None:
        """Say something."""
        self.socket.send(pack({"type": type_, **fields}))

    def observe(self, observation: Mapping[str, Any], *, seq: int | None = None, **fields: Any) -> int:
        """Send an observation, and return its number."""
        seq = self.seq + 1 if seq is None else seq
        self.seq = max(self.seq, seq)
        self.send("observation", **{"seq": seq, "captured_ns": self.now_ns(), "observation": observation, **fields})
        return seq

    def receive(self, type_: str) -> Message:
        """Return the next message that is no ping; it must be of this type."""
        while True:
            frame = self.socket.recv(PATIENCE_S)
            assert isinstance(frame, bytes), frame
            message: Message = unpack(frame)
            kind = message.pop("type")
            if kind == "ping":
                self.pings += 1
                with suppress(ConnectionClosed):  # what was said before that is still to be read
                    self.send("pong", sent_ns=message["sent_ns"], robot_ns=self.now_ns())
            else:
                assert kind == type_, f"got {kind} {message}, expected {type_}"
                return message

    def ask(self, observation: Mapping[str, Any], **fields: Any) -> Message:
        """Send an observation, and return the chunk that answers it."""
        seq = self.observe(observation, **fields)
        chunk = self.receive("chunk")
        assert chunk["seq"] == seq
        return chunk

    def actions(self, observation: Mapping[str, Any], seed: int, **fields: Any) -> np.ndarray:
        """Return the actions for an observation and a seed."""
        actions: np.ndarray = self.ask(observation, options={"seed": seed}, **fields)["actions"]
        return actions

    def refusal(self, observation: Mapping[str, Any], **fields: Any) -> str:
        """Send an observation that is refused, and return the error's code."""
        seq = self.observe(observation, **fields)
        error = self.receive("error")
        assert error["seq"] == seq
        return str(error["code"])

    def exchange_clocks(self) -> None:
        """Answer the ping that comes after the welcome, and see to it that the server has read the answer."""
        self.send("reset", episode=-1)  # what is refused without a consequence is answered at once, and in order
        self.receive("error")
        assert self.pings
        self.send("reset", episode=-1)
        self.receive("error")

    def close_code(self) -> int:
        """Read on until the server hangs up, and return the code that it gives."""
        with suppress(ConnectionClosed):
            while True:
                self.socket.recv(PATIENCE_S)
        code = self.socket.close_code
        assert code is not None
        return code

    def break_off(self) -> None:
        """End the connection as a broken network does."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)


def recomputed(http: httpx.Client, observation: Mapping[str, Any], chunk: Mapping[str, Any]) -> np.ndarray:
    """Return what the HTTP door says to an observation and the seed of the chunk that answered it."""
    options = {"seed": chunk["seed"], "continuity": "replace"}
    body = {"observation": in_json(observation), "options": options}
    response = http.post(f"/v1/policies/{chunk['policy']}/act", json=body)
    return np.float32(response.json()["actions"])
