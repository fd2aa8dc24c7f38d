"""The threads and the socket of a stream."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from policy_client.backoff import Backoff, Deadline
from policy_client.chunk import ActionChunk
from policy_client.connecting import ATTEMPT_FAILURES, Attempts, awaiting, break_off, check_url, closes_for_good
from policy_client.errors import ConnectFailed, ConnectionLost, PolicyClientError, ProtocolError, StreamRefusal
from policy_client.outbox import Outbox, Waiting
from policy_client.protocol import Frame
from policy_client.stream_protocol import Reasoning, StreamProtocol
from policy_client.stream_state import Refusals, StreamState, error_code

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StreamLink:
    """Keeps a session connected, sends what waits in its outbox, and takes in what comes.

    One thread connects and sends, so that nothing else ever waits for the network; another reads.
    """

    def __init__(
        self,
        url: str,
        protocol: StreamProtocol,
        *,
        connect_options: dict[str, Any],
        connect_timeout_s: float,
        silence_timeout_s: float,
        close_timeout_s: float,
        backoff: Backoff,
        on_chunk: Callable[[ActionChunk], None] | None,
        on_reasoning: Callable[[Reasoning], None] | None,
        on_error: Callable[[PolicyClientError], None] | None,
    ) -> None:
        check_url(url)
        self.url = url
        self.connect_timeout_s = connect_timeout_s
        self.silence_timeout_s = silence_timeout_s
        self.close_timeout_s = close_timeout_s
        self.backoff = backoff
        self._connect_options = {**connect_options, "create_connection": self._make}
        self._on_chunk, self._on_reasoning, self._on_error = on_chunk, on_reasoning, on_error
        self._changed = threading.Condition()  # guards all that follows
        self._protocol = protocol
        self._outbox = Outbox()
        self._state = StreamState.CLOSED
        self._closing = False
        self._thread: threading.Thread | None = None
        self._connection: ClientConnection | None = None
        self._lost: ConnectionLost | None = None  # what ended the present connection
        self._ended_by: PolicyClientError | None = None  # what ended the stream
        self._last_error: PolicyClientError | None = None
        self._refusals = Refusals()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def connect(self) -> None:
        """Connect now, unless connected. Opens a closed stream again, with a new session.

        Raises:
            ConnectFailed: The server refused, or the time allowed is spent.
            StreamRefusal: The server refused the hello: `rate_too_high`, `unsupported_protocol`.
            ConnectionLost: Another thread closed the stream meanwhile.
        """
        with self._changed:
            if self._state is StreamState.CLOSED:
                self._state, self._closing, self._ended_by = StreamState.CONNECTING, False, None
                self._thread = threading.Thread(target=self._run, name="policy-stream", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._state is not StreamState.CONNECTING)
            self._check_open()

    def close(self) -> None:
        """End the session. A connection that is only just being made may outlive this, by its timeout at most."""
        with self._changed:
            self._closing = True
            thread, connection = self._thread, self._connection
            friendly = self._state is StreamState.OPEN
            self._changed.notify_all()
        if thread is not None:
            if friendly:  # the farewell, and the closing handshake
                thread.join(2 * self.close_timeout_s)
            if connection is not None:
                break_off(connection)
            thread.join(self.close_timeout_s)
        with self._changed:
            self._state, self._thread, self._outbox = StreamState.CLOSED, None, Outbox()
            self._protocol.forget_session()
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._state is StreamState.CLOSED or self._closing:
            raise self._ended_by or ConnectionLost("this stream is closed")

    def _over(self) -> bool:
        """Return whether the calling thread is no longer the one that keeps the session connected."""
        return self._closing or self._thread is not threading.current_thread()

    def _run(self) -> None:
        attempts = Attempts(self.url, self.connect_timeout_s, self.backoff)
        ended_by: PolicyClientError | None = None
        try:
            while True:
                try:
                    connection = self._open(attempts.deadline)
                except ATTEMPT_FAILURES as error:
                    failure: Exception = error
                else:
                    opened_at_s = time.monotonic()
                    failure = self._converse(connection)
                    lasted_s = time.monotonic() - opened_at_s
                    # A server that greets and hangs up, again and again, is asked ever more seldom.
                    if lasted_s > self.backoff.longest_s or attempts.deadline.budget_s < math.inf:
                        attempts = Attempts(self.url, math.inf, self.backoff)
                if self._over():
                    return
                self._note(_named(failure))
                self._pause(attempts.pause_after_s(failure))
        except PolicyClientError as error:  # a refusal for good
            ended_by = error
            self._note(error)
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._state, self._ended_by = StreamState.CLOSED, ended_by
                    self._changed.notify_all()

    def _pause(self, pause_s: float) -> None:
        with self._changed:
            self._changed.wait_for(self._over, pause_s)

    def _open(self, allowed: Deadline) -> ClientConnection:
        deadline = Deadline(min(self.connect_timeout_s, allowed.remaining_s()))
        # Entered by hand since it outlives this call; websockets 17.1 deprecates connections that nobody enters.
        opening = connect(self.url, open_timeout=deadline.remaining_s(), **self._connect_options)
        connection: ClientConnection = opening.__enter__()
        try:
            with self._changed:
                hello = self._protocol.hello()
            with awaiting("welcome", deadline):
                connection.send(hello)
                welcome = connection.recv(timeout=deadline.remaining_s())
            self._greet(connection, welcome)
        except BaseException:
            break_off(connection)
            raise
        return connection

    def _make(self, *arguments: Any, **options: Any) -> ClientConnection:
        """Make the connection, before its handshake, so that `close` can end that too."""
        connection = ClientConnection(*arguments, **options)
        with self._changed:
            over = self._over()
            if not over:
                self._connection = connection
        if over:
            break_off(connection)
        return connection

    def _greet(self, connection: ClientConnection, welcome: Frame) -> None:
        try:
            with self._changed:
                self._lost = None
                again = self._protocol.greet(welcome)
                self._outbox.discard("pong")  # it answers another connection's ping
                if again is not None:
                    self._outbox.put_first("set", again)
        except StreamRefusal as refusal:
            if refusal.code in _FINAL or closes_for_good(connection, self.close_timeout_s):
                raise
            raise ConnectionLost(str(refusal)) from refusal
        except ProtocolError as error:
            raise ConnectionLost(str(error)) from error

    def _converse(self, connection: ClientConnection) -> ConnectionLost:
        """Send and receive until the connection is lost or the stream is closed; return why it is over."""
        reader = threading.Thread(target=self._read, args=[connection], name="policy-stream-reader", daemon=True)
        with self._changed:
            if not self._over():
                self._counts["reconnects"] += self._state is StreamState.LOST
                self._state = StreamState.OPEN
                self._changed.notify_all()
        reader.start()
        try:
            while waiting := self._next():
                connection.send(waiting.frame)
                if waiting.kind == "observation":
                    with self._changed:
                        self._counts["sent"] += 1
            if self._lost is None:
                with self._changed:
                    bye = self._protocol.bye()
                connection.send(bye)
                connection.close()
        except (ConnectionClosed, OSError):
            pass  # the reader sees it too, and says why
        finally:
            break_off(connection)
            reader.join()
        with self._changed:
            if not self._over():
                self._state = StreamState.LOST
                self._changed.notify_all()
            assert self._lost is not None, "the reader has ended without a reason"
            return self._lost

    def _next(self) -> Waiting | None:
        """Return what to send, None once there is nobody to send it to, or for."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._lost or self._over())
            return None if self._lost or self._over() else self._outbox.pop()

    def _read(self, connection: ClientConnection) -> None:
        lost = ConnectionLost("the connection broke")
        try:
            while True:
                self._receive(connection.recv(timeout=self.silence_timeout_s), time.monotonic())
        except TimeoutError:
            lost = ConnectionLost(f"no sign of the server within {self.silence_timeout_s:g} s")
        except ConnectionClosed as error:
            lost = ConnectionLost(f"the connection broke: {error}")
            if error.rcvd is not None and error.rcvd.code == _TAKEN_OVER:
                # Whoever has the session now would lose it to us, and take it back, for ever.
                with self._changed:
                    self._protocol.forget_session()
        finally:
            with self._changed:
                self._lost = lost
                self._changed.notify_all()
            break_off(connection)  # wakes a thread that is stuck in sending

    def _receive(self, frame: Frame, now_s: float) -> None:
        try:
            with self._changed:
                received = self._protocol.receive(frame, now_s)
                if received.pong is not None:
                    self._outbox.put_first("pong", received.pong)
                if received.set_again is not None:
                    self._outbox.put_first("set", received.set_again)
                if received.refusal is not None:
                    self._refusals.add(received.refusal)
                self._counts["chunks"] += received.chunk is not None
                self._counts["ignored"] += received.ignored
                self._changed.notify_all()
        except ProtocolError as error:
            self._note(error)
            return
        if received.refusal is not None:
            self._note(received.refusal)
        if received.chunk is not None:
            _tell(self._on_chunk, received.chunk)
        if received.reasoning is not None:
            _tell(self._on_reasoning, received.reasoning)

    def _note(self, error: PolicyClientError) -> None:
        with self._changed:
            self._errors[error_code(error)] += 1
            self._last_error = error
        logger.info("%s: %s", self.url, error)
        _tell(self._on_error, error)


_FINAL = frozenset({"unsupported_protocol", "rate_too_high", "unauthorized", "forbidden", "unknown_policy"})
_TAKEN_OVER = 4001


def _named(failure: Exception) -> PolicyClientError:
    """Return what an attempt to connect failed with, or what ended a connection, by this package's names."""
    cause = failure.__cause__
    if isinstance(cause, StreamRefusal):
        return cause
    if isinstance(failure, PolicyClientError):
        return failure
    return ConnectFailed(f"cannot connect: {type(failure).__name__}: {failure}")


def _tell(listener: Callable[[T], None] | None, news: T) -> None:
    if listener is None:
        return
    try:
        listener(news)
    except Exception:
        logger.exception("a listener of the stream failed")
