"""What a robot gets in place of a chunk that must not be sent."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from policy_server.errors import PolicyServerError


class Fallback(Protocol):
    """Finds a chunk to send in place of one that was withheld.

    Attributes:
        name: What reports call it.
    """

    name: str

    def replace(self, refused: PolicyServerError, horizon: int, before: np.ndarray, playing: np.ndarray) -> np.ndarray:
        """Return the chunk to send; it is clipped to the limits like any other.

        Args:
            refused: Why the policy's chunk was withheld; what is raised if there is nothing else to send.
            horizon: Rows of a chunk, H.
            before: The last actions that the robot is given before it plays the chunk, oldest first, (n, A).
            playing: The rest of the chunk that the robot plays, row 0 due at the same time as that of the chunk to
                send, (R, A).

        Returns:
            (H, A) float32.
        """


class Refuse:
    """Sends nothing: the robot learns why."""

    name = "refuse"

    def replace(self, refused: PolicyServerError, horizon: int, before: np.ndarray, playing: np.ndarray) -> np.ndarray:
        """See `Fallback.replace`."""
        raise refused


class LastGood:
    """Sends the rest of the chunk that is being played, then its last row; refuses once nothing is left of it."""

    name = "last_good"

    def replace(self, refused: PolicyServerError, horizon: int, before: np.ndarray, playing: np.ndarray) -> np.ndarray:
        """See `Fallback.replace`."""
        if len(playing) == 0:
            raise refused
        return playing[np.minimum(np.arange(horizon), len(playing) - 1)]


class Hold:
    """Sends the last action that the robot was given, over and over; refuses if there was none.

    That stops a robot whose actions are positions. One whose actions are velocities or forces goes on with them.
    """

    name = "hold"

    def replace(self, refused: PolicyServerError, horizon: int, before: np.ndarray, playing: np.ndarray) -> np.ndarray:
        """See `Fallback.replace`."""
        if len(before) == 0:
            raise refused
        return np.repeat(before[-1:], horizon, axis=0)


FALLBACKS: Mapping[str, type[Fallback]] = {kind.name: kind for kind in (Refuse, LastGood, Hold)}
