"""The chunk that is being played."""

from __future__ import annotations

from policy_client.chunk import Action, ActionChunk


class ChunkBuffer:
    """Holds the newest chunk. Times are monotonic seconds, given by the caller. Not for several threads.

    Args:
        interpolate: Whether actions between two rows lie on the line between them, in place of the earlier one.
    """

    def __init__(self, *, interpolate: bool = False) -> None:
        self.chunk: ActionChunk | None = None
        self._read = ActionChunk.action_between if interpolate else ActionChunk.action_at

    def push(self, chunk: ActionChunk) -> bool:
        """Take `chunk` for the one held, unless it answers an older observation; return whether taken."""
        if self.chunk is not None and chunk.made_at_s < self.chunk.made_at_s:
            return False
        self.chunk = chunk
        return True

    def action_at(self, now_s: float) -> Action | None:
        """Return the action due at `now_s`, (A,), or None before any chunk and once it has run out."""
        return None if self.chunk is None else self._read(self.chunk, now_s)

    def remaining_s(self, now_s: float) -> float:
        """Return for how long from `now_s` actions will be due, 0 if none is."""
        return 0.0 if self.chunk is None else max(0.0, self.chunk.ends_at_s - now_s)
