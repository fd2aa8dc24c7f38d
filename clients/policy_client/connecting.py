"""Which failures to connect deserve another try, and what failures of the websocket are called here."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection

from policy_client.backoff import Backoff, Deadline
from policy_client.errors import ConnectFailed, ConnectionLost, RequestTimeout

# What an attempt to connect may raise and `Attempts` can judge. TimeoutError is an OSError.
ATTEMPT_FAILURES = (OSError, WebSocketException, RequestTimeout, ConnectionLost)


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is a websocket's."""
    if not url.startswith(("ws://", "wss://")):
        raise ValueError(f"url is {url!r}, expected one that starts with ws:// or wss://")


def connect_options(api_key: str | None) -> dict[str, Any]:
    """Return the keyword arguments that `connect` of `websockets` takes in both its forms."""
    return {
        "compression": None,  # camera images do not deflate
        "max_size": None,
        "additional_headers": {"Authorization": f"Api-Key {api_key}"} if api_key else None,
        "close_timeout": 1.0,
    }


def break_off(connection: ClientConnection) -> None:
    """End a connection at once: a server that hangs would not answer a closing handshake."""
    with suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is stuck in sending
    connection.close_socket()


class Attempts:
    """The attempts to connect that share one budget of time, which runs from now."""

    def __init__(self, url: str, budget_s: float, backoff: Backoff) -> None:
        self.deadline = Deadline(budget_s)
        self._url = url
        self._pauses_s = backoff.pauses_s()
        self._made = 0

    def pause_after_s(self, error: Exception) -> float:
        """Return how long to wait before the next attempt.

        Raises:
            ConnectFailed: There shall be no other attempt: the server refused, or the time is spent.
        """
        self._made += 1
        if not _may_pass(error):
            status = error.response.status_code if isinstance(error, InvalidStatus) else None
            raise ConnectFailed(f"cannot connect to {self._url}: {_describe(error)}", status=status) from error
        pause_s = next(self._pauses_s)
        if pause_s >= self.deadline.remaining_s():
            within = f"within {self.deadline.budget_s:g} s and {self._made} attempts"
            raise ConnectFailed(
                f"no policy server at {self._url} {within}; the last failure: {_describe(error)}"
            ) from error
        return pause_s


@contextmanager
def awaiting(what: str, deadline: Deadline) -> Iterator[None]:
    """Call the failures of a wait by this package's names.

    Raises:
        RequestTimeout: The deadline passed.
        ConnectionLost: The connection broke.
    """
    try:
        yield
    except TimeoutError as error:
        raise RequestTimeout(f"no {what} within {deadline.budget_s:g} s") from error
    except ConnectionClosed as error:
        if deadline.remaining_s() == 0:  # the blocking client breaks the connection to end a send that stalls
            raise RequestTimeout(f"no {what} within {deadline.budget_s:g} s") from error
        raise ConnectionLost(f"the connection broke before the {what} came: {error}") from error


def closes_for_good(connection: ClientConnection, timeout_s: float) -> bool:
    """Wait until a server that has refused something hangs up; return whether it does so for good."""
    try:
        connection.recv(timeout=timeout_s)
    except TimeoutError:
        return False
    except ConnectionClosed as error:
        return error.rcvd is not None and error.rcvd.code == CloseCode.POLICY_VIOLATION
    return False


# Statuses of a server, or of a proxy before it, that is starting, overloaded or being replaced.
_PASSING_STATUS = frozenset({429, 500, 502, 503, 504})


def _may_pass(error: Exception) -> bool:
    cause = error.__cause__
    if isinstance(error, InvalidStatus):
        return error.response.status_code in _PASSING_STATUS
    if isinstance(error, InvalidMessage):  # cut off in the handshake; otherwise it is no web server at all
        return isinstance(cause, EOFError)
    if isinstance(cause, ConnectionClosed) and cause.rcvd is not None:
        return cause.rcvd.code != CloseCode.POLICY_VIOLATION
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, OSError | RequestTimeout | ConnectionLost)


def _describe(error: Exception) -> str:
    if isinstance(error, InvalidStatus):
        body = (error.response.body or b"").decode(errors="replace").strip()
        return f"HTTP {error.response.status_code}: {body:.500}"
    return f"{type(error).__name__}: {error}"
