"""Runs dialogues on a policy's engine, off the event loop, one after the other, with a bounded queue."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

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

    async def run(self, dialogue: Dialogue, deadline: Deadline) -> Outcome:
        """Answer one dialogue.

        Raises:
            Overloaded: `capacity` requests wait already; this one was not queued.
            DeadlineExceeded: Its turn or its next step came too late.
        """
        if self.waiting >= self.capacity:
            raise Overloaded(self.waiting)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, drive, dialogue, self.engine, deadline
            )
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Finish what runs, drop what waits, and close the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
