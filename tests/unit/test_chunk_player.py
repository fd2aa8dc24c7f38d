"""Chunks over time: which action is due, when to ask for more, and what to do when there is none."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from policy_client.chunk import ActionChunk
from policy_client.errors import ConnectionLost
from policy_client.player import ChunkBuffer, ChunkPlayer


def chunk(name=0, *, made_at_s=100.0, step_s=0.1, length=4):
    """Return a chunk whose actions are (name, index)."""
    actions = np.array([(name, index) for index in range(length)], np.float32)
    return ActionChunk(actions, step_s, made_at_s)


def test_no_action_is_due_before_any_chunk():
    buffer = ChunkBuffer()
    assert buffer.action_at(100.0) is None
    assert buffer.remaining_s(100.0) == 0


@pytest.mark.parametrize(
    ("now_s", "index"),
    [(100.0, 0), (100.09, 0), (100.1, 1), (100.19, 1), (100.25, 2), (100.3, 3), (100.39, 3)],
)
def test_the_action_due_is_the_one_whose_step_has_begun(now_s, index):
    buffer = ChunkBuffer()
    buffer.push(chunk())
    assert buffer.action_at(now_s)[1] == index


@pytest.mark.parametrize("now_s", [99.9, 100.4, 1000.0])
def test_no_action_is_due_before_the_observation_or_after_the_last_step(now_s):
    buffer = ChunkBuffer()
    buffer.push(chunk())
    assert buffer.action_at(now_s) is None


@pytest.mark.parametrize("rate_hz", [7.0, 10.0, 20.0, 30.0, 50.0, 1000.0])
def test_ticks_at_the_rate_of_the_steps_take_every_action_once(rate_hz):
    start_s = 86_400.123
    buffer = ChunkBuffer()
    buffer.push(chunk(made_at_s=start_s, step_s=1 / rate_hz, length=500))
    assert [buffer.action_at(start_s + tick / rate_hz)[1] for tick in range(500)] == list(range(500))


def test_what_remains_falls_to_zero_and_stays_there():
    buffer = ChunkBuffer()
    buffer.push(chunk())
    assert [buffer.remaining_s(now_s) for now_s in (100.0, 100.3, 100.5)] == pytest.approx([0.4, 0.1, 0.0])


def test_a_newer_chunk_takes_over_at_the_step_due_now():
    buffer = ChunkBuffer()
    buffer.push(chunk(1, made_at_s=100.0))
    assert buffer.push(chunk(2, made_at_s=100.1))
    assert tuple(buffer.action_at(100.3)) == (2, 2)


def test_a_chunk_that_answers_an_older_observation_is_ignored():
    buffer = ChunkBuffer()
    buffer.push(chunk(2, made_at_s=100.1))
    assert not buffer.push(chunk(1, made_at_s=100.0))
    assert tuple(buffer.action_at(100.1)) == (2, 0)


class HandClock:
    """A clock that moves only when told, or when slept on."""

    def __init__(self):
        self.time_s = 100.0
        self.slept_until_s = []

    def now_s(self):
        return self.time_s

    def sleep_until(self, when_s):
        self.slept_until_s.append(when_s)
        self.time_s = max(self.time_s, when_s)


class CountingPolicy:
    """Answers the nth request with actions (n, index); the clock stands for the time that an answer takes."""

    def __init__(self, clock, *, takes_s=0.0, failures=()):
        self.clock, self.takes_s, self.failures = clock, takes_s, failures
        self.asked = []
        self.options = []

    def infer(self, observation, **options):
        self.asked.append(observation)
        self.options.append(options)
        if not self.asked[1:]:
            self.clock.time_s += self.takes_s
        if len(self.asked) in self.failures:
            raise ConnectionLost("pulled the plug")
        return chunk(len(self.asked), made_at_s=-1.0)


class AtOnce:
    """An executor that does its work when it is given: the answer is there at the next tick."""

    def __init__(self, **_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def answers_by_the_next_tick(monkeypatch):
    monkeypatch.setattr("policy_client.player.ThreadPoolExecutor", AtOnce)


def take(actions, count):
    return [tuple(int(number) for number in action) for action in itertools.islice(actions, count)]


@pytest.mark.usefixtures("answers_by_the_next_tick")
def test_the_loop_begins_with_the_first_action_however_long_the_first_chunk_took(clock):
    policy = CountingPolicy(clock, takes_s=30.0)
    actions = ChunkPlayer(policy, refill_s=0.0, clock=clock).run(dict, rate_hz=10)
    assert take(actions, 4) == [(1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.usefixtures("answers_by_the_next_tick")
def test_a_new_chunk_is_asked_for_when_less_than_refill_s_remains(clock):
    policy = CountingPolicy(clock)
    actions = ChunkPlayer(policy, refill_s=0.25, clock=clock).run(lambda: clock.now_s(), rate_hz=10)
    assert take(actions, 5) == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert policy.asked == pytest.approx([100.0, 100.2, 100.4])


@pytest.mark.usefixtures("answers_by_the_next_tick")
def test_the_options_of_the_run_go_with_every_request(clock):
    policy = CountingPolicy(clock)
    take(ChunkPlayer(policy, refill_s=1.0, clock=clock).run(dict, rate_hz=10, steps=4), 2)
    assert policy.options == [{"steps": 4}] * 3


@pytest.mark.usefixtures("answers_by_the_next_tick")
def test_ticks_are_absolute_and_those_overrun_are_skipped(clock):
    actions = ChunkPlayer(CountingPolicy(clock), refill_s=0.0, clock=clock).run(dict, rate_hz=10)
    assert take(actions, 1) == [(1, 0)]
    clock.time_s += 0.06
    assert take(actions, 1) == [(1, 1)]
    clock.time_s += 0.15
    assert take(actions, 1) == [(1, 3)]
    assert clock.slept_until_s == pytest.approx([100.1, 100.3])


@pytest.mark.usefixtures("answers_by_the_next_tick")
def test_a_failed_request_is_logged_and_made_again_at_the_next_tick(clock, caplog):
    policy = CountingPolicy(clock, failures={2})
    actions = ChunkPlayer(policy, refill_s=0.35, clock=clock).run(dict, rate_hz=10)
    assert take(actions, 4) == [(1, 0), (1, 1), (1, 2), (3, 1)]
    assert caplog.messages == ["no new chunk: pulled the plug"]


@pytest.mark.usefixtures("answers_by_the_next_tick")
def test_a_mistake_in_the_observation_ends_the_loop(clock):
    def infer(observation):
        if "state" not in observation:
            raise TypeError("cannot send a Tensor")
        return chunk()

    observations = iter([{"state": 0.0}, {}])
    player = ChunkPlayer(SimpleNamespace(infer=infer), refill_s=1.0, clock=clock)
    actions = player.run(lambda: next(observations), rate_hz=10)
    assert take(actions, 1) == [(0, 0)]
    with pytest.raises(TypeError, match="cannot send a Tensor"):
        take(actions, 1)


def test_without_a_first_chunk_there_is_no_loop(clock):
    policy = CountingPolicy(clock, failures={1})
    with pytest.raises(ConnectionLost):
        take(ChunkPlayer(policy, refill_s=0.1, clock=clock).run(dict, rate_hz=10), 1)


class HungPolicy(CountingPolicy):
    """Answers once, and then not before it is let go."""

    def __init__(self, clock):
        super().__init__(clock)
        self.let_go = threading.Event()

    def infer(self, observation, **options):
        answer = super().infer(observation, **options)
        if self.asked[1:]:
            self.let_go.wait()
        return answer


@pytest.fixture
def hung_policy(clock):
    policy = HungPolicy(clock)
    yield policy
    policy.let_go.set()


def test_the_loop_runs_on_and_repeats_the_last_action_while_the_server_hangs(clock, hung_policy):
    actions = ChunkPlayer(hung_policy, refill_s=0.15, clock=clock).run(dict, rate_hz=10)
    assert take(actions, 6) == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 3), (1, 3)]
    actions.close()


def test_when_actions_run_out_the_hold_makes_each_from_the_one_before(clock, hung_policy):
    player = ChunkPlayer(hung_policy, refill_s=0.15, hold=lambda action: action * 2, clock=clock)
    actions = player.run(dict, rate_hz=10)
    assert take(actions, 6)[3:] == [(1, 3), (2, 6), (4, 12)]
    actions.close()


def test_only_one_request_is_in_progress_at_a_time(clock, hung_policy):
    actions = ChunkPlayer(hung_policy, refill_s=10.0, clock=clock).run(dict, rate_hz=10)
    take(actions, 5)
    actions.close()
    assert len(hung_policy.asked) <= 2
