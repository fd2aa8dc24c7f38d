"""What a bad network does to messages, drawn from a seed: no socket and no clock in it."""

import random
from collections import deque
from dataclasses import dataclass
from typing import Literal

CutKind = Literal["abort", "torn", "hang"]

# How long a message that should be overtaken waits for one that overtakes it.
OVERTAKEN_S = 0.05


@dataclass(frozen=True)
class Faults:
    """What may happen to the messages of one direction.

    Attributes:
        delay_ms: Shortest and longest delay of a message. Alone it never changes the order.
        drop: Probability that a message is lost.
        duplicate: Probability that it arrives twice.
        reorder: Probability that the next message overtakes it.
        bytes_per_s: How much gets through; None is all.
        cut_every_s: Mean time until the connection is cut, exponentially distributed; None is never.
        torn: Share of the cuts that come in the middle of a frame.
        hang: Share of the cuts that close nothing: from then on this direction forwards nothing and answers no ping.
        hang_s: How long a hung connection is kept before both ends of it are closed abruptly.
        spare_first: Whether the first message of a connection is delayed at most; with many protocols there is nothing
            to test once it is lost.
        seed: The same seed, the same faults.
    """

    delay_ms: tuple[float, float] = (0.0, 0.0)
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    bytes_per_s: float | None = None
    cut_every_s: float | None = None
    torn: float = 0.5
    hang: float = 0.0
    hang_s: float = 30.0
    spare_first: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop", "duplicate", "reorder", "torn", "hang"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability")
        if self.torn + self.hang > 1:
            raise ValueError(f"torn and hang are shares of the cuts, and {self.torn} + {self.hang} is above 1")
        if not 0 <= self.delay_ms[0] <= self.delay_ms[1]:
            raise ValueError(f"delay_ms is {self.delay_ms}, expected the shortest and the longest, from 0")
        for name in ("bytes_per_s", "cut_every_s", "hang_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True)
class Fate:
    """What happens to one message.

    Attributes:
        copies: How often it arrives; 0 if it is lost.
        delay_s: How long it takes.
        overtaken: Whether the next message arrives before it.
    """

    copies: int
    delay_s: float
    overtaken: bool


@dataclass(frozen=True)
class Cut:
    """How a connection ends.

    Attributes:
        after_s: How long it lives.
        kind: "abort" closes it at once; "torn" in the middle of the next frame; "hang" not at all.
    """

    after_s: float
    kind: CutKind


class FaultPlan:
    """The decisions for one direction of one connection.

    Attributes:
        cut: How the connection ends; None if its ends are left to end it.
    """

    def __init__(self, faults: Faults, connection: str) -> None:
        """Begin a plan.

        Args:
            faults: What may happen.
            connection: Names connection and direction; each has faults of its own.
        """
        self._faults = faults
        self._draw = random.Random(f"{faults.seed} {connection}")
        self._is_first = True
        self.cut = self._draw_cut(random.Random(f"{faults.seed} {connection} cut"))

    def next(self) -> Fate:
        """Decide about the next message."""
        faults, draw = self._faults, self._draw
        # Drawn whether or not they can happen, so that one setting does not shift the luck of another.
        is_dropped, is_doubled, is_overtaken = (
            draw.random() < probability for probability in (faults.drop, faults.duplicate, faults.reorder)
        )
        delay_s = 1e-3 * draw.uniform(*faults.delay_ms)
        is_spared = self._is_first and faults.spare_first
        self._is_first = False
        if is_spared:
            return Fate(1, delay_s, overtaken=False)
        if is_dropped:
            return Fate(0, delay_s, overtaken=False)
        return Fate(2 if is_doubled else 1, delay_s, is_overtaken)

    def _draw_cut(self, draw: random.Random) -> Cut | None:
        faults = self._faults
        if faults.cut_every_s is None:
            return None
        after_s, lot = draw.expovariate(1 / faults.cut_every_s), draw.random()
        kind: CutKind = "hang" if lot < faults.hang else "torn" if lot < faults.hang + faults.torn else "abort"
        return Cut(after_s, kind)


class Line:
    """The messages that are on their way in one direction, and when each arrives. The clock is an argument.

    Attributes:
        waiting_bytes: Their size.
    """

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self.waiting_bytes = 0
        self._bytes_per_s = bytes_per_s
        self._queue: deque[tuple[float, bytes | str]] = deque()  # in the order of arrival
        self._overtaken: deque[tuple[float, bytes | str]] = deque()  # with the time at which they go on alone
        self._last_s = 0.0

    def push(self, message: bytes | str, fate: Fate, now_s: float) -> None:
        """Send a message on its way."""
        self.waiting_bytes += fate.copies * len(message)
        for _ in range(fate.copies):
            if fate.overtaken:
                self._overtaken.append((now_s + fate.delay_s + OVERTAKEN_S, message))
            else:
                self._append(message, now_s + fate.delay_s)
        if fate.copies and not fate.overtaken:
            while self._overtaken:
                self._append(self._overtaken.popleft()[1], now_s)

    def pop(self, now_s: float) -> bytes | str | None:
        """Return the next message that has arrived, or None."""
        while self._overtaken and self._overtaken[0][0] <= now_s:
            self._append(self._overtaken.popleft()[1], now_s)
        if not self._queue or self._queue[0][0] > now_s:
            return None
        message = self._queue.popleft()[1]
        self.waiting_bytes -= len(message)
        return message

    @property
    def due_at_s(self) -> float | None:
        """When `pop` is worth trying again; None if nothing is on its way."""
        return min((messages[0][0] for messages in (self._queue, self._overtaken) if messages), default=None)

    def _append(self, message: bytes | str, earliest_s: float) -> None:
        self._last_s = max(earliest_s, self._last_s)
        if self._bytes_per_s is not None:
            self._last_s += len(message) / self._bytes_per_s
        self._queue.append((self._last_s, message))
