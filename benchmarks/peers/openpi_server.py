"""openpi's own websocket server, unmodified, over a policy that computes for a given time and repeats the state."""

import argparse
import time
from typing import Any

import numpy as np

# From the checkout that PYTHONPATH names; nothing of it is part of this project.
from openpi_client.base_policy import BasePolicy
from websocket_policy_server import WebsocketPolicyServer  # type: ignore[import-not-found]

from benchmarks.payload import HORIZON, JOINTS
from benchmarks.processes import HOST


class Stand(BasePolicy):  # type: ignore[misc]
    """Computes for `work_ms`, then answers with as many bytes as this project's server."""

    def __init__(self, work_ms: float) -> None:
        self._work_ms = work_ms
        self._matrix = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Answer one observation."""
        started_at_s = time.perf_counter()
        while 1e3 * (time.perf_counter() - started_at_s) < self._work_ms:
            self._matrix @ self._matrix
        return {
            "actions": np.repeat(obs["state"][None, :JOINTS].astype(np.float32), HORIZON, axis=0),
            "policy_timing": {"infer_ms": 1e3 * (time.perf_counter() - started_at_s)},
            "policy": "hold",
            "engine": "openvino",
            "step_s": 0.05,
            "seed": 1 << 62,
            "clamped": 0,
        }

    def reset(self) -> None:
        """Nothing to forget."""


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--work-ms", type=float, default=0.0, help="how long the policy computes for one chunk")
    parser.add_argument("--metadata-bytes", type=int, default=0, help="size of the first message")
    arguments = parser.parse_args()
    # A map with one string: 1 byte each for map and key header, 1 for the key, 3 for the string's header.
    metadata = {"x": " " * max(0, arguments.metadata_bytes - 6)}
    WebsocketPolicyServer(Stand(arguments.work_ms), HOST, arguments.port, metadata).serve_forever()


if __name__ == "__main__":
    main()
