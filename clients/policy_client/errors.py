"""What can go wrong between a robot and its policy server."""

from __future__ import annotations

import re


class PolicyClientError(Exception):
    """Base of every error this package raises about talking to a server."""


class ConnectFailed(PolicyClientError):
    """No connection: refused, or not made within the time allowed. The message says what failed last.

    Attributes:
        status: HTTP status of the server's refusal, None where there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class RequestTimeout(PolicyClientError):
    """No answer in time. The connection was dropped, lest a late answer be taken for the next one."""


class ConnectionLost(PolicyClientError):
    """The connection broke before the answer came. The next request makes a new one, and a new session."""


class ProtocolError(PolicyClientError):
    """The server sent something that is not an answer. The connection was dropped."""


class ServerError(PolicyClientError):
    """The server answered with an error: a text frame, after which it hangs up, as openpi's servers do.

    Attributes:
        code: Which error, such as "shape_mismatch"; None from a stock openpi server, which sends a traceback.
        message: What the server said, without the code.
    """

    def __init__(self, text: str) -> None:
        coded = _CODED.fullmatch(text)
        self.code: str | None = coded["code"] if coded else None
        self.message: str = coded["message"] if coded else text
        super().__init__(text)


class StreamRefusal(ServerError):
    """The server refused something that was said on a stream. The conversation goes on, unless it was the hello.

    Attributes:
        seq: The observation that it is about; None if it is about none.
    """

    def __init__(self, code: str, message: str, seq: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.seq = code, message, seq


class OutOfActions(PolicyClientError):
    """A player gave up: its actions had run out, and no chunk came for as long as it was told to wait."""


_CODED = re.compile(r"(?P<code>[a-z][a-z0-9_]*): (?P<message>.*)", re.DOTALL)
