"""Many dialogues on one engine, with the real thread."""

import asyncio
import threading
import time

import numpy as np
import pytest

from policy_models.program import GraphCall, Outcome
from policy_server.errors import DeadlineExceeded, Draining
from policy_server.runtime.costs import Costs, Kind
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.scheduler import Scheduler

SOON = 30.0


class Gated:
    """Adds one to every row once it is let; notes the rows of every run that began."""

    name, precision, differentiable = "gated", "f32", False

    def __init__(self, *, is_open: bool = False) -> None:
        self.began = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.is_open = is_open
        self.runs: list[list[float]] = []
        self.threads: set[int] = set()
        self.closed = False

    def run(self, graph, inputs):
        assert not self.closed
        self.threads.add(threading.get_ident())
        self.runs.append(inputs["x"][:, 0].tolist())
        self.began.release()
        if not self.is_open:
            assert self.may_end.acquire(timeout=SOON)
        if np.isnan(inputs["x"]).any():
            raise FloatingPointError("a row is not a number")
        return {"x": inputs["x"] + 1}

    async def begun(self) -> None:
        """Wait for the next run to begin."""
        assert await asyncio.to_thread(self.began.acquire, timeout=SOON)

    def let(self, runs: int = 1) -> None:
        """Let some runs end."""
        self.may_end.release(runs)

    def open(self) -> None:
        """Let every run end at once."""
        self.is_open = True
        self.let()

    def close(self) -> None:
        self.closed = True


def count_up(start: float, steps: int, graph: str = "denoise"):
    x = np.full((1, 1), start, np.float32)
    for _ in range(steps):
        x = (yield GraphCall(graph, {"x": x}))["x"]
    return Outcome(x, {})


def ask(scheduler: Scheduler, start: float, steps: int, *, budget_s: float = SOON, **more) -> "asyncio.Task[Outcome]":
    return asyncio.create_task(scheduler.run(count_up(start, steps), Deadline.after(budget_s), **more))


def scheduler_of(engine, costs: Costs | None = None) -> Scheduler:
    return Scheduler("test", None, engine, costs)


@pytest.fixture
def engine():
    return Gated()


@pytest.fixture
def scheduler(engine):
    scheduler = scheduler_of(engine)
    yield scheduler
    engine.open()
    scheduler.close()


async def _held_up(scheduler, engine) -> "asyncio.Task[Outcome]":
    """Return a job whose first run has begun and does not end: what comes now waits together."""
    first = ask(scheduler, 1000.0, 1)
    await engine.begun()
    return first


