"""What both clients are before they touch a socket: where the server is, how long to wait, what to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, TypeVar

from policy_client.backoff import Backoff
from policy_client.connecting import check_url, connect_options
from policy_client.protocol import PolicyProtocol

ConnectionT = TypeVar("ConnectionT")


@dataclass(eq=False)
class BaseClient(Generic[ConnectionT]):
    """The settings and the state that the blocking client and the asyncio client share.

    Args:
        url: Address of the server, `ws://host:port` or `wss://host`.
        api_key: Sent as `Authorization: Api-Key <key>`.
        connect_timeout_s: Time for connecting, all attempts and the server's metadata included.
        request_timeout_s: Time for one request to be sent and answered, once connected.
        step_s: Time between actions, in place of what the server says; a stock openpi server does not say.
        backoff: Pauses between attempts to connect.

    Raises:
        ValueError: A url or `step_s` that cannot be right.
    """

    url: str
    _: KW_ONLY
    api_key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 10.0
    request_timeout_s: float = 5.0
    step_s: float | None = None
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        check_url(self.url)
        self._protocol = PolicyProtocol(self.step_s)
        self._connection: ConnectionT | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the server said of itself when the connection was made; empty before."""
        return self._protocol.metadata

    def _connect_options(self) -> dict[str, Any]:
        """Return the keyword arguments that `connect` of `websockets` takes in both its forms."""
        return {
            **connect_options(self.api_key),
            # A stock openpi server answers no pings while it infers: who waits for the reply waits for the
            # pong.
            "ping_timeout": max(20.0, self.request_timeout_s),
        }
