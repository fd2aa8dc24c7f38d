"""One policy being served: the way from an observation to a chunk, whichever version answers."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from policy_server.errors import DeadlineExceeded
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.options import RequestOptions
from policy_server.runtime.queue import Queue
from policy_server.runtime.session import Session, Sessions
from policy_server.runtime.version import Version

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


class PolicyRuntime:
    """Everything between the gateway's doors and what answers."""

    def __init__(self, name: str, version: Version, *, capacity: int, timeout_s: float) -> None:
        self.name = name
        self.version = version
        self.queue = Queue(capacity)
        self.sessions = Sessions(self.begin_session)
        self._timeout_s = timeout_s
        self._retiring: dict[Version, asyncio.Task[None]] = {}

    async def act(self, session: Session, raw: Mapping[str, Any], options: RequestOptions) -> ActionChunk:
        """Answer one observation of one session; raises PolicyServerError."""
        budget_s = self._timeout_s if options.budget_ms is None else min(self._timeout_s, 1e-3 * options.budget_ms)
        deadline = Deadline.after(budget_s)
        sampling = options.sampling()
        with self.queue:
            try:
                async with asyncio.timeout(deadline.remaining_s()), session.lock:
                    version = session.follow(self.version)
                    observation = await version.read(raw)
                    started_at_s = time.monotonic()
                    outcome = await version.inference.infer(observation, session.memory, sampling, deadline)
                    infer_ms = 1e3 * (time.monotonic() - started_at_s)
                    deadline.check()
                    actions, clamped = version.guard.check(outcome.actions)
                    session.memory = outcome.memory
            except TimeoutError:  # what runs ends at its next step, what waits in the queue is dropped
                raise DeadlineExceeded(1e3 * deadline.late_s()) from None
        return ActionChunk(
            actions, version.spec.step_s, sampling.seed, clamped, infer_ms, version.engine, version.label
        )

    def begin_session(self) -> Session:
        """Return a session that lives as long as its caller keeps it."""
        return Session(self.version)

    def swap(self, version: Version) -> None:
        """Let `version` answer from now on.

        Sessions move to it with their next chunk, or with their next episode if the version that they are on
        remembers something of this one. That version is retired once no session holds it.
        """
        old, self.version = self.version, version
        self._retiring[old] = asyncio.create_task(self._retire(old))

    @property
    def retiring(self) -> tuple[str, ...]:
        """Labels of the versions that some session still holds."""
        return tuple(version.label for version in self._retiring)

    async def _retire(self, version: Version) -> None:
        while version.is_held():
            await asyncio.sleep(_LOOK_S)
            self.sessions.forget_idle()
        try:
            await asyncio.to_thread(version.inference.retire)
            logger.info("%s %s was let go by its last session, and is unloaded", self.name, version.label)
        finally:
            del self._retiring[version]

    def close(self) -> None:
        """Stop every version."""
        for version in (self.version, *self._retiring):
            version.inference.close()
