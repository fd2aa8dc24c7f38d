"""How fast actions may change from row to row, and what becomes of a chunk that changes faster."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from policy_models.spec import MotionLimits

# In the order in which a row is clipped to them: where two cannot be met at once, the later one is.
MOTION_KINDS = ("jerk", "acceleration", "velocity")
ORDERS = (3, 2, 1)  # of the derivative that each kind limits

HISTORY = 3  # rows that say where the next one would be without any jerk

# What braking is planned with, of the limits: the rest is for following the plan. A jump of 2 to 500 times what
# acceleration allows in a row, with jerk from 0.02 to 1 of acceleration, then swings past by 3 % at most. Planned with
# all of the limits it is 63 %, and takes longer.
_SPARE = 0.5

# A third difference of numbers that were each rounded to float32 is off by up to (1 + 3 + 3 + 1) / 2 units in the last
# place of the largest: less than that is rounding, not a violation.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


class Motion:
    """Limits on the first three derivatives of actions, K = 3 kinds in the order of `MOTION_KINDS`.

    Attributes:
        reach: How far a row may be from where each derivative, if it were zero, would put it, (K, A).
    """

    def __init__(self, limits: MotionLimits, width: int, step_s: float) -> None:
        self.reach = np.full((HISTORY, width), np.inf)
        for k, (kind, order) in enumerate(zip(MOTION_KINDS, ORDERS, strict=True)):
            for place, limit in enumerate(getattr(limits, kind)):
                if limit is not None:
                    self.reach[k, place] = limit * step_s**order
        # By how many rows are known: without enough of them, nothing is known of the higher derivatives.
        self._reaches = [self.reach.copy() for _ in range(HISTORY + 1)]
        for known, reach in enumerate(self._reaches):
            reach[: HISTORY - known] = np.inf

    def rows(self, actions: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, int]:
        """Return (3 + H, A) float64 rows, `actions` last, and how many of the first three are known, the last ones."""
        known = min(HISTORY, len(before))
        rows = np.zeros((HISTORY + len(actions), actions.shape[1]))
        rows[HISTORY:] = actions
        rows[HISTORY - known : HISTORY] = before[len(before) - known :]
        rows[: HISTORY - known] = rows[HISTORY - known : HISTORY - known + 1]  # as if it had been at rest
        return rows, known

    def changes(self, rows: np.ndarray, known: int) -> np.ndarray:
        """Return the differences of order 3, 2 and 1 that end in each row, (H, K, A), 0 where unknown.

        A derivative is its difference divided by step_s to the power of its order.
        """
        changes = _differences(rows)
        for row in range(min(HISTORY - known, len(changes))):
            changes[row, : HISTORY - known - row] = 0
        return changes

    def excess(self, rows: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """Return by how much `changes` exceed what is allowed, (H, K, A), 0 where they do not by more than rounding."""
        excess: np.ndarray = np.abs(changes) - self.reach
        excess[excess <= self.rounding(rows)[:, None]] = 0
        return excess

    def rounding(self, rows: np.ndarray) -> np.ndarray:
        """Return by how much differences of `rows` may be off since actions are float32, (H, A)."""
        size = np.abs(rows)
        pair = np.maximum(size[1:], size[:-1])
        rounding: np.ndarray = _ROUNDING * np.maximum(pair[2:], pair[:-2])
        return rounding

    def walk(
        self, rows: np.ndarray, known: int, columns: Iterable[int], low: np.ndarray, high: np.ndarray
    ) -> np.ndarray:
        """Clip rows in the order of time, each to what the clipped rows before it allow; changes `rows` in place.

        Rows pass as they are while they are within reach. From the first one that is not, a number goes where the
        policy wants it no faster than it can brake, until it is there.

        Args:
            rows: From `rows`.
            known: From `rows`.
            columns: Which numbers of an action to walk through.
            low: Lowest value of each number, (A,): these bounds are applied last.
            high: Highest value of each number, (A,).

        Returns:
            What was wanted after each kind of limit, before the bounds, (H, K, A).
        """
        wanted = rows[HISTORY:].copy()
        for column in columns:
            reaches = [_Reach(*reach[:, column].tolist()) for reach in self._reaches[known:]]
            rows[HISTORY:, column] = _walk(rows[:, column].tolist(), reaches, float(low[column]), float(high[column]))
        stages = np.empty((len(wanted), HISTORY, rows.shape[1]))
        centres = rows[HISTORY:, None] - _differences(rows)
        for k in range(HISTORY):
            reach = np.full(wanted.shape, self.reach[k])
            reach[: max(0, HISTORY - known - k)] = np.inf
            wanted = np.clip(wanted, centres[:, k] - reach, centres[:, k] + reach)
            stages[:, k] = wanted
        return stages


def _differences(rows: np.ndarray) -> np.ndarray:
    """Return the differences of order 3, 2 and 1 that end in each of (3 + H, A) rows but the first three, (H, K, A)."""
    velocity = rows[1:] - rows[:-1]
    acceleration = velocity[1:] - velocity[:-1]
    jerk = acceleration[1:] - acceleration[:-1]
    return np.stack([jerk, acceleration[1:], velocity[2:]], axis=1)


class _Reach(NamedTuple):
    """Largest difference of each order between rows of one number."""

    jerk: float
    acceleration: float
    velocity: float


def _walk(numbers: list[float], reaches: list[_Reach], low: float, high: float) -> list[float]:
    """Return what the rows of one number become.

    In plain floats and comparisons: a row is 2 to 14 numbers, and one call of numpy takes longer than the arithmetic on
    all of them. Calls of min and max would be shorter, and take twice as long.
    """
    x3, x2, x1 = numbers[:HISTORY]
    wanted = numbers[HISTORY:]
    previous = 2 * wanted[0] - wanted[1] if len(wanted) > 1 else wanted[0]
    following = True
    walked = []
    for i, target in enumerate(wanted):
        reach = reaches[i] if i < len(reaches) else reaches[-1]
        v = x1 - x2
        a = v - (x2 - x3)
        x = target
        if following:
            x = _clip(target, x1, v, a, reach, low, high)
            following = x == target
        if not following:
            step = _approach(previous - x1, target - previous, v, reaches[-1])
            x = _clip(x1 + step, x1, v, a, reach, low, high)
            following = abs(x - target) < 1e-9 * (abs(x) + abs(x1))
        walked.append(x)
        x3, x2, x1, previous = x2, x1, x, target
    return walked


def _clip(x: float, x1: float, v: float, a: float, reach: _Reach, low: float, high: float) -> float:
    """Return `x` after each kind of limit and the bounds; the row before it is x1, with the differences v and a."""
    jerk, acceleration, velocity = reach
    low_j, high_j = x1 + v + a - jerk, x1 + v + a + jerk
    low_a, high_a = x1 + v - acceleration, x1 + v + acceleration
    low_v, high_v = x1 - velocity, x1 + velocity
    x = low_j if x < low_j else high_j if x > high_j else x
    x = low_a if x < low_a else high_a if x > high_a else x
    x = low_v if x < low_v else high_v if x > high_v else x
    return low if x < low else high if x > high else x


def _approach(distance: float, drift: float, v: float, reach: _Reach) -> float:
    """Return by how much a number should change next, to come to rest on its target.

    Going straight for a target and braking when it is passed swings past it, and with a limit on jerk it swings ever
    further. This goes no faster than it can brake, in position and then in velocity: two of the square-root controllers
    that autopilots use, such as ArduPilot's `shape_pos_vel_accel`, in discrete time.

    Args:
        distance: To the target, where that was one row ago.
        drift: By how much the target changes from that row to this one.
        v: By how much the number changed last.
        reach: The limits.
    """
    jerk, acceleration, velocity = _SPARE * reach.jerk, _SPARE * reach.acceleration, reach.velocity
    fastest = drift + _brakeable(distance, acceleration, jerk)
    fastest = -velocity if fastest < -velocity else velocity if fastest > velocity else fastest
    change = fastest - v
    return v + (change if -jerk <= change <= jerk else _brakeable(change, jerk, math.inf))


def _brakeable(distance: float, acceleration: float, jerk: float) -> float:
    """Return the most that `distance` may shrink by in one row if it is to end at 0, neither limit exceeded.

    From v the stop takes v^2 / 2a + (1 + a / j) v / 2, the second part for whole rows and for building up a itself. An
    a above (j^2 distance)^(1/3) would not be reached on the way.
    """
    size = abs(distance)
    lag = 0.5
    if jerk < math.inf:
        acceleration = min(acceleration, math.cbrt(jerk * jerk * size))
        lag += 0.5 * acceleration / jerk
    if acceleration in (0, math.inf):
        return distance
    return math.copysign(min(size, acceleration * (math.sqrt(lag * lag + 2 * size / acceleration) - lag)), distance)
