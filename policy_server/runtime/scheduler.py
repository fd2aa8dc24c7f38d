"""Runs the dialogues of many robots on one engine, side by side, off the event loop."""

import asyncio
import logging
import threading
import time
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from policy_models.program import GraphCall, Outcome, Program, ReasoningProgram, Tensors
from policy_models.spec import Observation, Reasoning, SamplingOptions
from policy_server.engine.base import Engine
from policy_server.errors import DeadlineExceeded, Draining
from policy_server.runtime.batching import Shares, Work, choose, kind_of
from policy_server.runtime.costs import MOST_ROWS, Costs, Kind
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.inference import Listen
from policy_server.runtime.sampling import begin, run_together

logger = logging.getLogger(__name__)

# After so long without a run, what runs cost is not known well enough to refuse anything for it.
_STALE_S = 1.0
_COURSES = 256
# So long after everything else is reasoning due: whatever acts goes before it, between any two tokens.
_NO_HURRY_S = 600.0

Run = tuple[Kind, int]
ResultT = TypeVar("ResultT")


@dataclass(eq=False)
class Job(Work):
    """A dialogue that somebody waits for.

    Attributes:
        dialogue: It.
        listen: Is told what it says; None if nobody cares.
        course: Dialogues with the same value have the same calls.
        answered: The future of whoever waits, on the event loop.
        is_wanted: Whether somebody still waits.
        runs: Those that answered its calls so far, as if it had been alone: their kinds and rows.
    """

    dialogue: Generator[GraphCall, Tensors, Any] = field(kw_only=True)
    listen: Listen | None = field(kw_only=True)
    course: Hashable = field(kw_only=True)
    answered: "asyncio.Future[Any]" = field(kw_only=True)
    is_wanted: bool = True
    runs: list[Run] = field(default_factory=list)

    def say(self) -> None:
        """Pass on what the dialogue has said, if it has said more."""
        if self.call.said and self.listen is not None and not (loop := self.answered.get_loop()).is_closed():
            loop.call_soon_threadsafe(self.listen, self.call.said)


Result = tuple[Job, Any]


