"""A robot that streams observations for a long time, and remembers enough of them to check what it gets."""

import itertools
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from benchmarks.questions import Judge, inputs_of
from policy_client.chunk import ActionChunk
from policy_client.errors import PolicyClientError
from policy_models.spec import Observation

_REMEMBERED = 1024  # observations whose chunk may still come
_SAMPLED = 500  # chunks of each robot that are computed again
_RETRY_S = 0.2
_LOOKS = 4
_BEHIND_S = 0.5


class Stream(Protocol):
    """What a robot needs of `policy_client.PolicyStream`."""

    def send(self, observation: Mapping[str, Any], *, captured_s: float | None = None) -> int:
        """Send an observation; returns its number."""

    def latest(self) -> ActionChunk | None:
        """Return the newest chunk that has come, or None."""

    def reset(self) -> None:
        """Begin a new episode."""


OpenStream = Callable[[], AbstractContextManager[Stream]]


@dataclass(frozen=True, eq=False)
class Taken:
    """A chunk to be computed again.

    Attributes:
        place: Which observation it answers.
        seed: What it was drawn with.
        actions: What came, (H, A).
    """

    place: int
    seed: int
    actions: np.ndarray


@dataclass
class Log:
    """What a robot lived through.

    Attributes:
        sent: Observations.
        answered: Chunks, each counted once.
        strangers: Chunks for observations that it never sent, or sent in another episode.
        backward: Chunks older than one that had come before.
        failures: Errors of the client, by class.
        latencies_ms: From the observation to the moment at which its chunk was seen.
        longest_silence_s: Longest time without a chunk.
        taken: Chunks to be computed again.
    """

    sent: int = 0
    answered: int = 0
    strangers: int = 0
    backward: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    longest_silence_s: float = 0.0
    taken: list[Taken] = field(default_factory=list)


class SoakRobot:
    """One robot.

    Attributes:
        log: What it lived through so far.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        *,
        rate_hz: float,
        episode_length: int,
        take: float,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a robot.

        Args:
            observations: What it may see.
            rate_hz: How many it sends a second.
            episode_length: How many observations an episode has.
            take: Probability that a chunk is taken to be computed again.
            seed: Of its luck.
            clock: Monotonic time, in seconds.
        """
        self.log = Log()
        self._inputs = [inputs_of(observation) for observation in observations]
        self._rate_hz = rate_hz
        self._episode_length = episode_length
        self._take = take
        self._draw = random.Random(seed)
        self._clock = clock
        self._heard_at_s = clock()
        self._memory = _Memory()

    def run(self, open_stream: OpenStream, ended: threading.Event) -> None:
        """Drive until `ended`, through as many streams as it takes."""
        self._heard_at_s = self._clock()
        while not ended.is_set():
            try:
                with open_stream() as stream:
                    self._memory = _Memory()
                    self._drive(stream, ended)
            except PolicyClientError as error:
                name = type(error).__name__
                self.log.failures[name] = self.log.failures.get(name, 0) + 1
                ended.wait(_RETRY_S)
        self._note_silence(self._clock())

    def see(self, stream: Stream) -> None:
        """Send the next observation."""
        memory = self._memory
        is_first = bool(memory.sent) and self.log.sent % self._episode_length == 0
        if is_first:
            stream.reset()
        place, captured_s = self._draw.randrange(len(self._inputs)), self._clock()
        number = stream.send(self._inputs[place], captured_s=captured_s)
        self.log.sent += 1
        if is_first:
            memory.first_of_episode = number
        memory.sent[number] = (place, captured_s)
        if len(memory.sent) > _REMEMBERED:
            memory.sent.popitem(last=False)

    def hear(self, chunk: ActionChunk | None) -> None:
        """Look at the newest chunk, which may have been seen before."""
        memory = self._memory
        if chunk is None or chunk.metadata["seq"] == memory.heard:
            return
        number, now_s = int(chunk.metadata["seq"]), self._clock()
        self.log.answered += 1
        self._note_silence(now_s)
        self.log.backward += number < memory.heard
        memory.heard = max(number, memory.heard)
        if number not in memory.sent or number < memory.first_of_episode:
            self.log.strangers += 1
            return
        place, captured_s = memory.sent[number]
        self.log.latencies_ms.append(1e3 * (now_s - captured_s))
        is_fallback = bool(chunk.metadata.get("guard", {}).get("fallback"))  # not what the policy said
        if self._draw.random() < self._take and len(self.log.taken) < _SAMPLED and not is_fallback:
            self.log.taken.append(Taken(place, int(chunk.metadata["seed"]), chunk.actions))

    def _drive(self, stream: Stream, ended: threading.Event) -> None:
        # Chunks are looked for several times between two observations, so that latencies are not those of the rate.
        look_s = 1 / (_LOOKS * self._rate_hz)
        begin_s = self._clock()
        for look in itertools.count():
            begin_s = max(begin_s, self._clock() - look * look_s - _BEHIND_S)  # what was missed is not made up for
            if ended.wait(max(0.0, begin_s + look * look_s - self._clock())):
                return
            self.hear(stream.latest())
            if look % _LOOKS == 0:
                self.see(stream)

    def _note_silence(self, now_s: float) -> None:
        self.log.longest_silence_s = max(self.log.longest_silence_s, now_s - self._heard_at_s)
        self._heard_at_s = now_s


@dataclass
class _Memory:
    """What a robot remembers of one stream, whose numbers begin anew.

    Attributes:
        sent: Place and time of the last observations, by number.
        heard: Highest number of a chunk.
        first_of_episode: Number of the episode's first observation.
    """

    sent: OrderedDict[int, tuple[int, float]] = field(default_factory=OrderedDict)
    heard: int = 0
    first_of_episode: int = 0


@dataclass(frozen=True)
class Verdict:
    """How chunks compare with those of the policy in process."""

    same: int
    close: int
    wrong: int

    @property
    def count(self) -> int:
        """How many were compared."""
        return self.same + self.close + self.wrong


def verdict(judge: Judge, observations: Sequence[Observation], taken: Sequence[Taken]) -> Verdict:
    """Compute chunks again and compare: bitwise the same, within the tolerance, or wrong."""
    off = [judge.off(one.actions, judge.answer(observations[one.place], one.seed)) for one in taken]
    same, right = sum(one == 0 for one in off), sum(one <= 1 for one in off)
    return Verdict(same, right - same, len(off) - right)
