"""How a robot of the load test asks: one class for each of the server's protocols.

A door never waits for an answer before it sends the next observation, since robots of an open-loop test do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from policy_client.bench.served import http_base, websocket_base

Observations: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """Which policy is asked, and where.

    Attributes:
        url: The server; http, https, ws or wss.
        policy: Name of the policy; None for a server that has one policy and answers at its root, as openpi's does.
        step_s: Time between two actions of a chunk.
        api_key: Sent as `Authorization: Api-Key <key>`.
        connect_timeout_s: Time for connecting.
    """

    url: str
    policy: str | None
    step_s: float
    api_key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 10.0


@dataclass(frozen=True)
class Answer:
    """What the load test keeps of a chunk.

    Attributes:
        received_s: When it came, by the monotonic clock.
        horizon: How many actions it holds, H.
        stages_ms: Where the server says that the time went; stages do not overlap.
        superseded: The chunk answers a newer observation of the same robot, which is as good or better.
    """

    received_s: float
    horizon: int
    stages_ms: Mapping[str, float]
    superseded: bool = False


class Door(Protocol):
    """One robot's way to the server. Used from one event loop."""

    async def open(self) -> None:
        """Connect; raises PolicyClientError where that cannot be done."""

    def ask(self, number: int, answered: Callable[[Answer], None], failed: Callable[[Exception], None]) -> None:
        """Send observation `number`, counted around; call one of the two, in the event loop, when its fate is known."""

    async def close(self) -> None:
        """Disconnect. What is not answered by now never will be."""


def make_door(kind: str, target: Target, observations: Observations) -> Door:
    """Return a door of a kind in `DOORS`, not opened yet."""
    return DOORS[kind](target, observations)


def door_url(kind: str, target: Target) -> str:
    """Return the address that a door asks; raises ValueError for a url that cannot be one."""
    below = f"/v1/policies/{target.policy}"
    if kind == "http":
        return f"{http_base(target.url)}{below}/act"
    if kind == "stream":
        return f"{websocket_base(target.url)}{below}/stream"
    return websocket_base(target.url) + ("/" if target.policy is None else f"{below}/openpi")


def _openpi(target: Target, observations: Observations) -> Door:
    from policy_client.bench.door_openpi import OpenpiDoor

    return OpenpiDoor(door_url("openpi", target), target, observations)


def _stream(target: Target, observations: Observations) -> Door:
    from policy_client.bench.door_stream import StreamDoor

    return StreamDoor(door_url("stream", target), target, observations)


def _http(target: Target, observations: Observations) -> Door:
    from policy_client.bench.door_http import HttpDoor

    return HttpDoor(door_url("http", target), target, observations)


DOORS: Mapping[str, Callable[[Target, Observations], Door]] = {"openpi": _openpi, "stream": _stream, "http": _http}
