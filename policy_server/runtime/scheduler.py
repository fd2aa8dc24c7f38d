"""Runs dialogues on a policy's engine, one after the other, off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from policy_models.program import Dialogue, Outcome, Program, Tensors
from policy_models.spec import Observation, SamplingOptions
from policy_server.engine.base import Engine
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.sampling import begin, resume


class Scheduler:
    """A program, its engine, and one inference thread; an `Inference`."""

    reachable = True

    def __init__(self, name: str, program: Program, engine: Engine) -> None:
        self.program = program
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"infer-{name}")

    def begin(self) -> Tensors:
        """See `Inference.begin`."""
        return self.program.begin()

    async def infer(
        self, observation: Observation, memory: Tensors, options: SamplingOptions, deadline: Deadline
    ) -> Outcome:
        """See `Inference.infer`."""
        return await self.run(self.program.infer(observation, memory, options), deadline)

    async def run(self, dialogue: Dialogue, deadline: Deadline) -> Outcome:
        """Answer one dialogue; raises DeadlineExceeded and ClientError."""
        try:
            call = begin(dialogue)
        except StopIteration as finished:  # it asks no graph, so it needs no thread
            outcome: Outcome = finished.value
            return outcome
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, resume, dialogue, call, self.engine, deadline)

    def retire(self) -> None:
        """See `Inference.retire`."""
        self.close()

    def close(self) -> None:
        """Finish what runs, drop what waits, and close the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
