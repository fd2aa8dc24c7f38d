"""What a session's robot was sent: the chunks that the next one may have to go on from."""

from collections import deque
from dataclasses import dataclass

import numpy as np

_KEPT = 8
# Times are floats, and a row that is due now must not count as past. Since 1970 a float counts in quarters of a
# microsecond, which is far from a thousandth of a step.
_ROUNDING_STEPS = 1e-3


@dataclass(frozen=True, eq=False)
class Sent:
    """A chunk that was sent.

    Attributes:
        seq: Number of the observation that it answers.
        at_s: When row 0 is due; robots' clocks do, as long as one session has one clock.
        said: What the policy said, (H, A) float32, in the robot's units.
        actions: What was sent of it, (H, A) float32.
    """

    seq: int
    at_s: float
    said: np.ndarray
    actions: np.ndarray


class Track:
    """The last chunks of one session."""

    def __init__(self) -> None:
        self._sent: deque[Sent] = deque(maxlen=_KEPT)

    def add(self, sent: Sent) -> None:
        """Remember a chunk."""
        self._sent.append(sent)

    def clear(self) -> None:
        """Forget all of them: an episode ended."""
        self._sent.clear()

    def find(self, seq: int | None) -> Sent | None:
        """Return the chunk that answers observation `seq`, None for one that is not known; for None the last one."""
        if seq is None:
            return self._sent[-1] if self._sent else None
        return next((sent for sent in self._sent if sent.seq == seq), None)

    def all(self) -> tuple[Sent, ...]:
        """Return the chunks, oldest first."""
        return tuple(self._sent)


def rows_left(sent: Sent, at_s: float, step_s: float) -> int:
    """Return how many whole rows of a chunk are due from `at_s` on; 0 if it has run out, or begins only later."""
    past = (at_s - sent.at_s) / step_s
    if past < -_ROUNDING_STEPS:
        return 0
    return max(0, len(sent.actions) - int(np.ceil(past - _ROUNDING_STEPS)))


def rows_at(actions: np.ndarray, began_at_s: float, times_s: np.ndarray, step_s: float) -> np.ndarray:
    """Return what a chunk says for each time, (N, A) float32.

    Args:
        actions: The chunk, (H, A).
        began_at_s: When its row 0 is due.
        times_s: (N,). Between two rows it is a straight line, outside the chunk its first or last row.
        step_s: Time between rows.
    """
    places = np.clip((times_s - began_at_s) / step_s, 0, len(actions) - 1)
    nearest = np.round(places)
    places = np.where(np.abs(places - nearest) < _ROUNDING_STEPS, nearest, places)
    lower = places.astype(np.intp)
    upper = np.minimum(lower + 1, len(actions) - 1)
    part = (places - lower).astype(np.float32)[:, None]
    rows: np.ndarray = actions[lower] * (1 - part) + actions[upper] * part
    return rows


def given_before(sent: Sent | None, at_s: float, step_s: float, *, most: int = 3) -> np.ndarray:
    """Return the last actions that the robot was given before `at_s`, (n <= most, A) float32, oldest first."""
    if sent is None:
        return np.zeros((0, 0), dtype=np.float32)
    past = (at_s - sent.at_s) / step_s
    count = int(np.clip(np.floor(past + _ROUNDING_STEPS), 0, most))
    return rows_at(sent.actions, sent.at_s, at_s - step_s * np.arange(count, 0, -1), step_s)
