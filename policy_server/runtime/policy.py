"""One policy being served: the way from an observation to a chunk."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from policy_models.program import Program
from policy_models.spec import Observation
from policy_server.engine.base import Engine
from policy_server.errors import DeadlineExceeded
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.guard import Guard
from policy_server.runtime.observation import ObservationReader, describe_inputs
from policy_server.runtime.options import RequestOptions
from policy_server.runtime.scheduler import Scheduler
from policy_server.runtime.session import Session, Sessions


class PolicyRuntime:
    """Everything between the gateway's doors and one engine."""

    def __init__(
        self, name: str, program: Program, engine: Engine, *, capacity: int, timeout_s: float, ignore_unknown: bool
    ) -> None:
        self.name = name
        self.program = program
        self.spec = program.spec
        self.sessions = Sessions(program)
        self.scheduler = Scheduler(name, engine, capacity=capacity)
        self.inputs = describe_inputs(program.spec)
        self._reader = ObservationReader(program.spec, ignore_unknown=ignore_unknown)
        self._guard = Guard(name, program.spec.action)
        self._timeout_s = timeout_s

    async def act(self, session: Session, raw: Mapping[str, Any], options: RequestOptions) -> ActionChunk:
        """Answer one observation of one session; raises PolicyServerError."""
        budget_s = self._timeout_s if options.budget_ms is None else min(self._timeout_s, 1e-3 * options.budget_ms)
        deadline = Deadline.after(budget_s)
        sampling = options.sampling()
        with self.scheduler.queue:
            try:
                async with asyncio.timeout(deadline.remaining_s()):
                    observation = await self._read(raw)
                    async with session.lock:
                        started_at_s = time.monotonic()
                        dialogue = self.program.infer(observation, session.memory, sampling)
                        outcome = await self.scheduler.run(dialogue, deadline)
                        infer_ms = 1e3 * (time.monotonic() - started_at_s)
                        deadline.check()
                        actions, clamped = self._guard.check(outcome.actions)
                        session.memory = outcome.memory
            except TimeoutError:  # what runs ends at its next step, what waits in the queue is dropped
                raise DeadlineExceeded(1e3 * deadline.late_s()) from None
        return ActionChunk(actions, self.spec.step_s, sampling.seed, clamped, infer_ms)

    async def _read(self, raw: Mapping[str, Any]) -> Observation:
        if self._reader.takes_long(raw):
            return await asyncio.to_thread(self._reader.read, raw)
        return self._reader.read(raw)

    def begin_session(self) -> Session:
        """Return a session that lives as long as its caller keeps it."""
        return Session(self.program)

    def close(self) -> None:
        """Stop inference and close the engine."""
        self.scheduler.close()
