"""What client and server say to each other: openpi's websocket protocol, without a socket.

The server speaks first, a map of metadata; then each request frame has one reply frame, in order. Binary
frames hold maps in the dialect of `codec`; a text frame is an error, except for the answer to a reset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeAlias, TypedDict

import numpy as np

from policy_client.chunk import Action, ActionChunk
from policy_client.codec import DecodeError, pack, unpack
from policy_client.errors import ProtocolError, ServerError

Frame: TypeAlias = bytes | str


class InferOptions(TypedDict, total=False):
    """What a request may ask for besides an answer; what is left out, or None, is the policy's own choice."""

    steps: int | None  # denoising steps
    guidance: float | None
    seed: int | None
    sampler: str | None
    budget_ms: float | None  # the server refuses what it cannot answer within this time
    continuity: str | Mapping[str, Any] | None  # how the chunk goes on from the one before: a mode, or a map with it
    captured_ms: float | None  # when the observation was true, by the robot's clock; row 0 is due then
    delay_ms: float | None  # how long after that the robot begins to play the chunk, and ends the one before
    reasoning: str | Mapping[str, Any] | None  # what a policy that reasons acts on: a mode, or a map with it
    smoothing: Mapping[str, Any] | None  # the chunk is the mean over copies of the observation with noise


class PolicyProtocol:
    """Turns requests into frames, and frames into replies or errors.

    Args:
        step_s: Time between actions, in place of what the server says.

    Raises:
        ValueError: `step_s` is not positive.
    """

    def __init__(self, step_s: float | None = None) -> None:
        if step_s is not None and not _is_duration(step_s):
            raise ValueError(f"step_s is {step_s!r}, expected a positive number of seconds")
        self.metadata: Mapping[str, Any] = {}
        self._step_s = step_s

    def greet(self, frame: Frame) -> None:
        """Take in the first frame of a connection, the server's metadata.

        Raises:
            ServerError: The server sent an error in its place.
            ProtocolError: The frame is no map.
        """
        self.metadata = read_map(frame, "metadata")

    def infer_request(self, observation: Mapping[str, Any], options: InferOptions) -> bytes:
        """Return the frame that asks for a chunk.

        Raises:
            TypeError, ValueError: An unknown option, or an observation that cannot be sent; see `codec.pack`.
        """
        chosen = chosen_options(options)
        if not chosen:
            return pack(observation)
        if "options" in observation:
            raise ValueError("the observation has a key 'options', which is reserved for the options of the request")
        return pack({**observation, "options": chosen})

    def infer_reply(self, frame: Frame, made_at_s: float) -> ActionChunk:
        """Return the chunk that answers an observation of time `made_at_s`.

        Raises:
            ServerError: The server sent an error.
            ProtocolError: The frame holds no usable chunk.
        """
        reply = read_map(frame, "reply")
        actions = read_actions(reply.pop("actions", None))
        said_s = reply.pop("step_s", self.metadata.get("step_s"))
        return ActionChunk(actions, self._step_s or read_step_s(said_s), made_at_s, reply)

    def reset_request(self) -> bytes:
        """Return the frame that ends the episode, in RoboArena's dialect."""
        return pack({"endpoint": "reset"})

    def reset_reply(self, frame: Frame) -> None:
        """Take in the answer to a reset.

        Raises:
            ServerError: The server sent an error, as a stock openpi server does: it knows no reset.
            ProtocolError: The answer is a binary frame.
        """
        if not isinstance(frame, str):
            raise ProtocolError(f"the answer to a reset is {len(frame)} bytes, expected the text {_RESET_DONE!r}")
        if frame != _RESET_DONE:
            raise ServerError(frame)


_RESET_DONE = "reset successful"


def chosen_options(options: InferOptions) -> dict[str, Any]:
    """Return the options that are not None, as plain values.

    Raises:
        TypeError: An option that does not exist.
    """
    unknown = options.keys() - InferOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}, expected {sorted(InferOptions.__annotations__)}")
    return {name: _plain(value) for name, value in options.items() if value is not None}


def read_map(frame: Frame, name: str) -> dict[str, Any]:
    """Return the map in a frame that holds what is called `name`.

    Raises:
        ServerError: The frame is text: an error.
        ProtocolError: The frame holds no map.
    """
    if isinstance(frame, str):
        raise ServerError(frame)
    try:
        value = unpack(frame)
    except DecodeError as error:
        raise ProtocolError(f"the {name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the {name} is a {type(value).__name__}, expected a map")
    return value


def read_actions(value: Any) -> Action:
    """Return the actions of a reply, (H, A) float32, read-only.

    Raises:
        ProtocolError: It is no finite numeric array of that rank.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ProtocolError(f"the reply's 'actions' is {_describe(value)}, expected a numeric array (H, A)")
    if value.ndim != 2 or value.size == 0:
        raise ProtocolError(f"the reply's 'actions' has shape {value.shape}, expected (H, A)")
    with np.errstate(over="ignore"):  # refused just below
        actions = value.astype(np.float32, copy=False)
    if not np.isfinite(actions).all():
        raise ProtocolError("the reply's 'actions' holds values that are not finite")
    actions.flags.writeable = False
    return actions


def read_step_s(value: Any) -> float:
    """Return the time between actions in seconds.

    Raises:
        ProtocolError: It is missing, or no positive number.
    """
    if value is None:
        raise ProtocolError("the server does not say its step_s, give step_s to the client")
    if not _is_duration(value):
        raise ProtocolError(f"the server's step_s is {_describe(value)}, expected a positive number of seconds")
    return float(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_duration(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and 0 < float(value) < math.inf


def _describe(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"{value!r:.80}"
