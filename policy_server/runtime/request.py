"""One observation on its way to a chunk, and what is asked besides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policy_server.runtime.continuity import Continuity
from policy_server.runtime.options import DEFAULT_OPTIONS, RequestOptions


@dataclass(frozen=True)
class Timing:
    """When an observation was captured, by a clock that its session keeps to, and when its chunk will be played.

    Attributes:
        captured_at_s: When the observation was true. Row 0 of the chunk is due then.
        delay_s: How long after that the robot begins to play the chunk; it plays the one before until then.
        playing: Number of the observation whose chunk the robot is playing; None for the last one that was sent.
        seq: Number of this observation.
    """

    captured_at_s: float
    delay_s: float
    playing: int | None = None
    seq: int = 0


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        inputs: The policy's inputs by wire name, as the robot sent them.
        options: What is asked of the sampler, and by when.
        continuity: How the chunk goes on from the session's last one; None for the way of `options`, or the server's.
        timing: None for a robot that stands and waits: row 0 is due when the answer reaches it.
        tenant: Who pays for it.
    """

    inputs: Mapping[str, Any]
    options: RequestOptions = DEFAULT_OPTIONS
    continuity: Continuity | None = None
    timing: Timing | None = None
    tenant: str = ""