async def _handed_over() -> None:
    """Let the tasks that were created so far hand over their jobs."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_robots_with_other_numbers_of_steps_share_runs_and_each_gets_its_own(scheduler, engine) -> None:
    first = await _held_up(scheduler, engine)
    asked = [ask(scheduler, 10.0 * place, steps) for place, steps in enumerate((3, 1, 4, 2))]
    await _handed_over()
    engine.open()
    outcomes = await asyncio.gather(first, *asked)
    assert [outcome.actions.item() for outcome in outcomes] == [1001, 3, 11, 24, 32]
    assert [len(rows) for rows in engine.runs] == [1, 4, 3, 2, 1]
    assert (scheduler.runs, scheduler.rows) == (5, 11)


async def test_one_that_comes_later_joins_the_next_run(scheduler, engine) -> None:
    early = ask(scheduler, 0.0, 3)
    await engine.begun()
    late = ask(scheduler, 100.0, 2)
    await _handed_over()
    engine.open()
    assert (await early).actions == 3
    assert (await late).actions == 102
    assert engine.runs == [[0], [1, 100], [2, 101]]


async def test_only_the_robot_whose_row_breaks_a_run_fails(scheduler, engine) -> None:
    first = await _held_up(scheduler, engine)
    asked = [ask(scheduler, start, 2) for start in (0.0, float("nan"), 20.0)]
    await _handed_over()
    engine.open()
    one, faulty, other = await asyncio.gather(*asked, return_exceptions=True)
    assert (one.actions, other.actions) == (2, 22)
    assert isinstance(faulty, FloatingPointError)
    assert [len(rows) for rows in engine.runs] == [1, 3, 1, 1, 1, 2]
    await first


async def test_an_error_of_a_dialogue_is_no_others(scheduler, engine) -> None:
    def broken():
        yield GraphCall("denoise", {"x": np.zeros((1, 1), np.float32)})
        raise RuntimeError("its own mistake")

    first = await _held_up(scheduler, engine)
    failing = asyncio.create_task(scheduler.run(broken(), Deadline.after(SOON)))
    other = ask(scheduler, 5.0, 2)
    await _handed_over()
    engine.open()
    with pytest.raises(RuntimeError, match="its own mistake"):
        await failing
    assert (await other).actions == 7
    await first


async def test_what_nobody_waits_for_any_more_is_dropped_between_two_steps(scheduler, engine) -> None:
    ended = threading.Event()

    def long():
        try:
            yield from count_up(0.0, 100)
        finally:
            ended.set()

    dropped = asyncio.create_task(scheduler.run(long(), Deadline.after(SOON)))
    for _ in range(2):
        await engine.begun()
        engine.let()
    await engine.begun()
    dropped.cancel()
    await asyncio.wait([dropped])
    assert dropped.cancelled()
    kept = ask(scheduler, 50.0, 3)
    await _handed_over()
    engine.open()
    assert (await kept).actions == 53
    assert ended.is_set(), "its dialogue was left as it was"
    assert engine.runs == [[0], [1], [2], [50], [51], [52]]


async def test_what_is_past_its_deadline_is_refused_and_not_computed(scheduler, engine) -> None:
    first = await _held_up(scheduler, engine)
    late = ask(scheduler, 0.0, 1, budget_s=0.0)
    await _handed_over()
    engine.open()
    with pytest.raises(DeadlineExceeded, match="before the chunk was ready"):
        await late
    await first
    assert engine.runs == [[1000]]


def known(took_s: float, *, graph: str = "denoise") -> Costs:
    costs = Costs()
    costs.measure(Kind(graph, mixed=False), 1, took_s)
    return costs


async def test_what_cannot_be_done_in_time_is_refused_before_it_runs() -> None:
    engine = Gated(is_open=True)
    scheduler = scheduler_of(engine, known(100.0))
    with pytest.raises(DeadlineExceeded, match="the chunk needs 100000.0 ms"):
        await ask(scheduler, 0.0, 1, budget_s=10.0)
    assert engine.runs == []
    scheduler.close()


async def test_the_first_of_a_course_tells_how_long_the_others_take() -> None:
    engine = Gated(is_open=True)
    scheduler = scheduler_of(engine)
    assert (await ask(scheduler, 0.0, 5, course="five")).actions == 5
    scheduler.costs = known(10.0)
    with pytest.raises(DeadlineExceeded, match="the chunk needs 50000.0 ms"):
        await ask(scheduler, 0.0, 5, course="five", budget_s=30.0)
    assert len(engine.runs) == 5
    assert (await ask(scheduler, 0.0, 1, course="one", budget_s=30.0)).actions == 1
    scheduler.close()


async def test_a_dear_first_call_does_not_make_the_cheap_ones_after_it_dear() -> None:
    def look_then_denoise():
        x = (yield GraphCall("perceive", {"x": np.zeros((1, 1), np.float32)}))["x"]
        for _ in range(10):
            x = (yield GraphCall("denoise", {"x": x}))["x"]
        return Outcome(x, {})

    scheduler = scheduler_of(Gated(is_open=True))
    await scheduler.run(look_then_denoise(), Deadline.after(SOON), course="look")
    scheduler.costs = known(10.0, graph="perceive")
    scheduler.costs.measure(Kind("denoise", mixed=False), 1, 0.1)
    outcome = await scheduler.run(look_then_denoise(), Deadline.after(30.0), course="look")
    assert outcome.actions == 11, "it needs 11 s and not 110"
    scheduler.close()


async def test_costs_that_were_measured_long_ago_refuse_nothing() -> None:
    engine = Gated(is_open=True)
    scheduler = scheduler_of(engine, known(100.0))
    scheduler.costs.measured_at_s = time.monotonic() - 10.0
    assert (await ask(scheduler, 0.0, 2, budget_s=10.0)).actions == 2
    scheduler.close()


async def test_closing_refuses_what_waits_and_what_comes_and_does_not_hang(engine) -> None:
    scheduler = scheduler_of(engine)
    waiting = [ask(scheduler, 0.0, 10**9) for _ in range(3)]
    await engine.begun()
    engine.open()
    await asyncio.wait_for(asyncio.to_thread(scheduler.close), SOON)
    refused = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in refused] == [Draining] * 3
    with pytest.raises(Draining):
        await ask(scheduler, 0.0, 1)
    assert engine.closed


async def test_what_never_ran_is_closed_as_well(engine) -> None:
    scheduler = scheduler_of(engine)
    await asyncio.to_thread(scheduler.close)
    assert engine.closed
    with pytest.raises(Draining):
        await ask(scheduler, 0.0, 1)


async def test_a_dialogue_without_questions_needs_no_thread(scheduler, engine) -> None:
    before = threading.active_count()
    assert (await ask(scheduler, 7.0, 0)).actions == 7
    assert threading.active_count() == before
    assert engine.runs == []


def test_robots_on_several_event_loops_are_all_woken_and_one_thread_infers() -> None:
    engine = Gated(is_open=True)
    scheduler = scheduler_of(engine)
    loops, answers = 4, {}
    together = threading.Barrier(loops)

    def live(place: int) -> None:
        async def ask_some() -> list[float]:
            together.wait(SOON)
            outcomes = await asyncio.gather(*(ask(scheduler, 100.0 * place + i, 3) for i in range(5)))
            return [outcome.actions.item() for outcome in outcomes]

        answers[place] = asyncio.run(ask_some())

    threads = [threading.Thread(target=live, args=(place,)) for place in range(loops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert answers == {place: [100.0 * place + i + 3 for i in range(5)] for place in range(loops)}
    assert len(engine.threads) == 1
    scheduler.close()


async def test_a_loop_that_was_closed_takes_nobody_with_it(scheduler, engine) -> None:
    def ask_and_leave() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(scheduler.run(count_up(0.0, 1), Deadline.after(SOON)))
        loop.run_until_complete(engine.begun())
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    await asyncio.to_thread(ask_and_leave)
    other = ask(scheduler, 5.0, 1)
    await _handed_over()
    engine.open()
    assert (await other).actions == 6


async def test_tenants_take_turns(scheduler, engine) -> None:
    first = await _held_up(scheduler, engine)
    flood = [ask(scheduler, 100.0 + i, 1, tenant="flood", budget_s=SOON) for i in range(40)]
    one = [ask(scheduler, float(i), 1, tenant="one", budget_s=2 * SOON) for i in range(4)]
    await _handed_over()
    engine.open()
    await asyncio.gather(first, *flood, *one)
    second = engine.runs[1]
    assert {0.0, 1.0, 2.0, 3.0} <= set(second), "a flood held up another tenant"
