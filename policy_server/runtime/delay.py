"""How long a robot's chunks take, as a quantile that forgets."""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

_WINDOW = 32
_FORGET_S = 30.0


class DelayQuantile:
    """A high quantile of recent delays.

    A maximum would remember one slow chunk, such as the first, for ever, and every later chunk would be planned for a
    delay that does not come. A mean would be too short for half of them.
    """

    def __init__(
        self, quantile: float = 0.9, *, window: int = _WINDOW, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: quantile is between 0 and 1; window is how many delays count; those older than 30 s do not."""
        self._quantile = quantile
        self._clock = clock
        self._delays: deque[tuple[float, float]] = deque(maxlen=window)

    def note(self, delay_s: float) -> None:
        """Count one delay."""
        self._delays.append((self._clock(), delay_s))

    @property
    def value_s(self) -> float:
        """The quantile; 0 if nothing recent is known."""
        oldest_s = self._clock() - _FORGET_S
        while len(self._delays) > 1 and self._delays[0][0] < oldest_s:
            self._delays.popleft()
        if not self._delays:
            return 0.0
        delays_s = sorted(delay_s for _, delay_s in self._delays)
        # Of few delays the largest is most likely a warm-up: the median then.
        if len(delays_s) < 5:
            return delays_s[(len(delays_s) - 1) // 2]
        return float(np.quantile(delays_s, self._quantile, method="higher"))
