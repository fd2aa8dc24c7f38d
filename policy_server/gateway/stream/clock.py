"""What a robot's clock shows at a moment of ours."""

from collections import deque
from dataclasses import dataclass

_RECENT = 16


@dataclass(frozen=True)
class Exchange:
    """A ping with its pong, in seconds.

    Attributes:
        round_trip_s: From sending the ping to receiving the pong.
        offset_s: The robot's clock less ours, if both ways took equally long; off by half the round trip at most.
    """

    round_trip_s: float
    offset_s: float


class RobotClock:
    """Estimates the offset of a robot's clock from the quickest of its recent answers (as NTP's clock filter does)."""

    def __init__(self) -> None:
        self._exchanges: deque[Exchange] = deque(maxlen=_RECENT)

    def answered(self, sent_s: float, robot_s: float, received_s: float) -> None:
        """Take in a pong.

        Args:
            sent_s: When its ping was sent, by our clock.
            robot_s: What the robot's clock showed in between.
            received_s: When it came, by our clock.
        """
        if received_s >= sent_s:
            self._exchanges.append(Exchange(received_s - sent_s, robot_s - (sent_s + received_s) / 2))

    @property
    def best(self) -> Exchange | None:
        """The quickest recent exchange; None before the first."""
        return min(self._exchanges, key=lambda exchange: exchange.round_trip_s, default=None)

    def ours_s(self, robot_s: float, received_s: float) -> float:
        """Return when it was `robot_s` by the robot's clock, by ours.

        Args:
            robot_s: A time of the robot's clock.
            received_s: When it was told, by our clock: it was not later. Without any exchange, it was then.
        """
        best = self.best
        return received_s if best is None else min(robot_s - best.offset_s, received_s)

    @property
    def way_s(self) -> float:
        """What one way takes; 0 while it is not known."""
        return 0.0 if self.best is None else self.best.round_trip_s / 2
