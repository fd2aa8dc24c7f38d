"""Flights, evaluated: how far does the robot get in held-out spaces before it touches something?"""

from contextlib import closing

import numpy as np

from policy_client import PolicyClient
from policy_sim.flights import CAMERA, Flights
from policy_sim.trial import TrialResult

_LIMIT_STEPS = 600  # 60 s


class FlightsTrial:
    """Flies once in each held-out space; a minute without a collision is a success."""

    def run(self, client: PolicyClient, seed: int) -> TrialResult:
        """Fly until something is touched or the minute is over, one action of each chunk."""
        client.reset()
        with closing(Flights(seed, held_out=True)) as world:
            for step in range(_LIMIT_STEPS):
                chunk = client.infer({CAMERA: world.image()}, seed=1_000 * seed + step)
                collided = world.step(chunk.actions[0])
                if collided:
                    break
            measures = {"flown_m": float(world.flown_m), "flown_s": float(world.elapsed_s)}
        return TrialResult(seed, "held-out space", not collided, measures, np.stack(world.path)[:, :2])

    def close(self) -> None:
        """There is nothing to free: each space ended with its flight."""
