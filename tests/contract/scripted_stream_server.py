"""A server of the streaming protocol whose every answer is written by the test."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager, suppress

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from policy_client import pack, unpack

WAIT_S = 10.0


class StreamServer:
    """Speaks docs/stream.md.

    `answer(message)` returns the messages that answer one of the robot's, None to hang up;
    `greet(hello)` returns keys of the welcome, or a whole message in its place.
    """

    def __init__(self, answer, greet):
        self.answer, self.greet = answer, greet
        self.url = ""
        self.hellos = []
        self.heard = queue.Queue()
        self.connections = []
        self.sessions = {}  # token: highest seq
        self.close_code = 1000

    def serve(self, connection):
        self.connections.append(connection)
        with suppress(ConnectionClosed):
            self._converse(connection)

    def _converse(self, connection):
        hello = unpack(connection.recv())
        self.hellos.append(hello)
        greeting = self.greet(hello)
        if greeting.get("type") == "error":
            connection.send(pack(greeting))
            connection.close(1008)
            return
        resumed = hello.get("resume") in self.sessions
        token = hello["resume"] if resumed else f"token-{len(self.hellos)}"
        self.sessions.setdefault(token, 0)
        welcome = {"type": "welcome", "protocol": 1, "resume": token, "resumed": resumed, "seq": self.sessions[token]}
        connection.send(pack({**welcome, "episode": 0, **greeting}))
        while True:
            message = unpack(connection.recv())
            if message["type"] == "observation":
                self.sessions[token] = message["seq"]
            self.heard.put(message)
            answers = self.answer(message)
            if answers is None:
                connection.close(self.close_code)
                return
            for answer in answers:
                connection.send(answer if isinstance(answer, bytes) else pack(answer))
            if message["type"] == "bye":
                connection.close()

    def say(self, message):
        """Send a message to the robot that connected last."""
        self.connections[-1].send(pack(message))

    def hear(self, kind="observation"):
        """Wait for the robot's next message of a kind, passing over others."""
        while True:
            message = self.heard.get(timeout=WAIT_S)
            if message["type"] == kind:
                return message


@contextmanager
def streaming(answer=None, greet=lambda _hello: {}, **options):
    server = StreamServer(answer or answered, greet)
    with serve(server.serve, "127.0.0.1", 0, compression=None, ping_interval=None, **options) as listening:
        server.url = f"ws://127.0.0.1:{listening.socket.getsockname()[1]}/v1/policies/hold/stream"
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            for connection in server.connections:
                connection.close_socket()
            thread.join()


def chunk(message, **changes):
    return {
        "type": "chunk",
        "seq": message["seq"],
        "episode": message["episode"],
        "captured_ns": message["captured_ns"],
        "actions": np.full((4, 2), message["seq"], np.float32),
        "step_s": 0.05,
        "seed": 7,
        "timings": {"total_ms": 2.4},
        **changes,
    }


def answered(message):
    return [chunk(message)] if message["type"] == "observation" else []


def silent(_message):
    return []
