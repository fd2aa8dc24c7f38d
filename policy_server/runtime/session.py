"""Sessions: one robot's episode each. Two sessions never touch."""

import asyncio
import time
from collections import OrderedDict
from typing import Any

from policy_models.program import Program


class Session:
    """What one robot's episode has left behind so far."""

    def __init__(self, program: Program) -> None:
        self.memory: Any = program.begin()
        self.lock = asyncio.Lock()  # requests of one session are answered one after the other
        self.used_at_s = time.monotonic()
        self._program = program

    def reset(self) -> None:
        """Begin a new episode."""
        self.memory = self._program.begin()


class Sessions:
    """Sessions that outlive a request, by the name a client gave them. Bounded in number and in idle time."""

    def __init__(self, program: Program, *, capacity: int = 1024, idle_s: float = 600.0) -> None:
        self._program = program
        self._capacity = capacity
        self._idle_s = idle_s
        self._by_name: OrderedDict[str, Session] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Session:
        """Return the session called `name`; a new one if there is none, or it was idle for too long."""
        now_s = time.monotonic()
        session = self._by_name.pop(name, None)
        if session is None or now_s - session.used_at_s > self._idle_s:
            session = Session(self._program)
        session.used_at_s = now_s
        self._by_name[name] = session
        while len(self._by_name) > self._capacity:
            self._by_name.popitem(last=False)
        return session

    def forget(self, name: str) -> bool:
        """End the session called `name`; returns whether there was one."""
        return self._by_name.pop(name, None) is not None