class Scheduler:
    """A program, its engine, and the threads that let robots share batches; an `Inference`.

    Between two runs a thread looks at everything anew: what nobody waits for any more is dropped, what cannot be done
    by its deadline is refused, what has come meanwhile joins.

    Attributes:
        costs: What runs cost, and how many may go on at once; see `costs.measure`.
        runs: How many runs of the engine there were.
        rows: How many rows they had in all.
    """

    reachable = True

    def __init__(self, name: str, program: Program, engine: Engine, costs: Costs | None = None) -> None:
        self.program = program
        self.engine = engine
        self.costs = costs or Costs()
        self.runs = 0
        self.rows = 0
        self._name = name
        self._shares = Shares()
        self._courses: dict[Hashable, Sequence[Run]] = {}
        # Guards everything below, and wakes a thread when there is something to do.
        self._ready = threading.Condition()
        self._waiting: list[Job] = []
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    @property
    def differentiable(self) -> bool:
        """See `Inference.differentiable`."""
        return self.engine.differentiable

    @property
    def capacity_hz(self) -> float:
        """See `Inference.capacity_hz`."""
        return self.costs.capacity_hz()

    @property
    def thinks(self) -> bool:
        """See `Inference.thinks`."""
        return self.program.spec.reasoning is not None

    def begin(self) -> Tensors:
        """See `Inference.begin`."""
        return self.program.begin()

    async def infer(
        self,
        observation: Observation,
        memory: Tensors,
        options: SamplingOptions,
        deadline: Deadline,
        tenant: str = "",
    ) -> Outcome:
        """See `Inference.infer`."""
        way, thought = options.continuation, options.reasoning
        course = (
            options.steps,
            options.sampler,
            way and (way.gradients, way.warm_steps),
            thought and (thought.features is None, thought.about is observation),
        )
        return await self.run(self.program.infer(observation, memory, options), deadline, tenant, course)

    async def reason(
        self,
        observation: Observation,
        *,
        until_s: float,
        tenant: str,
        listen: Listen | None = None,
        question: str | None = None,
    ) -> Reasoning:
        """See `Inference.reason`."""
        thought = cast(ReasoningProgram, self.program).reason(observation, until_s=until_s, question=question)
        return await self.run(thought, Deadline(until_s + _NO_HURRY_S), tenant, "reason", listen)

    async def hear(self, observation: Observation, text: str, deadline: Deadline, tenant: str) -> Reasoning:
        """See `Inference.hear`."""
        return await self.run(cast(ReasoningProgram, self.program).hear(observation, text), deadline, tenant, "hear")

    async def run(
        self,
        dialogue: Generator[GraphCall, Tensors, ResultT],
        deadline: Deadline,
        tenant: str = "",
        course: Hashable = None,
        listen: Listen | None = None,
    ) -> ResultT:
        """Answer one dialogue.

        Args:
            dialogue: A fresh one.
            deadline: Of its outcome.
            tenant: Who pays for it.
            course: Dialogues with the same value have the same calls, so that one tells how long the next will take.
            listen: Is told on the event loop what it says.

        Raises:
            DeadlineExceeded: It cannot be done by then.
            ClientError: Of its first question.
        """
        try:
            call = begin(dialogue)
        except StopIteration as finished:  # it asks no graph, so it needs no thread
            outcome: ResultT = finished.value
            return outcome
        answered: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        job = Job(call, deadline.at_s, tenant, dialogue=dialogue, listen=listen, course=course, answered=answered)
        job.needs_s = self._needs_s(job)
        with self._ready:
            if self._closed:
                raise Draining
            self._waiting.append(job)
            self._shares.enter(tenant)
            self._start()
            self._ready.notify()
        try:
            return await answered
        finally:
            job.is_wanted = False

    def retire(self) -> None:
        """See `Inference.retire`."""
        self.close()

    def close(self) -> None:
        """Finish the runs in progress, refuse what waits, and close the engine."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        _deliver([(job, Draining()) for job in self._waiting])
        self.engine.close()

    def _start(self) -> None:
        while len(self._threads) < self.costs.threads:
            name = f"infer-{self._name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        batch: list[Job] = []
        results: list[Result] = []
        while True:
            with self._ready:
                finished = {job for job, _ in results}
                self._waiting += [job for job in batch if job not in finished]
                for job in finished:
                    self._shares.leave(job.tenant)
                batch, refusals = self._next()
                if len(self._waiting) > 0 and self._idle:
                    self._ready.notify()
            _deliver(results + refusals)
            results = []
            if batch:
                results = self._run(batch)
                continue
            with self._ready:
                self._idle += 1
                while not self._waiting and not self._closed:
                    self._ready.wait()
                self._idle -= 1
                if self._closed:
                    return

    def _next(self) -> tuple[list[Job], list[Result]]:
        """Take the next batch out of what waits; returns it with the refusals of what cannot be done in time."""
        refusals = self._refuse(self._waiting)
        for job in self._waiting:
            if not job.is_wanted:
                self._shares.leave(job.tenant)
        self._waiting = [job for job in self._waiting if job.is_wanted]
        if not self._waiting or self._closed:
            return [], refusals
        # What waits is shared with the threads that have nothing to do.
        batch = choose(self._waiting, self.costs, self._shares, time.monotonic(), takers=1 + self._idle)
        taken = set(batch)
        self._waiting = [job for job in self._waiting if job not in taken]
        return batch, refusals

    def _refuse(self, waiting: Sequence[Job]) -> list[Result]:
        """Drop what nobody waits for, and return the refusals of what cannot be done in time."""
        now_s = time.monotonic()
        is_known = now_s - self.costs.measured_at_s < _STALE_S
        refusals: list[Result] = []
        for job in waiting:
            needs_s = job.needs_s if is_known else 0.0
            if job.is_wanted and now_s + needs_s > job.deadline_s:
                job.is_wanted = False
                refusals.append((job, DeadlineExceeded(1e3 * (now_s - job.deadline_s), needs_ms=1e3 * needs_s)))
            if not job.is_wanted:
                job.dialogue.close()
        return refusals

    def _run(self, batch: Sequence[Job]) -> list[Result]:
        """Run one batch; returns the jobs that it finished."""
        started_at_s = time.monotonic()
        try:
            answers = run_together([job.call for job in batch], self.engine)
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], error)]
            return [result for job in batch for result in self._run([job])]  # one robot's error is no other's
        self._note(batch, started_at_s)
        results: list[Result] = []
        for job, reply in zip(batch, answers, strict=True):
            job.runs.append((job.kind, job.rows))
            try:
                job.ask(job.dialogue.send(reply))
                job.needs_s = self._needs_s(job)
                job.say()
            except StopIteration as finished:
                self._learn(job)
                results.append((job, finished.value))
            except Exception as error:
                results.append((job, error))
        return results

    def _note(self, batch: Sequence[Job], started_at_s: float) -> None:
        took_s = time.monotonic() - started_at_s
        rows = sum(job.rows for job in batch)
        with self._ready:
            self.costs.note(kind_of(batch), min(rows, MOST_ROWS), took_s)
            self._shares.charge(batch, took_s)
            self.runs += 1
            self.rows += rows

    def _needs_s(self, job: Job) -> float:
        """Return what the calls that are left of a dialogue take, as far as its course is known."""
        left = self._courses.get(job.course, ())[len(job.runs) :] or [(job.kind, job.rows)]
        return sum([self.costs.of_s(kind, rows) for kind, rows in left])

    def _learn(self, job: Job) -> None:
        if len(self._courses) >= _COURSES:
            self._courses.clear()
        self._courses[job.course] = job.runs


def _deliver(results: Sequence[Result]) -> None:
    """Hand results to the event loops that wait for them, with one wake-up for each loop."""
    loops: dict[asyncio.AbstractEventLoop, list[Result]] = {}
    for job, result in results:
        loops.setdefault(job.answered.get_loop(), []).append((job, result))
    for loop, its_results in loops.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, its_results)


def _settle(results: Sequence[Result]) -> None:
    for job, result in results:
        if job.answered.done():
            continue  # it was cancelled meanwhile
        if isinstance(result, Exception):
            job.answered.set_exception(result)
        else:
            job.answered.set_result(result)
