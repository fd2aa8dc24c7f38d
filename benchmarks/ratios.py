"""Ratios of two noisy measurements, with an interval that says how noisy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_of(
    numerator: Sequence[Sequence[float]],
    denominator: Sequence[Sequence[float]],
    percent: float = 50,
    *,
    resamples: int = 1000,
) -> Ratio:
    """Return the ratio of two percentiles.

    Args:
        numerator: Latencies by round; round i of both was measured at about the same time.
        denominator: As many rounds.
        percent: Which percentile of all rounds together; 50 is the median.
        resamples: Bootstrap resamples. Whole rounds are drawn, for both sides alike: what slows a round slows both.
    """
    assert len(numerator) == len(denominator), "rounds come in pairs"
    above, below = _rectangle(numerator), _rectangle(denominator)

    def ratio(rounds: np.ndarray) -> float:
        return float(np.nanpercentile(above[rounds], percent) / np.nanpercentile(below[rounds], percent))

    everything = np.arange(len(above))
    draw = np.random.default_rng(0)
    drawn = [ratio(draw.choice(everything, len(everything))) for _ in range(resamples)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Ratio(ratio(everything), float(low), float(high))


def _rectangle(rounds: Sequence[Sequence[float]]) -> np.ndarray:
    table = np.full((len(rounds), max(map(len, rounds))), np.nan)
    for row, latencies in zip(table, rounds, strict=True):
        row[: len(latencies)] = latencies
    return table
