"""The last look at a chunk before it leaves for a robot."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from policy_models.spec import PolicySpec
from policy_server.errors import LimitsViolated, NonFiniteActions
from policy_server.runtime.fallbacks import Fallback, Refuse
from policy_server.runtime.limits import Held, Limits, Violation

Mode = Literal["clamp", "refuse"]


@dataclass(frozen=True)
class GuardReport:
    """What became of one chunk.

    Attributes:
        clamped: How many numbers differ from those that the policy, or the fallback, gave.
        by: How many numbers each kind of limit kept from where the policy wanted them, for the kinds that kept any:
            "jerk", "acceleration", "velocity", "workspace", "position". Several may keep the same number; one that is
            on its way back counts for none.
        unmet: How many numbers still exceed a limit of motion, since a limit that comes first left no room for it.
        worst: The policy's number that was furthest outside of a limit; None if none was, or some were not finite.
        fallback: Name of what was sent in place of the policy's chunk; empty if that was sent.
    """

    clamped: int = 0
    by: Mapping[str, int] = field(default_factory=dict)
    unmet: int = 0
    worst: Violation | None = None
    fallback: str = ""


@dataclass(frozen=True)
class Guarded:
    """A chunk that may be sent.

    Attributes:
        actions: (H, A) float32, finite.
        report: How it came to be.
    """

    actions: np.ndarray
    report: GuardReport


@dataclass
class GuardCounts:
    """What a guard has seen since it was made.

    Attributes:
        chunks: Chunks that it looked at.
        clamped_chunks: Chunks that were sent with at least one number moved.
        clamped: Numbers that a limit kept from where they were wanted, by its kind.
        refusals: Chunks of the policy that were withheld, whether or not something was sent in their place.
        fallbacks: Chunks that were sent in the place of one withheld, by the fallback's name.
    """

    chunks: int = 0
    clamped_chunks: int = 0
    clamped: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


_UNTOUCHED = GuardReport()


class Guard:
    """Holds the chunks of one policy to the limits of its spec.

    A chunk that is not finite is always withheld. One that breaks a limit is clipped to it (`mode` "clamp"), or
    withheld (`mode` "refuse"). `fallback` finds what is sent in place of one withheld.

    Attributes:
        counts: What it has seen.
        looks_around: Whether it makes anything of what `check` is told besides the chunk.
    """

    def __init__(
        self, policy: str, spec: PolicySpec, *, mode: Mode = "clamp", fallback: Fallback | None = None
    ) -> None:
        self.counts = GuardCounts()
        self._policy = policy
        self._limits = Limits(spec)
        self._mode = mode
        self._fallback = fallback or Refuse()
        # Most policies have limits of position alone, and nothing around the chunk matters to those.
        self.looks_around = spec.motion is not None or not isinstance(self._fallback, Refuse)
        self._nothing = np.empty((0, spec.action.width), dtype=np.float32)

    def check(
        self,
        actions: np.ndarray,
        before: np.ndarray | None = None,
        *,
        playing: np.ndarray | None = None,
        first: int = 0,
    ) -> Guarded:
        """Return what may be sent.

        Args:
            actions: What the policy gave, (H, A) float32.
            before: The last actions that the robot is given before row `first`, step_s apart, oldest first, (n, A), all
                finite. Three are enough; with fewer, limits of motion begin with the rows that are known.
            playing: What is left of the chunk that the robot plays, its row 0 due when that of `actions` is, (R, A).
            first: The first row that the robot plays, if the rows before it will have passed by then. Those are held to
                workspace and position alone.

        Raises:
            NonFiniteActions: Some are NaN or infinite, so that no part can be trusted, and the fallback has nothing.
            LimitsViolated: The mode is "refuse", a number is outside of a limit, and the fallback has nothing.
        """
        before = self._nothing if before is None else before
        self.counts.chunks += 1
        worst = None
        if not np.isfinite(actions).all():
            refused: NonFiniteActions | LimitsViolated = NonFiniteActions(self._policy)
        else:
            held = self._limits.hold(actions, before, first)
            if not (held.by or held.clamped):
                return Guarded(held.actions, _UNTOUCHED)
            worst = self._limits.worst(actions, before, first)
            assert worst is not None, "something was clipped that is within every limit"
            if self._mode == "clamp":
                return self._moved(held, worst)
            refused = _refusal(self._policy, worst)
        self.counts.refusals += 1
        chunk = self._fallback.replace(refused, len(actions), before, self._nothing if playing is None else playing)
        self.counts.fallbacks[self._fallback.name] += 1
        return self._moved(self._limits.hold(chunk, before, first), worst, self._fallback.name)

    def _moved(self, held: Held, worst: Violation | None, fallback: str = "") -> Guarded:
        assert np.isfinite(held.actions).all(), "the actions before the chunk were not finite"
        self.counts.clamped_chunks += held.clamped > 0
        self.counts.clamped.update(held.by)
        return Guarded(held.actions, GuardReport(held.clamped, held.by, held.unmet, worst, fallback))


def _refusal(policy: str, worst: Violation) -> LimitsViolated:
    what = f"a {worst.kind} of {worst.name!r} in row {worst.row}"
    return LimitsViolated(policy, what, f"{worst.value:.6g} {worst.unit}", f"{worst.low:.6g} to {worst.high:.6g}")
