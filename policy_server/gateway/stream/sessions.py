"""The robots' sessions of one server, with the tokens by which they are found again."""

import asyncio
import secrets
from dataclasses import dataclass, field

from policy_server.catalog import ServedPolicy
from policy_server.errors import TooManySessions
from policy_server.gateway.stream.messages import Hello
from policy_server.gateway.stream.outbox import Close, Outbox
from policy_server.gateway.stream.robot import RobotSession, read_wishes
from policy_server.gateway.traffic import Traffic

_REPLACED = Close(4001, "another connection has the session now")


@dataclass(eq=False)
class Kept:
    """A session, and how to come back to it.

    Attributes:
        robot: The session.
        policy: Of which it is.
        name: What logs call it.
        token: The secret.
        expiry: What will end it; None while it has a connection.
    """

    robot: RobotSession
    policy: ServedPolicy
    name: str
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    expiry: asyncio.TimerHandle | None = None


class StreamSessions:
    """Sessions by token."""

    def __init__(self, traffic: Traffic, *, grace_s: float, capacity: int) -> None:
        """Args: grace_s is how long a session waits for its robot; capacity is how many there may be."""
        self.grace_s = grace_s
        self._traffic = traffic
        self._capacity = capacity
        self._kept: dict[str, Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, policy: ServedPolicy, hello: Hello, tenant: str, outbox: Outbox) -> tuple[Kept, bool]:
        """Return the session that a connection has from now on, and whether it is one that there was.

        Raises:
            TooManySessions: There is no room for another.
            RateTooHigh: The declared rate cannot be held.
            InvalidOption: The policy cannot do what is asked.
        """
        wishes = read_wishes(hello, policy.runtime.version.spec)
        kept = self._kept.get(hello.resume or "")
        resumed = kept is not None and kept.policy is policy
        if kept is None or not resumed:
            name = hello.name or secrets.token_hex(4)
            kept = Kept(RobotSession(policy.runtime, tenant, self._traffic), policy, name)
        # Whatever can refuse the hello comes before the session changes.
        if wishes.rate_hz is None:
            policy.runtime.admission.release(kept.robot)
        else:
            policy.runtime.admission.promise(kept.robot, wishes.rate_hz)
        if not resumed and len(self._kept) >= self._capacity:
            self._make_room()
        kept.robot.greet(wishes)
        if kept.robot.outbox is not None:
            kept.robot.outbox.close(_REPLACED)
        kept.robot.outbox = outbox
        if kept.expiry is not None:
            kept.expiry.cancel()
            kept.expiry = None
        self._kept[kept.token] = kept
        return kept, resumed

    def leave(self, kept: Kept, outbox: Outbox) -> None:
        """Note that a connection broke: the session waits for its robot, unless the robot has another connection."""
        if kept.robot.outbox is outbox:
            kept.robot.outbox = None
            kept.expiry = asyncio.get_running_loop().call_later(self.grace_s, self.end, kept)

    def _make_room(self) -> None:
        """End the session that has waited longest for its robot; raises TooManySessions if all robots are there."""
        waiting = [(kept.expiry.when(), kept) for kept in self._kept.values() if kept.expiry is not None]
        if not waiting:
            raise TooManySessions(self._capacity)
        _, oldest = min(waiting, key=lambda each: each[0])
        self.end(oldest)

    def end(self, kept: Kept) -> None:
        """End a session."""
        if kept.expiry is not None:
            kept.expiry.cancel()
        kept.robot.outbox = None
        kept.robot.close()
        kept.policy.runtime.admission.release(kept.robot)
        self._kept.pop(kept.token, None)
