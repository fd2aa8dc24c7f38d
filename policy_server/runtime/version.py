"""One version of a policy, ready to answer, and the sessions that are on it."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from policy_models.spec import Observation, PolicySpec
from policy_server.runtime.guard import Guard
from policy_server.runtime.inference import Inference
from policy_server.runtime.observation import ObservationReader, describe_inputs

if TYPE_CHECKING:
    from policy_server.runtime.session import Session


class Version:
    """A bundle being served.

    Attributes:
        label: The publisher's version of the policy.
        engine: Name of what answers.
        sessions: Those that follow this version; whoever drops a session takes it away.
    """

    def __init__(
        self,
        label: str,
        spec: PolicySpec,
        inference: Inference,
        *,
        engine: str,
        guard: Guard,
        ignore_unknown: bool = False,
    ) -> None:
        self.label = label
        self.engine = engine
        self.spec = spec
        self.inference = inference
        self.inputs = describe_inputs(spec)
        self.guard = guard
        self.sessions: WeakSet[Session] = WeakSet()
        self._reader = ObservationReader(spec, ignore_unknown=ignore_unknown)

    async def read(self, raw: Mapping[str, Any]) -> Observation:
        """Return the observation that a robot sent; raises ObservationError."""
        if self._reader.takes_long(raw):
            return await asyncio.to_thread(self._reader.read, raw)
        return self._reader.read(raw)

    def is_held(self) -> bool:
        """Whether a session is in the middle of an answer, or of an episode that this version remembers."""
        return any(session.lock.locked() or session.in_episode for session in self.sessions)
