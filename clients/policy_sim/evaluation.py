"""What an evaluation found: the episodes so far, and what they say with how much certainty."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policy_sim.success import bootstrap, wilson
from policy_sim.trial import TrialResult


@dataclass
class Evaluation:
    """The episodes of one policy in one simulator.

    Attributes:
        policy: Its name.
        version: Of the policy.
        simulator: Name of the simulator.
        planned: Episodes that were asked for.
        first_seed: Seed of the first episode; the others count on from it.
        parallel: Episodes that ran at the same time.
        results: The episodes that came to their end, by seed.
        failure: Why there are fewer than planned; None if there are not.
    """

    policy: str
    version: str
    simulator: str
    planned: int
    first_seed: int
    parallel: int
    results: list[TrialResult] = field(default_factory=list)
    failure: str | None = None

    def summary(self) -> dict[str, Any]:
        """Return the rates and means with their 95 % intervals, as they are written to JSON."""
        return {
            "policy": self.policy,
            "version": self.version,
            "simulator": self.simulator,
            "planned": self.planned,
            "episodes": len(self.results),
            "first_seed": self.first_seed,
            "parallel": self.parallel,
            "failure": self.failure,
            "success": rate([result.success for result in self.results]),
            "by_group": {name: rate([r.success for r in group]) for name, group in self.groups().items()},
            "measures": {name: mean(values) for name, values in self.measures().items()},
            "trials": [{"seed": r.seed, "group": r.group, "success": r.success, **r.measures} for r in self.results],
        }

    def groups(self) -> dict[str, list[TrialResult]]:
        """Return the episodes by kind of task."""
        return {
            name: [result for result in self.results if result.group == name]
            for name in sorted({result.group for result in self.results})
        }

    def measures(self) -> dict[str, list[float]]:
        """Return the numbers of the episodes by name; not every episode has all of them."""
        names = dict.fromkeys(name for result in self.results for name in result.measures)
        return {name: [r.measures[name] for r in self.results if name in r.measures] for name in names}


def rate(successes: Sequence[bool]) -> dict[str, Any] | None:
    """Return a rate with its Wilson interval; None of no episodes."""
    if not successes:
        return None
    low, high = wilson(sum(successes), len(successes))
    return {
        "rate": round(sum(successes) / len(successes), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "of": len(successes),
    }


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Return a mean with its bootstrap interval, and the median; the mean of truth values is a rate, with Wilson's."""
    is_rate = all(isinstance(value, bool) for value in values)
    low, high = wilson(int(sum(values)), len(values)) if is_rate else bootstrap(values)
    return {
        "mean": round(float(np.mean(values)), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "median": round(float(np.median(values)), 4),
        "of": len(values),
    }
