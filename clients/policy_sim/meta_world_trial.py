"""Meta-World, evaluated: are the six tasks done as they are told?"""

import contextlib
from itertools import chain

from policy_client import PolicyClient
from policy_sim.meta_world import STEP_S, MetaWorld
from policy_sim.meta_world_demo import over_the_network
from policy_sim.meta_world_demos import FIRST_HELD_OUT_SEED
from policy_sim.meta_world_episode import run_episode
from policy_sim.meta_world_tasks import SCENES, TASKS, other_task
from policy_sim.trial import TrialResult

_ORDER = tuple(chain.from_iterable(scene.tasks for scene in SCENES.values()))


class MetaWorldTrial:
    """Takes the six tasks in turn, each from held-out beginnings."""

    def __init__(self) -> None:
        self._worlds: dict[str, MetaWorld] = {}
        self._open = contextlib.ExitStack()

    def run(self, client: PolicyClient, seed: int) -> TrialResult:
        """Do one task: seeds count through the tasks, and through the beginnings once all had their turn."""
        beginning, number = divmod(seed, len(_ORDER))
        task = _ORDER[number]
        episode = run_episode(
            self._world(TASKS[task].scene),
            over_the_network(client, seed=seed),
            instruction=TASKS[task].phrases[0],
            seed=FIRST_HELD_OUT_SEED + beginning,
        )
        done = episode.succeeded(task)
        measures: dict[str, float] = {"did_the_opposite": episode.succeeded(other_task(task))}
        if done:
            measures["time_s"] = STEP_S * episode.steps
        return TrialResult(seed, task, done, measures)

    def close(self) -> None:
        """Free the cameras of all scenes."""
        self._open.close()

    def _world(self, scene: str) -> MetaWorld:
        if scene not in self._worlds:
            self._worlds[scene] = self._open.enter_context(MetaWorld(scene))
        return self._worlds[scene]
