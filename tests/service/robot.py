"""A robot as these tests send it: good observations, raw connections, and what a refusal looks like at each door."""

import base64
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from policy_client.codec import pack, unpack
from tests.conftest import RunningServer

PATIENCE_S = 30.0
STATE = np.array([0.5, -0.25, 0.1, 0.0], np.float32)
TINY = {"state": STATE, "goal": np.array([1.0, -1.0, 0.0, 0.0], np.float32)}
TOP = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
WRIST = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
CAMERA = {"top": TOP, "wrist": WRIST, "state": np.array([0.5, -0.25], np.float32)}
# Half a second a chunk on `slow_bundle`, some 20 ms on the tiny ones.
SLOWLY = {"steps": 200, "sampler": "heun", "guidance": 1.5}


class Robot:
    """One connection in openpi's protocol, with nothing between the test and the frames."""

    def __init__(self, server: RunningServer, path: str = "/", headers: Mapping[str, str] | None = None) -> None:
        # Entered by hand: a robot outlives this call, and websockets wants its connections entered.
        self.socket: ClientConnection = connect(
            f"{server.websocket_url}{path}", compression=None, max_size=None, additional_headers=headers
        ).__enter__()
        self.greeting = self.socket.recv(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, observation: Mapping[str, Any], **extras: Any) -> None:
        """Send an observation, and do not wait for its answer."""
        self.socket.send(pack({**observation, **extras}))

    def begin(self, observation: Mapping[str, Any], **extras: Any) -> None:
        """Send an observation, and return once the server works on it.

        The server reads nothing more from a connection until the last message was taken up, so it answers the second
        ping after that; the first one may have been read together with the message.
        """
        self.send(observation, **extras)
        for _ in range(2):
            assert self.socket.ping().wait(PATIENCE_S)

    def receive(self) -> dict[str, Any]:
        """Return the next reply, which must be a chunk."""
        frame = self.socket.recv(PATIENCE_S)
        assert isinstance(frame, bytes), frame
        return unpack(frame)

    def ask(self, observation: Mapping[str, Any], **extras: Any) -> dict[str, Any]:
        """Send an observation and return the reply."""
        self.send(observation, **extras)
        return self.receive()

    def actions(self, observation: Mapping[str, Any], seed: int, **extras: Any) -> np.ndarray:
        """Return the chunk for an observation and a seed."""
        return self.ask(observation, options={"seed": seed}, **extras)["actions"]

    def refusal(self) -> "Refusal":
        """Return how the server refuses the last frame: in text, and then it hangs up."""
        frame = self.socket.recv(PATIENCE_S)
        assert isinstance(frame, str), "an error is a text frame"
        with pytest.raises(ConnectionClosed) as closed:
            self.socket.recv(PATIENCE_S)
        assert closed.value.rcvd is not None
        code, _, message = frame.partition(": ")
        assert closed.value.rcvd.reason == code
        return Refusal(closed.value.rcvd.code, code, message)


@dataclass(frozen=True)
class Refusal:
    """What a client is told: an HTTP status or a websocket close code, a code for programs, a message for people."""

    status: int
    code: str
    message: str

    def __post_init__(self) -> None:
        assert re.fullmatch("[a-z_]+", self.code)
        assert 0 < len(self.message) < 1100
        for leak in ("Traceback", ".py", "site-packages", "/work", "/tmp", "object at 0x"):
            assert leak not in self.message


def refusal_of(response: httpx.Response) -> Refusal:
    """Return the refusal that an HTTP response holds, which must hold nothing else."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"code", "message"}
    return Refusal(response.status_code, **body["error"])


def refused_upgrade(server: RunningServer, path: str, headers: Mapping[str, str] | None = None) -> Refusal:
    """Return how the server refuses to speak openpi's protocol at all."""
    with pytest.raises(InvalidStatus) as refused:
        Robot(server, path, headers)
    response = refused.value.response
    headers, body = dict(response.headers), bytes(response.body or b"")
    return refusal_of(httpx.Response(response.status_code, headers=headers, content=body))


def refused_start(*arguments: object, env: Mapping[str, str] | None = None) -> str:
    """Return the one line with which a server refuses to start, and exits with status 2."""
    command = [sys.executable, "-m", "policy_server", "serve", "--port", "0", "--threads", "1", *map(str, arguments)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\d .* INFO ", line)]
    assert (ended.returncode, len(lines), ended.stdout) == (2, 1, ""), ended.stderr
    prefix, _, reason = lines[0].partition(": ")
    assert prefix == "policy-server"
    return reason


def in_json(value: Any) -> Any:
    """Return a value as JSON can hold it: arrays in json-numpy's form, bytes in base64."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"__numpy__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {key: in_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [in_json(item) for item in value]
    return value
