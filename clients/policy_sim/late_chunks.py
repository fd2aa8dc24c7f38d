"""Playing chunks that arrive late, tick by tick: one class for each way. No clock and no socket in here.

A tick is one control step. A chunk is asked for with the observation of one tick and arrives `delay` ticks later; row 0
is due at the tick for which the observation is true.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Observation = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What whoever answers an observation is told besides it.

    Attributes:
        tick: When row 0 of the answer is due.
        delay: How many ticks after that the answer begins to be played; the chunk before is played until then.
    """

    tick: int
    delay: int


Infer = Callable[[Observation, Question], np.ndarray]  # -> (H, A) actions
Observe = Callable[[], Observation]
Rest = Callable[[np.ndarray | None], np.ndarray]  # last action given (A,), if any -> action of a robot that stands (A,)


@dataclass(frozen=True)
class Joint:
    """Where one chunk took over from another.

    Attributes:
        left: Tick of the last action of the old chunk.
        tick: Tick of the first action of the new one; the robot stood in between.
        disagreement: The new chunk's action for that moment less the old one's, (A,); None if the old one had none.
    """

    left: int
    tick: int
    disagreement: np.ndarray | None


@dataclass
class Record:
    """What a player gave the robot.

    Attributes:
        actions: One for each tick, (A,) each.
        stalls: How many ticks had no action of a chunk.
        joints: Every change from one chunk to the next.
    """

    actions: list[np.ndarray] = field(default_factory=list)
    stalls: int = 0
    joints: list[Joint] = field(default_factory=list)

    @property
    def last(self) -> np.ndarray | None:
        """The last action that was given."""
        return self.actions[-1] if self.actions else None


class Player(Protocol):
    """A way of playing chunks; one for each episode."""

    record: Record

    def act(self, observe: Observe) -> np.ndarray:
        """Return the action of the next tick, (A,); `observe` is called if a chunk is asked for."""


@dataclass(frozen=True)
class _Chunk:
    actions: np.ndarray
    due: int  # tick of row 0
    arrives: int


class StandAndWait:
    """Plays the first actions of a chunk, asks for the next, and stands until it comes: openpi's ActionChunkBroker."""

    def __init__(self, infer: Infer, rest: Rest, *, delay: int, execute: int) -> None:
        """Args: rest is what a robot that stands is given; execute is how many actions of each chunk are played."""
        self.record = Record()
        self._infer, self._rest = infer, rest
        self._delay, self._execute = delay, execute
        self._before: _Chunk | None = None
        self._chunk: _Chunk | None = None

    def act(self, observe: Observe) -> np.ndarray:
        """See `Player.act`."""
        tick, record = len(self.record.actions), self.record
        if self._chunk is None or tick == self._chunk.due + min(self._execute, len(self._chunk.actions)):
            due = tick + self._delay  # nothing moves until then, so it is told to be true then
            self._before = self._chunk
            self._chunk = _Chunk(self._infer(observe(), Question(due, 0)), due, due)
        if tick < self._chunk.due:
            record.stalls += 1
            record.actions.append(self._rest(record.last))
        else:
            if tick == self._chunk.due and self._before is not None:
                record.joints.append(self._joint(self._before, self._chunk))
            record.actions.append(self._chunk.actions[tick - self._chunk.due])
        return record.actions[-1]

    def _joint(self, before: _Chunk, chunk: _Chunk) -> Joint:
        asked = chunk.due - self._delay
        old = before.actions[asked - before.due : asked - before.due + 1]
        return Joint(asked - 1, chunk.due, chunk.actions[0] - old[0] if len(old) else None)


class AskAhead:
    """Asks every few ticks and plays on; a chunk takes over when it comes, at the row that is due."""

    def __init__(self, infer: Infer, rest: Rest, *, delay: int, every: int) -> None:
        """Args: rest is what the robot is given while it has no action; every is the ticks from question to question.

        If `every` is less than `delay`, several questions are on their way at the same time.
        """
        self.record = Record()
        self._infer, self._rest = infer, rest
        self._delay, self._every = delay, every
        self._ask_at = 0
        self._coming: deque[_Chunk] = deque()
        self._chunk: _Chunk | None = None
        self._left = 0

    def act(self, observe: Observe) -> np.ndarray:
        """See `Player.act`."""
        tick, record = len(self.record.actions), self.record
        if tick == self._ask_at:
            self._ask(tick, observe)
        if self._coming and self._coming[0].arrives == tick:
            before, self._chunk = self._chunk, self._coming.popleft()
            if before is not None:
                record.joints.append(self._joint(before, self._chunk, tick))
        if self._chunk is not None and tick - self._chunk.due < len(self._chunk.actions):
            self._left = tick
            record.actions.append(self._chunk.actions[tick - self._chunk.due])
        else:
            record.stalls += 1
            record.actions.append(self._rest(record.last))
        return record.actions[-1]

    def _ask(self, tick: int, observe: Observe) -> None:
        arrives = tick + self._delay
        # Before the first chunk the robot stands, so its observation is still true when that comes.
        question = Question(tick, self._delay) if self._chunk is not None else Question(arrives, 0)
        self._coming.append(_Chunk(self._infer(observe(), question), question.tick, arrives))
        self._ask_at = question.tick + self._every

    def _joint(self, before: _Chunk, chunk: _Chunk, tick: int) -> Joint:
        old = before.actions[tick - before.due : tick - before.due + 1]
        return Joint(self._left, tick, chunk.actions[tick - chunk.due] - old[0] if len(old) else None)


def jumps(record: Record) -> list[float]:
    """Return how far apart two consecutive actions are where chunks change, in the actions' own units.

    For each joint the most that is between any two, from the old chunk's last action to the new one's first.
    """
    steps = np.linalg.norm(np.diff(np.stack(record.actions), axis=0), axis=1)
    return [float(steps[joint.left : joint.tick].max()) for joint in record.joints]


def disagreements(record: Record) -> list[float]:
    """Return for each joint how far apart the two chunks' actions for its moment are, where both have one."""
    return [float(np.linalg.norm(j.disagreement)) for j in record.joints if j.disagreement is not None]


def roughness(record: Record, step_s: float) -> float:
    """Return the mean length of the second difference of the actions given, over step_s squared: units per s^2."""
    if len(record.actions) < 3:
        return 0.0
    second = np.diff(np.stack(record.actions), n=2, axis=0)
    return float(np.linalg.norm(second, axis=1).mean()) / step_s**2
