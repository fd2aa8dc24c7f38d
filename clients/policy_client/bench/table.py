"""Results in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from policy_client.bench.distribution import Distribution, in_words
from policy_client.bench.result import Result

HEAD = ("", "p50", "p90", "p99", "p99.9", "longest")


def headline(result: Result) -> str:
    """Return what was tested, in one line."""
    test = result.test
    robots = f"{test.robots} robot{'s' if test.robots > 1 else ''}"
    return (
        f"{test.policy or 'policy'} at {test.url}, {test.door} door: {robots}, "
        f"{test.arrivals} at {test.rate_hz:g} Hz, {test.seconds:g} s"
    )


def measured(result: Result) -> dict[str, Distribution]:
    """Return the distributions of a result by the names that tables and plots give them."""
    return {
        "latency": result.latency,
        "chunk age when acted on": result.chunk_age,
        "control loop jitter": result.jitter,
        **{f"stage: {name}": distribution for name, distribution in result.stages.items()},
        "test's own lateness": result.lateness,
    }


def quantiles(distribution: Distribution) -> tuple[str, ...]:
    """Return the cells of a distribution under `HEAD`."""
    values_ms = (
        distribution.p50_ms,
        distribution.p90_ms,
        distribution.p99_ms,
        distribution.p99_9_ms,
        distribution.max_ms,
    )
    return tuple(map(in_words, values_ms))


def tallies(result: Result) -> tuple[str, ...]:
    """Return what was counted, a sentence each."""
    lines = [
        f"{result.answered:,} of {result.asked:,} observations answered, {result.answers_per_s:,.1f} a second",
        f"{result.missed:,} ({result.missed_share:.2%}) not within {result.test.deadline_ms:g} ms",
        f"out of actions at {result.starved:.2%} of control steps",
    ]
    if result.superseded:
        lines.append(f"{result.superseded:,} answered by the chunk of a newer observation")
    if result.failures:
        failures = ", ".join(f"{name} {count:,}" for name, count in sorted(result.failures.items()))
        lines.append(f"never answered: {failures}")
    return tuple(lines)


def doubts(result: Result) -> tuple[str, ...]:
    """Return why the figures may not be the server's."""
    if result.lateness.p99_ms > max(1.0, 0.1 * result.latency.p99_ms):
        return (
            f"1 % of the observations were sent {in_words(result.lateness.p99_ms)} late or later: the machine that "
            "plays the robots is too slow for them. More --processes, another machine, or fewer robots.",
        )
    return ()


def lines(result: Result) -> list[str]:
    """Return a result for a terminal."""
    rows = [HEAD, *((name, *quantiles(distribution)) for name, distribution in measured(result).items())]
    notes = (*tallies(result), *(f"WARNING: {doubt}" for doubt in doubts(result)))
    return [headline(result), "", *aligned(rows), "", *notes]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines: the first column to the left, all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
