"""What a policy's spec allows its actions, and what becomes of a chunk that goes further."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from policy_models.spec import PolicySpec
from policy_server.runtime.motion import HISTORY, MOTION_KINDS, ORDERS, Motion

# In the order in which a row is clipped to them: where two cannot be met at once, the later one is.
KINDS = (*MOTION_KINDS, "workspace", "position")

# Clipping to it changes nothing that is finite, and what is clipped to it never leaves float32.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Violation:
    """One number of a chunk that is outside of one of its limits.

    Attributes:
        kind: One of `KINDS`.
        name: Which number of an action.
        row: In which row of the chunk.
        value: What the policy wanted, in `unit`.
        low: The lowest value that is allowed.
        high: The highest value that is allowed.
        unit: The action's unit, or that per s, s^2 or s^3.
    """

    kind: str
    name: str
    row: int
    value: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Held:
    """A chunk within its limits.

    Attributes:
        actions: (H, A) float32.
        clamped: How many numbers differ from those that were given; what limits of motion moved, by more than rounding.
        by: How many numbers each kind of limit kept from where they were wanted, for the kinds that kept any. Several
            may keep the same number; one that is on its way back counts for none.
        unmet: How many numbers still exceed a limit of motion, since one that comes first left no room for it.
    """

    actions: np.ndarray
    clamped: int
    by: Mapping[str, int]
    unmet: int = 0


@dataclass(frozen=True)
class _Side:
    """What one kind of limit allows each number of an action, (A,) float64 each."""

    kind: str
    low: np.ndarray
    high: np.ndarray
    per: str = ""

    @cached_property
    def width(self) -> np.ndarray:
        """Between `low` and `high`; 1 where nothing is limited, since nothing can be outside."""
        width = self.high - self.low
        return np.where(np.isfinite(width), np.maximum(width, 1e-30), 1.0)


class Limits:
    """Holds chunks to what a spec allows."""

    def __init__(self, spec: PolicySpec) -> None:
        action, motion = spec.action, spec.motion
        self._action, self._step_s = action, spec.step_s
        self._low = np.array(action.low or [-_LARGEST] * action.width, dtype=np.float32)
        self._high = np.array(action.high or [_LARGEST] * action.width, dtype=np.float32)
        self._box_low, self._box_high = np.full_like(self._low, -_LARGEST), np.full_like(self._high, _LARGEST)
        self._limited, self._boxed = bool(action.low or action.high), False
        self._motion: Motion | None = None
        if motion is not None and motion.workspace is not None:
            places = [action.names.index(name) for name in motion.workspace.names]
            self._box_low[places], self._box_high[places] = motion.workspace.low, motion.workspace.high
            self._boxed = True
        if motion is not None and any(getattr(motion, kind) for kind in MOTION_KINDS):
            self._motion = Motion(motion, action.width, spec.step_s)
        self._boxes = [
            _Side("workspace", self._box_low.astype(np.float64), self._box_high.astype(np.float64)),
            _Side("position", self._low.astype(np.float64), self._high.astype(np.float64)),
        ]
        reach = np.empty((0, action.width)) if self._motion is None else self._motion.reach
        self._derivatives = [
            _Side(kind, -limit / spec.step_s**order, limit / spec.step_s**order, per)
            for kind, order, per, limit in zip(MOTION_KINDS, ORDERS, ("/s^3", "/s^2", "/s"), reach, strict=False)
        ]

    def hold(self, actions: np.ndarray, before: np.ndarray, first: int) -> Held:
        """Clip a chunk to its limits.

        Args:
            actions: (H, A) float32, all finite.
            before: The last actions that the robot is given before row `first`, oldest first, (n, A) with any n; of
                fewer than three, less is known about how the first rows change.
            first: The first row that the robot plays; those before it are held to workspace and position alone.
        """
        if self._motion is None and not self._boxed:  # most policies
            if not self._limited:
                return Held(actions, 0, {})
            inside = np.clip(actions, self._low, self._high)
            count = int(np.count_nonzero(inside != actions))
            return Held(inside, count, {"position": count} if count else {})
        inside, moved = self._clip(actions)
        within = Held(inside, int(np.count_nonzero(inside != actions)), _counts(moved))
        if self._motion is None or first >= len(actions):
            return within
        assert np.isfinite(before).all(), "the actions before a chunk were sent, so they were finite"
        rows, known = self._motion.rows(inside[first:], before)
        excess = self._motion.excess(rows, self._motion.changes(rows, known))
        if not excess.any():
            return within
        low, high = np.clip([self._box_low, self._box_high], self._low, self._high)
        stages = self._motion.walk(rows, known, np.flatnonzero(excess.any(axis=(0, 1))), low, high)
        rounding = self._motion.rounding(rows)
        previous = inside[first:]
        for k, kind in enumerate(MOTION_KINDS):
            moved[kind] = np.abs(stages[:, k] - previous) > rounding
            previous = stages[:, k]
        for kind, again in self._clip(previous)[1].items():
            moved[kind][first:] |= again
        unmet = self._motion.excess(rows, self._motion.changes(rows, known)).any(axis=1)
        walked = np.concatenate([inside[:first], rows[HISTORY:].astype(np.float32)])
        differ = walked != actions
        differ[first:] &= np.abs(rows[HISTORY:] - actions[first:]) > rounding
        return Held(walked, int(np.count_nonzero(differ)), _counts(moved), int(np.count_nonzero(unmet)))

    def worst(self, actions: np.ndarray, before: np.ndarray, first: int) -> Violation | None:
        """Return the number that is furthest outside of a limit, in widths of what is allowed; None if none is.

        Arguments are those of `hold`.
        """
        best, worst = 0.0, None
        for side, values, top in self._measured(actions, before, first):
            excess = np.maximum(side.low - values, values - side.high) / side.width
            index = int(excess.argmax())
            if excess.flat[index] > best:
                best, (row, place) = float(excess.flat[index]), divmod(index, len(side.low))
                numbers = float(values[row, place]), float(side.low[place]), float(side.high[place])
                unit = self._action.units[place] + side.per
                worst = Violation(side.kind, self._action.names[place], top + row, *numbers, unit)
        return worst

    def _measured(self, actions: np.ndarray, before: np.ndarray, first: int) -> Iterator[tuple[_Side, np.ndarray, int]]:
        """Yield each kind of limit with what it is about, and the chunk's row where that begins."""
        for side in self._boxes:
            yield side, actions, 0
        if self._motion is not None and first < len(actions):
            rows, known = self._motion.rows(actions[first:], before)
            changes = self._motion.changes(rows, known)
            changes[self._motion.excess(rows, changes) == 0] = 0  # what is rounding breaks no limit
            for k, (side, order) in enumerate(zip(self._derivatives, ORDERS, strict=True)):
                yield side, changes[:, k] / self._step_s**order, first

    def _clip(self, actions: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return actions within workspace and position, (H, A), and which numbers each moved."""
        boxed = np.clip(actions, self._box_low, self._box_high)
        inside = np.clip(boxed, self._low, self._high)
        return inside, {"workspace": boxed != actions, "position": inside != boxed}


def _counts(moved: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {kind: count for kind in KINDS if kind in moved and (count := int(np.count_nonzero(moved[kind])))}
