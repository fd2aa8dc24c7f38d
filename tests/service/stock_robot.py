"""Drives an episode with nothing but the unmodified openpi client; runs in an environment of its own.

Usage: python stock_robot.py PORT STEPS; prints JSON.
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port, steps = map(int, sys.argv[1:])
policy = WebsocketClientPolicy("127.0.0.1", port)
metadata = policy.get_server_metadata()
broker = ActionChunkBroker(policy, action_horizon=metadata["horizon"])
observation = {
    "observation/state": np.array([0.5, -0.25, 0.1, 0.0], np.float32),
    "goal": np.array([1.0, -1.0, 0.0, 0.0], np.float32),
    "prompt": "go there",
    "options": {"seed": 7},
}
actions = [broker.infer(observation)["actions"].tolist() for _ in range(steps)]
broker.reset()
try:
    policy.infer({"stat": np.zeros(4)})
    complaint = ""
except RuntimeError as error:
    complaint = str(error)
print(json.dumps({"metadata": metadata, "actions": actions, "complaint": complaint}))
