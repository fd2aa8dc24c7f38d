"""The robot's side of a policy server: no torch, no server, only numpy, msgpack and websockets.

from policy_client import ChunkPlayer, PolicyClient

with PolicyClient("ws://gpu-box:8000") as client:
    for action in ChunkPlayer(client, refill_s=0.3).run(robot.observe, rate_hz=20):
        robot.apply(action)
"""

from policy_client.aio import AsyncPolicyClient
from policy_client.backoff import Backoff
from policy_client.chunk import ActionChunk
from policy_client.client import PolicyClient
from policy_client.codec import DecodeError, pack, unpack
from policy_client.errors import (
    ConnectFailed,
    ConnectionLost,
    PolicyClientError,
    ProtocolError,
    RequestTimeout,
    ServerError,
)
from policy_client.player import ChunkBuffer, ChunkPlayer
from policy_client.protocol import InferOptions

__all__ = [
    "ActionChunk",
    "AsyncPolicyClient",
    "Backoff",
    "ChunkBuffer",
    "ChunkPlayer",
    "ConnectFailed",
    "ConnectionLost",
    "DecodeError",
    "InferOptions",
    "PolicyClient",
    "PolicyClientError",
    "ProtocolError",
    "RequestTimeout",
    "ServerError",
    "pack",
    "unpack",
]
