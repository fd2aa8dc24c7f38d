"""How long an answer takes, judged by those before it."""

from __future__ import annotations

import math
from collections import deque


class LatencyQuantile:
    """A quantile of recent latencies. Times are monotonic seconds, given by the caller. Not for several threads.

    The quantile is one of the latencies seen, and rounds down: as soon as there are two of them, a single spike,
    such as that of a policy that warms up, does not decide.

    Args:
        quantile: Share of the latencies that shall be no longer, from 0 to 1.
        window: How many are remembered.
        longest_s: For how long they are remembered; the newest always is.

    Raises:
        ValueError: A quantile outside of 0 to 1, or a window of less than one.
    """

    def __init__(self, quantile: float = 0.9, *, window: int = 30, longest_s: float = 60.0) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}, expected one from 0 to 1")
        if window < 1:
            raise ValueError(f"window is {window}, expected at least 1")
        self.quantile, self.longest_s = quantile, longest_s
        self._seen: deque[tuple[float, float]] = deque(maxlen=window)  # (when, latency)

    def add(self, latency_s: float, now_s: float) -> None:
        """Remember how long an answer took that came at `now_s`."""
        self._seen.append((now_s, latency_s))

    def value_s(self, now_s: float) -> float | None:
        """Return the quantile in seconds, None before the first answer."""
        while len(self._seen) > 1 and self._seen[0][0] < now_s - self.longest_s:
            self._seen.popleft()
        if not self._seen:
            return None
        latencies_s = sorted(latency_s for _, latency_s in self._seen)
        return latencies_s[math.floor(self.quantile * (len(latencies_s) - 1))]
