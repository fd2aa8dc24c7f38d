"""A server of the streaming protocol that a test leads by the hand, one message after the other."""

import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from policy_client.codec import pack, unpack

PATIENCE_S = 20.0
ROWS = np.array([[1 / 3, -2.5e-8], [3.4e38, -0.0], [0.1, 7]], np.float32)


class ScriptedServer:
    """Speaks docs/stream.md in the words of the test, which takes each connection in its own thread."""

    def __init__(self, server: Server) -> None:
        self.port: int = server.socket.getsockname()[1]
        self.status = HTTPStatus.SWITCHING_PROTOCOLS
        self.connections: queue.Queue[ServerConnection] = queue.Queue()
        self.over = threading.Event()

    def accept(self, **welcome: Any) -> tuple["Door", dict[str, Any]]:
        """Return the next connection, greeted, and the hello that it began with."""
        door = Door(self.connections.get(timeout=PATIENCE_S))
        hello = door.receive("hello")
        door.send("welcome", **{**WELCOME, **welcome})
        return door, hello


WELCOME = {
    "protocol": 1,
    "session": "5f0c",
    "resume": "secret",
    "resumed": False,
    "seq": 0,
    "episode": 0,
    "grace_s": 30.0,
    "policy": "tiny",
    "max_message_bytes": 16 * 2**20,
    "spec": {"a later server": ["says", {"more": None}]},
}


class Door:
    """One connection, seen from the server."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection

    def send(self, type_: str, **fields: Any) -> None:
        self.connection.send(pack({"type": type_, **fields}))

    def receive(self, type_: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        message: dict[str, Any] = unpack(self.connection.recv(timeout_s))
        assert message.pop("type") == type_
        return message

    def answer(self, observation: Mapping[str, Any], actions: np.ndarray = ROWS, **fields: Any) -> None:
        echoed = {name: observation[name] for name in ("seq", "episode", "captured_ns")}
        self.send("chunk", **{**echoed, "actions": actions, "step_s": 0.05, "seed": 4711, **fields})

    def close_code(self) -> int | None:
        """Read on until the robot has closed, and return the code it gave."""
        with suppress(ConnectionClosed):
            while True:
                self.connection.recv(PATIENCE_S)
        return self.connection.close_code

    def cut(self) -> None:
        """End the connection as a broken network does."""
        self.connection.socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Serve until the context ends."""

    def handle(connection: ServerConnection) -> None:
        here.connections.put(connection)
        here.over.wait()

    def admit(connection: ServerConnection, _: Request) -> Response | None:
        if here.status is HTTPStatus.SWITCHING_PROTOCOLS:
            return None
        return connection.respond(here.status, '{"error": {"code": "unauthorized"}}')

    options: dict[str, Any] = {"compression": None, "max_size": None, "max_queue": 2, "close_timeout": 1}
    with serve(handle, "127.0.0.1", 0, process_request=admit, **options) as server:
        here = ScriptedServer(server)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield here
        here.over.set()
        server.shutdown()
        thread.join()
