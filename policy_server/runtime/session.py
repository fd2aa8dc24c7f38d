"""Sessions: one robot's episode each. Two sessions never touch."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from policy_models.program import Tensors
from policy_server.runtime.thinking import Mind
from policy_server.runtime.track import Track
from policy_server.runtime.version import Version


class Session:
    """What one robot's episode has left behind so far, on the version of the policy that it began with.

    Attributes:
        lock: Held while an observation is answered.
        track: The chunks that it was sent.
        mind: What the policy thinks, if it reasons.
        memory: What the policy remembers of the episode.
    """

    def __init__(self, version: Version) -> None:
        self.track = Track()
        self.mind = Mind()
        self.lock = asyncio.Lock()  # requests of one session are answered one after the other
        self.used_at_s = time.monotonic()
        self._join(version)

    @property
    def in_episode(self) -> bool:
        """Whether there is something to remember: policies that remember nothing are between episodes at all times."""
        return self.memory is not self._beginning

    def follow(self, current: Version) -> Version:
        """Return the version that answers next: `current`, unless an episode that another one remembers goes on."""
        if self.version is not current and not self.in_episode:
            self.version.sessions.discard(self)
            self._join(current)
            self.mind.clear()
        return self.version

    def reset(self) -> None:
        """Begin a new episode."""
        self.memory = self._beginning
        self.track.clear()
        self.mind.clear()

    def _join(self, version: Version) -> None:
        self.version = version
        self._beginning: Tensors = version.inference.begin()
        self.memory = self._beginning
        version.sessions.add(self)


class Sessions:
    """Sessions that outlive a request, by the name a client gave them. Bounded in number and in idle time."""

    def __init__(self, begin: Callable[[], Session], *, capacity: int = 1024, idle_s: float = 600.0) -> None:
        self._begin = begin
        self._capacity = capacity
        self._idle_s = idle_s
        self._by_name: OrderedDict[str, Session] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Session:
        """Return the session called `name`; a new one if there is none, or it was idle for too long."""
        self.forget_idle()
        session = self._by_name.pop(name, None) or self._begin()
        session.used_at_s = time.monotonic()
        self._by_name[name] = session
        while len(self._by_name) > self._capacity:
            self._by_name.popitem(last=False)
        return session

    def forget(self, name: str) -> bool:
        """End the session called `name`; returns whether there was one."""
        return self._by_name.pop(name, None) is not None

    def forget_idle(self) -> None:
        """End the sessions that were idle for too long."""
        oldest_s = time.monotonic() - self._idle_s
        while self._by_name and next(iter(self._by_name.values())).used_at_s < oldest_s:
            self._by_name.popitem(last=False)
