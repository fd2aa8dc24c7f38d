"""What every simulator's episode looks like to an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from policy_client import PolicyClient


@dataclass(frozen=True)
class TrialResult:
    """What came of one episode.

    Attributes:
        seed: Of the episode, and of the chunks in it.
        group: What kind of task it was, such as "drawer-open"; simulators with one kind have one group.
        success: Whether the task was done.
        measures: Numbers by name, with the unit in the name, and truth values, which are reported as rates. One that
            has no meaning for this episode, such as the time to a goal that was not reached, is left out.
        path: Where the robot went seen from above, (N, 2) metres; None where that tells nothing.
    """

    seed: int
    group: str
    success: bool
    measures: Mapping[str, float]
    path: np.ndarray | None = field(default=None, compare=False)


class Trial(Protocol):
    """A simulator that can be evaluated: one world, in which episodes are run one after another.

    An evaluation makes one for each of its threads, and uses it in that thread only.
    """

    def run(self, client: PolicyClient, seed: int) -> TrialResult:
        """Run one episode, whose task and beginning `seed` decides; equal seeds give equal tasks.

        Raises:
            PolicyClientError: The server refused, or is gone.
            ValueError: It answered with something that is no chunk for this robot.
        """

    def close(self) -> None:
        """Free the world."""
