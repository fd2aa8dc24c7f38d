"""Runs dialogues on a policy's engine, one after the other, off the event loop, behind a bounded queue."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from policy_models.program import Dialogue, Outcome, UnsuitableGoal, UnsuitableOptions
from policy_server.engine.base import Engine
from policy_server.errors import InvalidOption, Overloaded, UnusableGoal
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.sampling import resume


class Queue:
    """The places of those who wait or run: `with queue:` holds one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0

    def __enter__(self) -> None:
        """Take a place; raises Overloaded if there is none."""
        if self.taken >= self.capacity:
            raise Overloaded(self.taken)
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        """Give the place back."""
        self.taken -= 1


class Scheduler:
    """One inference thread and the queue before it."""

    def __init__(self, name: str, engine: Engine, *, capacity: int) -> None:
        self.engine = engine
        self.queue = Queue(capacity)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"infer-{name}")

    async def run(self, dialogue: Dialogue, deadline: Deadline) -> Outcome:
        """Answer one dialogue, which holds a place in the queue; raises DeadlineExceeded and ClientError."""
        try:
            call = next(dialogue)
        except UnsuitableOptions as error:
            raise InvalidOption(f"'options': {error}") from error
        except UnsuitableGoal as error:
            raise UnusableGoal(str(error)) from error
        except StopIteration as finished:  # it asks no graph, so it needs no thread
            outcome: Outcome = finished.value
            return outcome
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, resume, dialogue, call, self.engine, deadline)

    def close(self) -> None:
        """Finish what runs, drop what waits, and close the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
