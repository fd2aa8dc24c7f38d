"""The frames that wait for the network."""

from __future__ import annotations

from typing import NamedTuple


class Waiting(NamedTuple):
    """A frame that waits to be sent."""

    kind: str
    frame: bytes


class Outbox:
    """Holds at most one frame of each kind: a newer one takes the place of the one before. Not for several threads."""

    def __init__(self) -> None:
        self._frames: dict[str, bytes] = {}  # in the order of sending

    def __bool__(self) -> bool:
        """Return whether anything waits."""
        return bool(self._frames)

    def put(self, kind: str, frame: bytes) -> bool:
        """Add a frame behind the others; return whether it supersedes one of its kind."""
        superseded = self.discard(kind)
        self._frames[kind] = frame
        return superseded

    def put_first(self, kind: str, frame: bytes) -> None:
        """Add a frame before the others, in place of one of its kind."""
        self.discard(kind)
        self._frames = {kind: frame, **self._frames}

    def discard(self, kind: str) -> bool:
        """Give up the frame of a kind; return whether there was one."""
        return self._frames.pop(kind, None) is not None

    def pop(self) -> Waiting | None:
        """Take the first frame out, None if there is none."""
        if not self._frames:
            return None
        kind = next(iter(self._frames))
        return Waiting(kind, self._frames.pop(kind))
