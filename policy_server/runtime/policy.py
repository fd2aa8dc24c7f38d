"""One policy being served: the way from an observation to a chunk, whichever version answers."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from policy_models.program import Outcome
from policy_models.spec import Observation, PolicySpec, Reasoning
from policy_server.errors import DeadlineExceeded, InvalidOption
from policy_server.runtime.admission import Admission
from policy_server.runtime.chunking import ActionChunk
from policy_server.runtime.continuity import (
    CONTINUITIES,
    REPLACE,
    Continuity,
    Moment,
    frozen_rows,
    joint,
    read_continuity,
)
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.inference import ThinkingInference
from policy_server.runtime.options import RequestOptions
from policy_server.runtime.queue import Queue
from policy_server.runtime.request import Request, Timing
from policy_server.runtime.session import Session, Sessions
from policy_server.runtime.smoothed import answer
from policy_server.runtime.thinking import LATEST, Fresh, Latest, Scene, Thought, read_thinking
from policy_server.runtime.track import Sent, given_before, rows_at, rows_left
from policy_server.runtime.version import Version

logger = logging.getLogger(__name__)

_LOOK_S = 0.5


class PolicyRuntime:
    """Everything between the gateway's doors and what answers."""

    def __init__(
        self,
        name: str,
        version: Version,
        *,
        capacity: int,
        timeout_s: float,
        continuity: str = REPLACE.mode,
    ) -> None:
        """Args: continuity is the mode for requests that name none; see `continuity.CONTINUITIES`."""
        self.name = name
        self.version = version
        self.queue = Queue(capacity)
        self.sessions = Sessions(self.begin_session)
        self.admission = Admission(lambda: self.version.inference.capacity_hz)
        self._timeout_s = timeout_s
        way = CONTINUITIES[continuity]
        self._continuity = REPLACE if way.denoises and version.spec.sampler is None else way()
        self._retiring: dict[Version, asyncio.Task[None]] = {}

    async def act(self, session: Session, request: Request) -> ActionChunk:
        """Answer one observation of one session; raises PolicyServerError."""
        options = request.options
        budget_s = self._timeout_s if options.budget_ms is None else min(self._timeout_s, 1e-3 * options.budget_ms)
        deadline = Deadline.after(budget_s)
        with self.queue:
            try:
                async with asyncio.timeout(deadline.remaining_s()), session.lock:
                    return await self._answer(session, request, deadline)
            except TimeoutError:  # what runs ends at its next step, what waits in the queue is dropped
                raise DeadlineExceeded(1e3 * deadline.late_s()) from None

    async def _answer(self, session: Session, request: Request, deadline: Deadline) -> ActionChunk:
        version = session.follow(self.version)
        spec, inference = version.spec, version.inference
        observation = await version.read(request.inputs)
        started_at_s = time.monotonic()
        thought = await self._think(session, observation, request, deadline)
        continuity = request.continuity or self._way(request.options, spec)
        timing = _timing(request, started_at_s)
        playing = session.track.find(timing.playing)
        moment = Moment(timing.captured_at_s, timing.delay_s, playing, inference.differentiable)
        sampling = request.options.sampling(
            continuation=continuity.begin(moment, spec), reasoning=thought.reasoning if thought else None
        )

        async def infer(observation: Observation) -> Outcome:
            return await inference.infer(observation, session.memory, sampling, deadline, request.tenant)

        outcome, radius = await answer(observation, infer, request.options.smoothing, sampling.seed, spec)
        deadline.check()
        said = continuity.finish(outcome.actions, moment, session.track, spec)
        around = _surroundings(moment, spec) if version.guard.looks_around else {}
        guarded = version.guard.check(said, **around)
        ended_at_s = time.monotonic()
        due_at_s = ended_at_s if _stands_still(request) else timing.captured_at_s
        raw = outcome.actions
        if guarded.report.fallback:  # neither what a withheld chunk said nor what it leaves behind can be trusted
            raw = guarded.actions
        else:
            session.memory = outcome.memory
        session.track.add(Sent(timing.seq, due_at_s, raw, guarded.actions))
        return ActionChunk(
            guarded.actions,
            spec.step_s,
            sampling.seed,
            guarded.report,
            1e3 * (ended_at_s - started_at_s),
            version.engine,
            version.label,
            joint(continuity, moment, spec),
            radius,
            thought or _thought_within(outcome),
        )

    async def _think(
        self, session: Session, observation: Observation, request: Request, deadline: Deadline
    ) -> Thought | None:
        """Return what a chunk acts on; None where the policy does not reason, or does so while it acts."""
        wish, version = request.options.reasoning, session.version
        if version.spec.reasoning is None:
            if wish is not None:
                raise InvalidOption(f"'options.reasoning': {self.name!r} does not reason")
            return None
        way = LATEST if wish is None else read_thinking(wish)
        if version.inference.thinks:
            inference = cast(ThinkingInference, version.inference)
            return await way.choose(session.mind, Scene(observation, inference, version.spec, deadline, request.tenant))
        if not isinstance(way, Fresh | Latest):
            raise InvalidOption(f"'options.reasoning' is {way.mode!r}, which cannot be had where this policy runs")
        return None

    async def ask(self, inputs: Mapping[str, Any], question: str, tenant: str) -> Reasoning:
        """Answer a question about a scene in words.

        Args:
            inputs: As in `Request.inputs`; the instruction among them is not looked at.
            question: In words.
            tenant: Who pays for it.

        Raises:
            InvalidOption: The policy has no words.
            ObservationError: See `act`; also for a question that is empty or too long.
            Unavailable: See `act`.
        """
        version = self.version
        if version.spec.reasoning is None or not version.inference.thinks:
            raise InvalidOption(f"{self.name!r} answers no questions")
        with self.queue:
            observation = await version.read({**inputs, "prompt": question})
            until_s = time.monotonic() + min(self._timeout_s, version.spec.reasoning.budget_s)
            return await cast(ThinkingInference, version.inference).reason(
                observation, until_s=until_s, tenant=tenant, question=question
            )

    def _way(self, options: RequestOptions, spec: PolicySpec) -> Continuity:
        return self._continuity if options.continuity is None else read_continuity(options.continuity, spec)

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


def _thought_within(outcome: Outcome) -> Thought | None:
    """Return what an outcome was reasoned with, where that was not known before."""
    return None if outcome.reasoning is None else Thought(0, outcome.reasoning, "", time.monotonic())


def _stands_still(request: Request) -> bool:
    """Whether the robot plays the chunk from its first row as soon as it has it."""
    return request.timing is None and request.options.captured_ms is None and request.options.delay_ms is None


def _timing(request: Request, now_s: float) -> Timing:
    if request.timing is not None:
        return request.timing
    captured_ms, delay_ms = request.options.captured_ms, request.options.delay_ms
    return Timing(now_s if captured_ms is None else 1e-3 * captured_ms, 1e-3 * (delay_ms or 0.0))


def _surroundings(moment: Moment, spec: PolicySpec) -> dict[str, Any]:
    """Return what the guard is told of the chunk being played; see `Guard.check`."""
    playing = moment.playing
    if playing is None:
        return {}
    left = rows_left(playing, moment.at_s, spec.step_s)
    first = frozen_rows(moment, spec)
    return {
        "before": given_before(playing, moment.at_s + first * spec.step_s, spec.step_s),
        "playing": rows_at(playing.actions, playing.at_s, moment.at_s + spec.step_s * np.arange(left), spec.step_s),
        "first": first,
    }
