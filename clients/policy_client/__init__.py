"""The robot's side of a policy server: no torch, no server, only numpy, msgpack and websockets.

from policy_client import ChunkPlayer, PolicyStream

with PolicyStream("ws://gpu-box:8000/v1/policies/point-maze/stream") as stream:
    for action in ChunkPlayer(stream, interpolate=True).run(robot.observe, rate_hz=50):
        robot.apply(action)
"""

from policy_client.aio import AsyncPolicyClient
from policy_client.backoff import Backoff
from policy_client.buffer import ChunkBuffer
from policy_client.chunk import ActionChunk
from policy_client.client import PolicyClient
from policy_client.codec import DecodeError, pack, unpack
from policy_client.errors import (
    ConnectFailed,
    ConnectionLost,
    OutOfActions,
    PolicyClientError,
    ProtocolError,
    RequestTimeout,
    ServerError,
    StreamRefusal,
)
from policy_client.latency import LatencyQuantile
from policy_client.playback import PlayerState, PlayerStats
from policy_client.player import ChunkPlayer
from policy_client.protocol import InferOptions
from policy_client.sources import Arrival, ChunkSource, Request
from policy_client.stream import PolicyStream
from policy_client.stream_state import StreamState, StreamStats
from policy_client.watchdog import Call, Hold, RampTo, RampToZero, StopRule

__all__ = [
    "ActionChunk",
    "Arrival",
    "AsyncPolicyClient",
    "Backoff",
    "Call",
    "ChunkBuffer",
    "ChunkPlayer",
    "ChunkSource",
    "ConnectFailed",
    "ConnectionLost",
    "DecodeError",
    "Hold",
    "InferOptions",
    "LatencyQuantile",
    "OutOfActions",
    "PlayerState",
    "PlayerStats",
    "PolicyClient",
    "PolicyClientError",
    "PolicyStream",
    "ProtocolError",
    "RampTo",
    "RampToZero",
    "Request",
    "RequestTimeout",
    "ServerError",
    "StopRule",
    "StreamRefusal",
    "StreamState",
    "StreamStats",
    "pack",
    "unpack",
]
