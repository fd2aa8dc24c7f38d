"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar, Unpack

from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from policy_client.backoff import Deadline
from policy_client.base import BaseClient
from policy_client.chunk import ActionChunk
from policy_client.connecting import ATTEMPT_FAILURES, Attempts, awaiting, break_off
from policy_client.errors import ConnectionLost
from policy_client.protocol import Frame, InferOptions

T = TypeVar("T")


class PolicyClient(BaseClient[ClientConnection]):
    """Asks a policy server for action chunks, and waits for them. `BaseClient` tells the arguments.

    The connection is made by `connect`, by entering the client as a context, or by the first request. A request that
    fails, for whatever reason, ends it, and the next request makes another. A connection is a session at the server:
    a new one begins with no memory of earlier observations.

    Threads may share a client: their requests take turns, and `close` ends the one in progress.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._turn = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect now, unless connected. Opens a closed client again.

        Raises:
            ConnectFailed: The server refused, or the time allowed is spent.
            ServerError, ProtocolError: The server sent an error, or nonsense, in place of its metadata.
        """
        self._closed.clear()
        with self._turn:
            self._ready()

    def close(self) -> None:
        """End the session. A request in progress in another thread fails with `ConnectionLost`."""
        self._closed.set()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def infer(self, observation: Mapping[str, Any], **options: Unpack[InferOptions]) -> ActionChunk:
        """Return the actions that follow an observation of this moment.

        Args:
            observation: Arrays, strings and numbers by name, flat or nested, as the policy wants them.
            **options: `steps`, `guidance`, `seed`, `sampler`, `budget_ms`, `continuity`, `captured_ms`, `delay_ms`,
                `smoothing`; see `InferOptions`.

        Raises:
            ServerError: The server refused the request; its code says why.
            RequestTimeout: No answer in time.
            ConnectionLost: The connection broke, or the client is closed.
            ConnectFailed: There was no connection, and none could be made.
            ProtocolError: The answer is no chunk.
            TypeError, ValueError, OverflowError: The observation or an option cannot be sent.
        """
        made_at_s = time.monotonic()
        request = self._protocol.infer_request(observation, options)
        return self._ask(request, lambda reply: self._protocol.infer_reply(reply, made_at_s))

    def reset(self) -> None:
        """Tell the server that the episode ended, so that it forgets the observations of this session.

        Raises:
            ServerError: The server knows no reset (a stock openpi server), or refused.
            RequestTimeout, ConnectionLost, ConnectFailed, ProtocolError: As `infer`.
        """
        self._ask(self._protocol.reset_request(), self._protocol.reset_reply)

    def _ask(self, request: bytes, read_reply: Callable[[Frame], T]) -> T:
        with self._turn:
            connection = self._ready()
            try:
                deadline = Deadline(self.request_timeout_s)
                with awaiting("reply", deadline):
                    self._send(connection, request, deadline)
                    reply = connection.recv(timeout=deadline.remaining_s())
                return read_reply(reply)
            except BaseException:  # its reply may still come, and would be taken for the next one's
                self._drop(connection)
                raise

    def _send(self, connection: ClientConnection, request: bytes, deadline: Deadline) -> None:
        # Sending has no time limit in websockets, and one on its socket would break idle connections before
        # 17.1.
        watchdog = threading.Timer(deadline.remaining_s(), self._drop, [connection])
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.send(request)
        finally:
            watchdog.cancel()

    def _ready(self) -> ClientConnection:
        connection = self._connection
        if connection is not None and connection.state is State.OPEN:
            return connection
        attempts = Attempts(self.url, self.connect_timeout_s, self.backoff)
        while not self._closed.is_set():
            try:
                return self._open(attempts.deadline)
            except ATTEMPT_FAILURES as error:
                self._closed.wait(attempts.pause_after_s(error))
        raise ConnectionLost("this client is closed")

    def _open(self, deadline: Deadline) -> ClientConnection:
        # Entered by hand since it outlives this call; websockets 17.1 deprecates connections that nobody
        # enters.
        opening = connect(self.url, open_timeout=deadline.remaining_s(), **self._connect_options())
        connection: ClientConnection = opening.__enter__()
        try:
            with awaiting("metadata", deadline):
                self._protocol.greet(connection.recv(timeout=deadline.remaining_s()))
            self._connection = connection
            if self._closed.is_set():  # meanwhile, by a thread that found no connection to close
                raise ConnectionLost("this client is closed")
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def _drop(self, connection: ClientConnection) -> None:
        self._connection = None
        break_off(connection)
