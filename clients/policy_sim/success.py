"""Success rates as they are reported: with an interval, beside how long the successes took."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(steps: Sequence[int], count: int) -> dict[str, Any]:
    """Summarise `count` episodes.

    Args:
        steps: Control steps that each successful episode took.
        count: Episodes, with those that failed.

    Returns:
        The success rate, its 95 % interval and the mean of `steps` (None if there are none).
    """
    return {
        "success": round(len(steps) / count, 4),
        "interval_95": [round(bound, 4) for bound in wilson(len(steps), count)],
        "mean_steps": round(float(np.mean(steps)), 1) if steps else None,
    }


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a rate; unlike the normal interval it keeps a width at 0 and 100 %."""
    rate = successes / count
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    margin = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def bootstrap(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values`, which must be independent of each other.

    Equal values and seeds give equal intervals. It is too narrow for fewer than about ten values.
    """
    rng = np.random.default_rng(seed)
    drawn = np.asarray(values, dtype=np.float64)
    means = [drawn[rng.integers(len(drawn), size=len(drawn))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
