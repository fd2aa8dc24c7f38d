"""What robots were promised: how many chunks a second each."""

import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

from policy_server.errors import RateTooHigh

# Of what was measured. The rest is for robots that declare nothing, and for a machine that has other things to do.
_PROMISED = 0.8


class Admission:
    """Promises of one policy. A promise ends with `release`, or with the robot's object."""

    def __init__(self, capacity_hz: Callable[[], float]) -> None:
        """Args: capacity_hz returns how many chunks a second are possible."""
        self._capacity_hz = capacity_hz
        self._promised_hz: WeakKeyDictionary[object, float] = WeakKeyDictionary()

    def left_hz(self, robot: object | None = None) -> float:
        """Return how many chunks a second can be promised besides those that are; not counting `robot`'s own."""
        promised_hz = sum(rate_hz for other, rate_hz in self._promised_hz.items() if other is not robot)
        return max(0.0, _PROMISED * self._capacity_hz() - promised_hz)

    def promise(self, robot: object, rate_hz: float) -> None:
        """Promise a robot so many chunks a second, in place of what it was promised before.

        What it was promised already it is promised again, though the machine may have become slower: a robot whose
        connection broke must not be sent away for that.

        Raises:
            RateTooHigh: They cannot be had; what was promised before stays.
        """
        left_hz = self.left_hz(robot)
        if rate_hz > max(left_hz, self._promised_hz.get(robot, 0.0)):
            raise RateTooHigh(rate_hz, math.floor(10 * left_hz) / 10)
        self._promised_hz[robot] = rate_hz

    def release(self, robot: object) -> None:
        """Take the promise back."""
        self._promised_hz.pop(robot, None)
