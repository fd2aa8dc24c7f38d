"""What a robot says and understands on a stream (docs/stream.md), without a socket.

Times are seconds of the robot's monotonic clock, given by the caller; on the wire they are nanoseconds of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from policy_client.chunk import ActionChunk
from policy_client.codec import pack
from policy_client.errors import ProtocolError, StreamRefusal
from policy_client.protocol import Frame, InferOptions, chosen_options, read_actions, read_map, read_step_s

PROTOCOL: Final = 1

Continuity: TypeAlias = str | Mapping[str, Any]


@dataclass(frozen=True)
class Reasoning:
    """What a policy thinks, in words.

    Attributes:
        number: Counts the session's reasonings from 1.
        text: From the first word on, as far as it has come.
        ended: Empty while it goes on; then "complete", "tokens" or "time" (the most that there may be of either), or
            "given".
    """

    number: int
    text: str
    ended: str


@dataclass(frozen=True)
class Received:
    """What one frame of the server means to the robot."""

    chunk: ActionChunk | None = None  # newer than any before it
    refusal: StreamRefusal | None = None
    pong: bytes | None = None  # to be sent at once
    set_again: bytes | None = None  # to be sent before the next observation
    reasoning: Reasoning | None = None  # of this episode
    ignored: bool = False  # a chunk that came twice, late or for an earlier episode


class StreamProtocol:
    """The robot's side of one session, over all its connections. Not for several threads.

    Args:
        name: What the server's logs and metrics call this robot, up to 64 characters.
        rate_hz: How many observations a second shall be answered; the server refuses what it cannot promise.
        deadline_s: A chunk that comes later than this after its observation is worthless.
        continuity: How a chunk goes on from the one before: a mode, or a map with `mode` and the mode's own keys.
        options: Sampling options of every observation that brings none; see `InferOptions`.

    Raises:
        TypeError: An option that does not exist.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        rate_hz: float | None = None,
        deadline_s: float | None = None,
        continuity: Continuity | None = None,
        options: InferOptions | None = None,
    ) -> None:
        self._wishes = {
            "name": name,
            "rate_hz": rate_hz,
            "deadline_ms": None if deadline_s is None else 1e3 * deadline_s,
            "continuity": continuity,
            "options": chosen_options(options) if options else None,
        }
        self.seq = 0  # of the newest observation
        self.episode = 0
        self.revision = 0  # of the newest `set`
        self.welcome: Mapping[str, Any] = {}
        self.newest: ActionChunk | None = None  # of this episode
        self._answered = 0  # seq of the newest chunk of any episode
        self._resume: str | None = None
        self._set: bytes | None = None
        self._set_after = 0  # seq of the last observation before the newest `set`

    def hello(self) -> bytes:
        """Return the first frame of a connection."""
        hello = {**self._wishes, "resume": self._resume}
        chosen = {name: value for name, value in hello.items() if value is not None}
        return pack({"type": "hello", "protocol": PROTOCOL, **chosen})

    def greet(self, frame: Frame) -> bytes | None:
        """Take in the server's first frame; return the `set` that must be sent before any observation, if any.

        Raises:
            StreamRefusal: The server refused the hello.
            ProtocolError: The frame is no welcome.
        """
        welcome = _read(frame)
        if welcome["type"] == "error":
            raise _refusal(welcome)
        if welcome["type"] != "welcome":
            raise ProtocolError(f"the server begins with {welcome['type']!r:.80}, expected a welcome")
        seq, episode = (_count(welcome, key, default=0) for key in ("seq", "episode"))
        token = welcome.get("resume")
        if token is not None and not isinstance(token, str):
            raise ProtocolError(f"the welcome's 'resume' is a {type(token).__name__}, expected a string")
        self.seq, self.episode = max(self.seq, seq), max(self.episode, episode)
        self.welcome, self._resume = welcome, token
        arrived = welcome.get("resumed") is True and self._answered > self._set_after
        return None if arrived else self._set

    def forget_session(self) -> None:
        """Begin a new session with the next hello, though this one may live on."""
        self._resume = None

    def observation(
        self,
        observation: Mapping[str, Any],
        *,
        captured_s: float,
        playing: int | None = None,
        delay_s: float | None = None,
        options: InferOptions | None = None,
    ) -> bytes:
        """Return the frame of the next observation; its number is `seq` from then on.

        Args:
            observation: The policy's inputs by name.
            captured_s: When it was true. The first action of the answer is due then.
            playing: Number of the observation whose chunk is being played, 0 for none. Default: the last chunk sent.
            delay_s: How long after `captured_s` the answer will begin to be played. Default: the server's estimate.
            options: Sampling options of this observation alone.

        Raises:
            TypeError, OverflowError: An unknown option, or something that cannot be sent; see `codec.pack`.
            ValueError: It cannot be sent, or is larger than the server takes.
        """
        message = {
            "type": "observation",
            "seq": self.seq + 1,
            "episode": self.episode,
            "captured_ns": round(1e9 * captured_s),
            "observation": observation,
        }
        if self.revision:
            message["revision"] = self.revision
        if chosen := chosen_options(options or {}):
            message["options"] = chosen
        if playing is not None:
            message["playing"] = playing
        if delay_s is not None:
            message["delay_ms"] = 1e3 * delay_s
        frame = pack(message)
        most = self.welcome.get("max_message_bytes")
        if isinstance(most, int) and len(frame) > most:  # the server would hang up, and so again each time
            raise ValueError(f"the observation takes {len(frame)} bytes, expected at most {most}")
        self.seq += 1
        return frame

    def set(self, inputs: Mapping[str, Any], options: InferOptions) -> bytes:
        """Return the frame of inputs and options that hold from the next observation on.

        Raises:
            TypeError, ValueError, OverflowError: As `observation`.
        """
        message: dict[str, Any] = {"type": "set", "revision": self.revision + 1}
        if inputs:
            message["inputs"] = inputs
        if chosen := chosen_options(options):
            message["options"] = chosen
        self._set = pack(message)
        self._set_after = self.seq
        self.revision += 1
        return self._set

    def reset(self) -> bytes:
        """Return the frame that ends the episode, and begin the next."""
        self.episode += 1
        self.newest = None
        return pack({"type": "reset", "episode": self.episode})

    def cancel(self) -> bytes:
        """Return the frame that gives up all observations so far."""
        return pack({"type": "cancel", "seq": self.seq})

    def bye(self) -> bytes:
        """Return the frame that ends the session; the next hello begins another."""
        self._resume = None
        return pack({"type": "bye"})

    def receive(self, frame: Frame, now_s: float) -> Received:
        """Take in a frame that came after the welcome, at `now_s`. Unknown messages mean nothing.

        A chunk's metadata is the rest of its message, `seq` among it, and `received_s`.

        Raises:
            ProtocolError: The frame is no message of this protocol. The conversation may go on.
        """
        message = _read(frame)
        match message["type"]:
            case "chunk":
                return self._chunk(message, now_s)
            case "error":
                refusal = _refusal(message)
                again = self._set if refusal.code == "unknown_revision" else None
                return Received(refusal=refusal, set_again=again)
            case "ping":
                pong = {"type": "pong", "sent_ns": _count(message, "sent_ns"), "robot_ns": round(1e9 * now_s)}
                return Received(pong=pack(pong))
            case "reasoning" if _count(message, "episode") == self.episode:
                text, ended = str(message.get("text", "")), str(message.get("ended", ""))
                return Received(reasoning=Reasoning(_count(message, "number"), text, ended))
            case _:
                return Received()

    def _chunk(self, message: dict[str, Any], now_s: float) -> Received:
        seq, episode = _count(message, "seq"), _count(message, "episode", default=0)
        if seq <= self._answered or episode != self.episode:
            return Received(ignored=True)
        made_at_s = 1e-9 * _count(message, "captured_ns")
        actions, step_s = read_actions(message.pop("actions", None)), read_step_s(message.pop("step_s", None))
        self._answered = seq
        del message["type"]
        self.newest = ActionChunk(actions, step_s, made_at_s, {**message, "received_s": now_s})
        return Received(chunk=self.newest)


def _read(frame: Frame) -> dict[str, Any]:
    if isinstance(frame, str):
        raise ProtocolError(f"the server sent the text {frame!r:.200}, expected a binary frame")
    message = read_map(frame, "message")
    if not isinstance(message.get("type"), str):
        raise ProtocolError(f"the message's 'type' is {message.get('type')!r:.80}, expected a string")
    return message


def _count(message: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = message.get(key, default)
    if type(value) is not int:
        raise ProtocolError(f"the {message['type']}'s {key!r} is {value!r:.80}, expected an integer")
    return value


def _refusal(message: Mapping[str, Any]) -> StreamRefusal:
    seq = message.get("seq")
    code, text = str(message.get("code", "internal")), str(message.get("message", ""))
    return StreamRefusal(code, text, seq if type(seq) is int else None)
