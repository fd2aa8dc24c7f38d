"""What a robot does once its actions have run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from policy_client.chunk import Action


class StopRule(Protocol):
    """Makes actions while none is due."""

    def action(self, last: Action, stalled_s: float) -> Action:
        """Return the action of this tick, (A,).

        Args:
            last: The last action that was due, (A,), read-only.
            stalled_s: For how long no action has been due.
        """


@dataclass(frozen=True)
class Hold:
    """Repeats the last action: right where actions are positions, wrong for velocities."""

    def action(self, last: Action, stalled_s: float) -> Action:
        """Return `last`."""
        return last


@dataclass(frozen=True)
class RampTo:
    """Goes from the last action to a given one, in a straight line, and stays there.

    Args:
        value: Where to end: one number for every dimension, or (A,).
        duration_s: How long to take; 0 is at once.
    """

    value: float | Sequence[float]
    duration_s: float

    def action(self, last: Action, stalled_s: float) -> Action:
        """Return the point of the line at `stalled_s`, (A,)."""
        share = min(1.0, stalled_s / self.duration_s) if self.duration_s > 0 else 1.0
        return (last + share * (np.asarray(self.value, np.float32) - last)).astype(np.float32, copy=False)


@dataclass(frozen=True)
class RampToZero:
    """Fades the last action out: right where actions are velocities, forces or differences.

    Args:
        duration_s: How long to take; 0 is at once.
    """

    duration_s: float

    def action(self, last: Action, stalled_s: float) -> Action:
        """Return what is left of `last`, (A,)."""
        return RampTo(0.0, self.duration_s).action(last, stalled_s)


@dataclass(frozen=True)
class Call:
    """Asks a function of yours, `callback(last, stalled_s)`, in the loop's thread. What it raises ends the loop."""

    callback: Callable[[Action, float], Action]

    def action(self, last: Action, stalled_s: float) -> Action:
        """Return what the function says, (A,)."""
        return self.callback(last, stalled_s)
