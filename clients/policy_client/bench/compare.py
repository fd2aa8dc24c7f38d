"""Two results beside each other, with intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policy_client.bench.distribution import in_words, together
from policy_client.bench.result import Result
from policy_client.bench.table import aligned, headline

DRAWS = 1000
_PERCENTS = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
_LOW, _HIGH = 2.5, 97.5  # ends of a 95 % interval


@dataclass(frozen=True)
class Change:
    """One figure of two results.

    Attributes:
        what: Which quantile of the latency.
        before_ms: The first result's.
        after_ms: The second's.
        ratio: The second over the first.
        low: Lower end of the 95 % interval of the ratio.
        high: Upper end.
    """

    what: str
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether there is a difference beyond chance."""
        return not self.low <= 1 <= self.high


def compare(before: Result, after: Result, *, seed: int = 0) -> list[Change]:
    """Return the ratios of two results' latencies.

    Whole slices of time are drawn with replacement, not single observations: those of one moment share their fate,
    and intervals that took them for independent would be far too narrow.

    Raises:
        ValueError: One of them holds no observations.
    """
    draw = np.random.default_rng(seed)
    drawn = [_quantiles(result, draw) for result in (before, after)]
    changes = []
    for row, what in enumerate(_PERCENTS):
        (before_ms, befores), (after_ms, afters) = ((exact[row], draws[row]) for exact, draws in drawn)
        low, high = np.percentile(afters / befores, (_LOW, _HIGH))
        changes.append(
            Change(what, float(before_ms), float(after_ms), float(after_ms / before_ms), float(low), float(high))
        )
    return changes


def comparison_lines(before: Result, after: Result, changes: Sequence[Change]) -> list[str]:
    """Return a comparison for a terminal."""
    rows = [("latency", "before", "after", "ratio", "95 % interval", "")]
    for change in changes:
        verdict = "no difference shown"
        if change.shown:
            verdict = "faster" if change.ratio < 1 else "slower"
        interval = f"{change.low:.3f} to {change.high:.3f}"
        rows.append(
            (
                change.what,
                in_words(change.before_ms),
                in_words(change.after_ms),
                f"{change.ratio:.3f}",
                interval,
                verdict,
            )
        )
    notes = [f"missed the deadline: {before.missed_share:.2%} before, {after.missed_share:.2%} after"]
    different = [
        f"{name}: {was!r} before, {now!r} after"
        for name in before.test.__dataclass_fields__
        if (was := getattr(before.test, name)) != (now := getattr(after.test, name))
    ]
    if different:
        notes.append("the tests differ in " + "; ".join(different))
    if before.machine != after.machine:
        notes.append("the tests were run from different machines")
    return [f"before: {headline(before)}", f"after:  {headline(after)}", "", *aligned(rows), "", *notes]


def _quantiles(result: Result, draw: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the quantiles at `_PERCENTS`, (Q,), and those of resampled tests, (Q, DRAWS)."""
    values_ms, counted = together(result.slices)
    counted = counted[counted.sum(axis=1) > 0]
    if not len(counted):
        raise ValueError(f"the result of {result.made_at} holds no observations")
    # How often each slice is drawn, (DRAWS, N); products of floats are quick, and these are whole numbers.
    often = draw.multinomial(len(counted), np.full(len(counted), 1 / len(counted)), DRAWS).astype(np.float64)
    drawn = often @ counted.astype(np.float64)
    below = np.cumsum(np.concatenate([counted.sum(axis=0, keepdims=True), drawn]), axis=1)  # row 0: as measured
    found_ms = np.empty((len(_PERCENTS), DRAWS + 1))
    for row, percent in enumerate(_PERCENTS.values()):
        # The rank that HdrHistogram takes.
        ranks = np.maximum(np.floor(percent / 100 * below[:, -1] + 0.5), 1)
        found_ms[row] = [values_ms[np.searchsorted(line, rank)] for line, rank in zip(below, ranks, strict=True)]
    found_ms = np.maximum(found_ms, 1e-3)  # less than a microsecond is none, and ratios need some
    return found_ms[:, 0], found_ms[:, 1:]
