"""openpi's own websocket server, unmodified, over one of this project's bundles on one of its engines."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

# From the checkout that PYTHONPATH names; nothing of it is part of this project.
from openpi_client.base_policy import BasePolicy
from websocket_policy_server import WebsocketPolicyServer  # type: ignore[import-not-found]

from benchmarks.contenders import make_contender
from benchmarks.processes import HOST
from policy_models.spec import Observation
from policy_server.bundle import Bundle, load_bundle
from policy_server.golden import draw_observation

_WARM_UP = 20


class BundlePolicy(BasePolicy):  # type: ignore[misc]
    """Runs the bundle's program in this process. Checks nothing, which costs nothing."""

    def __init__(self, bundle: Bundle, contender: str) -> None:
        self._cameras = [camera.name for camera in bundle.spec.cameras]
        self._contender = make_contender(bundle, contender)
        draw = np.random.default_rng(0)
        for seed in range(_WARM_UP):
            self._contender.chunk(draw_observation(bundle.spec, draw), seed)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Answer one observation."""
        images = {name: obs[name] for name in self._cameras}
        observation = Observation(images, obs.get("state"), obs.get("goal", obs.get("prompt")))
        seed = obs["options"]["seed"]
        return {"actions": self._contender.chunk(observation, seed), "seed": seed}

    def reset(self) -> None:
        """Nothing to forget."""


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="policy to serve")
    parser.add_argument("--contender", required=True, help="what computes, as benchmarks.contenders calls it")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    arguments = parser.parse_args()
    policy = BundlePolicy(load_bundle(arguments.bundle), arguments.contender)
    WebsocketPolicyServer(policy, HOST, arguments.port).serve_forever()


if __name__ == "__main__":
    main()
