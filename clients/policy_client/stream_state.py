"""What can be seen of a stream from outside."""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from policy_client.errors import PolicyClientError, StreamRefusal


class StreamState(enum.Enum):
    """What can be expected of a stream."""

    CONNECTING = "connecting"  # for the first time
    OPEN = "open"
    LOST = "lost"  # the connection broke, and is being made again
    CLOSED = "closed"  # not opened yet, closed, or refused for good


@dataclass(frozen=True)
class StreamStats:
    """What happened on a stream since it was made."""

    sent: int = 0  # observations
    superseded: int = 0  # observations that a newer one replaced before they were sent
    chunks: int = 0
    ignored: int = 0  # chunks that came twice, late or for an earlier episode
    reconnects: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)  # by `error_code`


def error_code(error: PolicyClientError) -> str:
    """Return the server's code for what it refused; for all else the error's own name, `connection_lost` and so on."""
    code = error.code if isinstance(error, StreamRefusal) else None
    return code or re.sub(r"(?<=.)([A-Z])", r"_\1", type(error).__name__).lower()


class Refusals:
    """The newest refusals of observations."""

    def __init__(self, most: int = 64) -> None:
        self._newest: deque[StreamRefusal] = deque(maxlen=most)

    def add(self, refusal: StreamRefusal) -> None:
        """Remember a refusal, and forget the oldest if there are too many."""
        self._newest.append(refusal)

    def of(self, seq: int) -> StreamRefusal | None:
        """Return the refusal of observation `seq`, None if there is none."""
        return next((refusal for refusal in self._newest if refusal.seq == seq), None)
