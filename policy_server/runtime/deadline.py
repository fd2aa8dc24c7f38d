"""A time budget, passed down the call chain."""

import time
from dataclasses import dataclass

from policy_server.errors import DeadlineExceeded


@dataclass(frozen=True)
class Deadline:
    """A point on the monotonic clock after which an answer is worthless."""

    at_s: float

    @classmethod
    def after(cls, budget_s: float) -> "Deadline":
        """Return the deadline `budget_s` from now."""
        return cls(time.monotonic() + budget_s)

    def remaining_s(self) -> float:
        """Return the time left, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    def late_s(self) -> float:
        """Return the time since it passed, never negative."""
        return max(0.0, time.monotonic() - self.at_s)

    def check(self) -> None:
        """Raise DeadlineExceeded if the time is over."""
        late_s = self.late_s()
        if late_s > 0:
            raise DeadlineExceeded(1e3 * late_s)
