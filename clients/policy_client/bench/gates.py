"""What a result must reach for a CI job to pass."""

from __future__ import annotations

from dataclasses import dataclass

from policy_client.bench.distribution import in_words
from policy_client.bench.result import Result


@dataclass(frozen=True)
class Gates:
    """Bounds on a result; None where there is none.

    Attributes:
        max_p99_ms: Highest p99 of the latency.
        max_missed: Highest share of observations that were not answered by the deadline.
    """

    max_p99_ms: float | None = None
    max_missed: float | None = None

    def broken(self, result: Result) -> list[str]:
        """Return what a result does not reach, a sentence each."""
        sentences = []
        if not result.asked:
            sentences.append("no observation was due, so nothing was shown")
        if self.max_p99_ms is not None and result.latency.p99_ms > self.max_p99_ms:
            sentences.append(f"p99 is {in_words(result.latency.p99_ms)}, allowed {in_words(self.max_p99_ms)}")
        if self.max_missed is not None and result.missed_share > self.max_missed:
            sentences.append(f"{result.missed_share:.3%} missed the deadline, allowed {self.max_missed:.3%}")
        return sentences


def read_share(text: str) -> float:
    """Read a share: `1%` or `0.01`.

    Raises:
        ValueError: It is none.
    """
    share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= share <= 1:
        raise ValueError(f"a share is from 0 to 1, or from 0% to 100%, got {text!r}")
    return share
