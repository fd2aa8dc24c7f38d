"""Distributions of times, kept in HdrHistogram: microseconds to an hour, three significant digits.

Histograms of processes and of slices of time add up without loss, and any tool that reads HdrHistogram reads these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import ArrayLike, NDArray

PERCENTS = (50.0, 90.0, 99.0, 99.9)
NEVER_MS = 3_600_000.0  # what was never answered counts as an hour: slower than any answer
_HIGHEST_US = int(1e3 * NEVER_MS)
_DIGITS = 3


@dataclass(frozen=True)
class Distribution:
    """How long something took.

    Attributes:
        count: How many times it was measured, or waited for in vain.
        mean_ms: Mean of what was measured; 0 if nothing was.
        p50_ms: Half stayed below; `NEVER_MS` means that so many were never answered.
        p90_ms: 90 % stayed below.
        p99_ms: 99 % stayed below.
        p99_9_ms: 99.9 % stayed below.
        max_ms: The longest.
        histogram: All of it, as HdrHistogram's V2 encoding in base64.
    """

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    histogram: str

    @classmethod
    def of(cls, values_ms: ArrayLike, *, never: int = 0) -> Distribution:
        """Summarise times in ms, and how many never came. Negative times count as none at all."""
        values = np.asarray(values_ms, np.float64)
        histogram = make_histogram(values, never=never)
        longest_ms = NEVER_MS if never else max(0.0, float(values.max(initial=0.0)))
        # A histogram answers with the upper end of what it cannot tell apart, and with 0 if it is empty.
        quantiles_ms = [min(histogram.get_value_at_percentile(percent) / 1e3, longest_ms) for percent in PERCENTS]
        return cls(
            count=len(values) + never,
            mean_ms=float(values.mean()) if len(values) else 0.0,
            p50_ms=quantiles_ms[0],
            p90_ms=quantiles_ms[1],
            p99_ms=quantiles_ms[2],
            p99_9_ms=quantiles_ms[3],
            max_ms=longest_ms,
            histogram=encode(histogram),
        )


def make_histogram(values_ms: ArrayLike, *, never: int = 0) -> HdrHistogram:
    """Return the histogram of times in ms, in microseconds."""
    histogram = HdrHistogram(1, _HIGHEST_US, _DIGITS)
    whole_us = np.clip(np.rint(1e3 * np.asarray(values_ms, np.float64)), 0, _HIGHEST_US).astype(np.int64)
    for value_us, count in zip(*np.unique(whole_us, return_counts=True), strict=True):
        histogram.record_value(int(value_us), int(count))
    if never:
        histogram.record_value(_HIGHEST_US, never)
    return histogram


def encode(histogram: HdrHistogram) -> str:
    """Return a histogram as text."""
    text: bytes = histogram.encode()
    return text.decode("ascii")


def decode(text: str) -> HdrHistogram:
    """Return the histogram that `encode` wrote."""
    return HdrHistogram.decode(text.encode("ascii"))


def counts(histogram: HdrHistogram) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the times in ms that a histogram holds, rising, and how often each."""
    # The library's own iterators are plain Python over all that a histogram could hold.
    often = np.array(histogram.counts, np.int64)
    held = np.flatnonzero(often)
    times_us = [histogram.get_highest_equivalent_value(histogram.get_value_from_index(int(i))) for i in held]
    return np.array(times_us, np.float64) / 1e3, often[held]


def together(texts: Iterable[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the times in ms that some histograms hold, rising, (V,), and how often each holds each, (N, V)."""
    tables = [counts(decode(text)) for text in texts]
    values = np.unique(np.concatenate([times for times, _ in tables])) if tables else np.zeros(0)
    counted = np.zeros((len(tables), len(values)), np.int64)
    for row, (times, often) in zip(counted, tables, strict=True):
        row[np.searchsorted(values, times)] = often
    return values, counted


def in_words(value_ms: float) -> str:
    """Return a time as tables print it, with its unit."""
    if value_ms >= NEVER_MS:
        return "never"
    if value_ms >= 10_000:
        return f"{value_ms / 1e3:,.1f} s"
    return f"{value_ms:,.0f} ms" if value_ms >= 100 else f"{value_ms:#.3g}".rstrip(".") + " ms"
