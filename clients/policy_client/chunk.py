"""The chunk: a run of future actions predicted from one observation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Action: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """A run of future actions predicted from one observation."""

    actions: Action  # (H, A) float32, in the robot's own units, read-only
    step_s: float  # time between consecutive actions
    made_at_s: float  # monotonic time, at the client, of the observation it answers
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the rest of the reply: seed, policy, timings

    def __len__(self) -> int:
        """Return H, the number of actions."""
        return len(self.actions)

    @property
    def reasoning(self) -> str | None:
        """What the policy acted on, in words; None from a policy that does not reason."""
        said = self.metadata.get("reasoning")
        text = said.get("text") if isinstance(said, Mapping) else said
        return text if isinstance(text, str) else None

    @property
    def ends_at_s(self) -> float:
        """Monotonic time at which the last action has been held for its `step_s`."""
        return self.made_at_s + len(self) * self.step_s

    def action_at(self, now_s: float) -> Action | None:
        """Return the action due at `now_s`, (A,), or None before the first and after the last."""
        index = self._step_at(now_s)
        return self.actions[index] if 0 <= index < len(self) else None

    def action_between(self, now_s: float) -> Action | None:
        """Return the action at `now_s` on the line between the rows before and after it, (A,) read-only.

        The last action is held for its `step_s`; None before the first and after the last.
        """
        index = self._step_at(now_s)
        if not 0 <= index < len(self):
            return None
        before: Action = self.actions[index]
        share = (now_s - self.made_at_s) / self.step_s - index
        if index == len(self) - 1 or share <= _ROUNDING_STEPS:
            return before
        after: Action = self.actions[index + 1]
        action: Action = before + np.float32(share) * (after - before)
        action.flags.writeable = False
        return action

    def _step_at(self, now_s: float) -> int:
        # Ticks that fall on a step must not land just before it for want of a float's last digits.
        return math.floor((now_s - self.made_at_s) / self.step_s + _ROUNDING_STEPS)


_ROUNDING_STEPS = 1e-6
