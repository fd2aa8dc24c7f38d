"""How long to wait: between attempts, and in all."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts to connect: each `factor` times the one before, up to `longest_s`.

    Each pause is cut by a random share of up to `jitter`, so that robots cut off together come back one by
    one.
    """

    first_s: float = 0.1
    factor: float = 2.0
    longest_s: float = 2.0
    jitter: float = 0.5

    def pauses_s(self) -> Iterator[float]:
        """Yield the pauses in seconds, without end."""
        pause_s = self.first_s
        while True:
            yield pause_s * (1 - self.jitter * _random.random())
            pause_s = min(pause_s * self.factor, self.longest_s)


class Deadline:
    """A budget of time that several waits share, by the monotonic clock."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._ends_at_s = time.monotonic() + budget_s

    def remaining_s(self) -> float:
        """Return what is left of the budget, 0 once it is spent."""
        return max(0.0, self._ends_at_s - time.monotonic())


_random = random.SystemRandom()
