"""The time a player lives by."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The time, and how to let it pass."""

    def now_s(self) -> float:
        """Return the time in seconds; it never goes back."""

    def sleep_until(self, when_s: float) -> None:
        """Wait until `when_s`; return at once if it has passed."""


class MonotonicClock:
    """The monotonic clock of this machine.

    It sleeps and never spins: Linux wakes a sleeper 0.1 to 0.3 ms late, which never adds up, since ticks are absolute.
    """

    def now_s(self) -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def sleep_until(self, when_s: float) -> None:
        """Wait until `when_s`; return at once if it has passed."""
        time.sleep(max(0.0, when_s - time.monotonic()))
