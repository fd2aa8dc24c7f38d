"""What robots say in the streaming protocol, checked."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policy_client.codec import DecodeError, unpack
from policy_server.errors import MalformedMessage

PROTOCOL = 1

_Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
_Number = Annotated[int, Field(ge=1, lt=2**63, strict=True)]
_Nanoseconds = Annotated[int, Field(gt=-(2**63), lt=2**63, strict=True)]
_Milliseconds = Annotated[float, Field(ge=0, le=600_000, allow_inf_nan=False)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hello(_Message):
    """Opens the conversation."""

    protocol: Annotated[int, Field(strict=True)]
    name: str = Field("", max_length=64)
    resume: str | None = Field(None, max_length=128)
    rate_hz: float | None = Field(None, gt=0, le=100_000, allow_inf_nan=False)
    deadline_ms: float | None = Field(None, gt=0, le=600_000, allow_inf_nan=False)
    options: dict[str, Any] | None = None
    continuity: str | dict[str, Any] | None = None


class Observe(_Message):
    """An observation."""

    seq: _Number
    captured_ns: _Nanoseconds
    observation: dict[str, Any]
    episode: _Count = 0
    revision: _Count = 0
    options: dict[str, Any] | None = None
    playing: _Count | None = None
    delay_ms: _Milliseconds | None = None


class Set(_Message):
    """Inputs and options that hold from now on."""

    revision: _Number
    inputs: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] | None = None


class Reset(_Message):
    """An episode is over."""

    episode: _Count


class Cancel(_Message):
    """Observations up to this one need no answer any more."""

    seq: _Count


class Pong(_Message):
    """Answers a ping."""

    sent_ns: _Nanoseconds
    robot_ns: _Nanoseconds


class Bye(_Message):
    """The session is over."""


Message = Hello | Observe | Set | Reset | Cancel | Pong | Bye

_KINDS: Mapping[str, type[Message]] = {
    "hello": Hello,
    "observation": Observe,
    "set": Set,
    "reset": Reset,
    "cancel": Cancel,
    "pong": Pong,
    "bye": Bye,
}


class NotOfThisProtocol(MalformedMessage):
    """The bytes are no message of this protocol at all, so nothing that follows can be trusted."""


def read_message(data: bytes | None) -> Message:
    """Return the message that a frame holds.

    Raises:
        NotOfThisProtocol: The frame is text, or no msgpack map with a known type.
        MalformedMessage: The message has a key that it must not have, lacks one, or has a wrong value under one.
    """
    if data is None:
        raise NotOfThisProtocol("got a text frame, expected a binary frame with a msgpack map")
    try:
        raw = unpack(data)
    except DecodeError as error:
        raise NotOfThisProtocol(str(error)) from error
    kind = raw.pop("type", None) if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise NotOfThisProtocol(f"a message has a 'type', one of {', '.join(_KINDS)}; got {kind!r:.80}")
    try:
        return _KINDS[kind].model_validate(raw)
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join((kind, *map(str, details["loc"])))
        raise MalformedMessage(f"{where!r}: {details['msg']}") from error
