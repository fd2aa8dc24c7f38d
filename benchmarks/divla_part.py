"""What each part of the DiVLA benchmark adds to its page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.result import Bar, Series, ms

COLUMNS = ("", "what", "p50 ms", "p99 ms", "a second", "compared")
# With fewer, the 99th of a hundred is not known.
_FOR_P99 = 100

Rounds = list[list[float]]  # ms, by round


@dataclass(frozen=True)
class Part:
    """Rows of `COLUMNS`, and the rest as in `Result`."""

    rows: tuple[tuple[str, ...], ...]
    series: tuple[Series, ...] = ()
    bars: tuple[Bar, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def row(who: str, what: str, rounds: Rounds, *, count: int = 1, compared: str = "") -> tuple[str, ...]:
    """Return a row of `COLUMNS`.

    Args:
        who: The contender.
        what: Was timed.
        rounds: How long it took.
        count: How many were done in one such time.
        compared: With what, in words.
    """
    times_ms = np.concatenate([np.asarray(times) for times in rounds])
    p50, p99 = np.percentile(times_ms, (50, 99))
    return who, what, ms(p50), ms(p99) if len(times_ms) >= _FOR_P99 else "", f"{1e3 * count / p50:.3g}", compared


def role(name: str, ours: str, references: Sequence[str]) -> str:
    """Return what a contender is in a picture."""
    return "ours" if name == ours else "reference" if name in references else "peer"


def join(parts: Sequence[Part]) -> Part:
    """Return several parts as one."""
    return Part(
        tuple(row for part in parts for row in part.rows),
        tuple(series for part in parts for series in part.series),
        tuple(bar for part in parts for bar in part.bars),
        {topic: text for part in parts for topic, text in part.facts.items()},
    )
