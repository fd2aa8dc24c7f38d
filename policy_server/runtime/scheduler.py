"""Runs dialogues on a policy's engine, off the event loop, one after the other, with a bounded queue."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from policy_models.program import Dialogue, Outcome
from policy_server.engine.base import Engine
from policy_server.errors import Overloaded
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.sampling import drive


class Scheduler:
    """One inference thread and the queue before it."""

    def __init__(self, name: str, engine: Engine, *, capacity: int) -> None:
        self.engine = engine
        self.capacity = capacity
        self.waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"infer-{name}")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue; raises Overloaded if `capacity` requests hold one already."""
        if self.waiting >= self.capacity:
            raise Overloaded(self.waiting)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def run(self, dialogue: Dialogue, deadline: Deadline) -> Outcome:
        """Answer one dialogue, whose place is held; raises DeadlineExceeded if its next step would come too late."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, drive, dialogue, self.engine, deadline)

    def close(self) -> None:
        """Finish what runs, drop what waits, and close the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
