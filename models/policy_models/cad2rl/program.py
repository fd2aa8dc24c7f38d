"""CAD2RL's agent: one look, one velocity."""

import numpy as np

from policy_models.cad2rl.config import Cad2rlConfig
from policy_models.cad2rl.steering import steer
from policy_models.directions import CollisionSpec
from policy_models.program import Dialogue, GraphCall, Outcome, Tensors
from policy_models.spec import Observation, PolicySpec, SamplingOptions


class Cad2rlProgram:
    """From an image to a velocity, over one graph: `look`."""

    def __init__(self, spec: PolicySpec, config: Cad2rlConfig, directions: CollisionSpec) -> None:
        self.spec = spec
        self.config = config
        self.directions = directions

    def begin(self) -> Tensors:
        """It looks at the newest image alone."""
        return {}

    def infer(self, observation: Observation, memory: Tensors, options: SamplingOptions) -> Dialogue:
        """Answer one image with the same velocity for every step of the chunk."""
        image = observation.images[self.directions.camera]
        answer = yield GraphCall("look", {"image": image[None]})
        collision = answer["collision"][0]
        velocity = steer(collision, self.directions, self.config.steering)
        return Outcome(np.tile(velocity, (self.spec.horizon, 1)), memory, collision=collision)
