"""How many robots a server carries: a search over load tests. Pure: what a test is, the caller says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One number of robots, and whether they were served as demanded."""

    robots: int
    held: bool


@dataclass(frozen=True)
class Capacity:
    """What a search found.

    Attributes:
        robots: The most robots that were served as demanded; 0 if not even one was.
        bounded: Whether one more, or a few more, were tried and were not served; if not, the search ended at its limit.
        trials: All that was tried, in order.
    """

    robots: int
    bounded: bool
    trials: tuple[Trial, ...]


def find_capacity(holds: Callable[[int], bool], limit: int) -> Capacity:
    """Search the most robots, up to `limit`, for which `holds`: doubling first, then halving the gap.

    A number that fails is tried once more before it is believed, since one hiccup of a machine must not decide a
    search. A machine that is slow now and then still makes the outcome vary from search to search.
    """
    trials: list[Trial] = []

    def held(robots: int) -> bool:
        for _ in range(2):
            trials.append(Trial(robots, holds(robots)))
            if trials[-1].held:
                return True
        return False

    good, bad = 0, limit + 1
    robots = 1
    while good < limit and bad - good > 1:
        if held(robots):
            good = robots
        else:
            bad = robots
        robots = min(2 * good, limit) if bad > limit else (good + bad) // 2
    return Capacity(good, bad <= limit, tuple(trials))
