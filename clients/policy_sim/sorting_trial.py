"""The sorting table, evaluated: are orders carried out, and is what the policy says on the way right?"""

from policy_client import PolicyClient
from policy_sim.sorting import Sorting
from policy_sim.sorting_closed_loop import over_the_network
from policy_sim.sorting_episode import run_episode
from policy_sim.sorting_scene import FIRST_HELD_OUT_SEED, STEP_S, draw_task
from policy_sim.trial import TrialResult


class SortingTrial:
    """Takes orders of combinations that were trained (even seeds) and of those held out (odd seeds)."""

    def __init__(self) -> None:
        self._world = Sorting(draw_task(FIRST_HELD_OUT_SEED))

    def run(self, client: PolicyClient, seed: int) -> TrialResult:
        """Carry out one order."""
        number, held_out = divmod(seed, 2)
        task = draw_task(FIRST_HELD_OUT_SEED + number, held_out=bool(held_out))
        episode = run_episode(self._world, over_the_network(client, seed=seed), task)
        measures = {}
        if episode.succeeded:
            measures["time_s"] = STEP_S * episode.steps
        said = [asked.right for asked in episode.asked if asked.right is not None]
        if said:
            measures["reasoning_right"] = sum(said) / len(said)
        return TrialResult(seed, "held-out" if held_out else "trained", episode.succeeded, measures)

    def close(self) -> None:
        """Free the camera."""
        self._world.close()
