"""Chunks over time: which action is due, when to ask for more, and what to do when there is none."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from policy_client import (
    ActionChunk,
    Arrival,
    Call,
    ChunkBuffer,
    ChunkPlayer,
    ConnectionLost,
    LatencyQuantile,
    OutOfActions,
    PlayerState,
    PlayerStats,
    RampToZero,
)
from policy_client.clock import MonotonicClock


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


def test_interpolation_draws_a_line_between_rows_and_holds_the_last():
    buffer = ChunkBuffer(interpolate=True)
    buffer.push(chunk(step_s=0.1, length=3))
    read = [buffer.action_at(now_s) for now_s in (100.0, 100.025, 100.1, 100.175, 100.2, 100.299)]
    assert [float(action[1]) for action in read] == pytest.approx([0.0, 0.25, 1.0, 1.75, 2.0, 2.0], abs=1e-5)
    assert all(action.dtype == np.float32 and not action.flags.writeable for action in (read[1], read[3]))
    assert buffer.action_at(99.9) is None
    assert buffer.action_at(100.3) is None


@pytest.mark.parametrize("rate_hz", [7.0, 20.0, 30.0])
def test_interpolation_at_the_rate_of_the_steps_gives_the_rows_themselves(rate_hz):
    start_s = 86_400.123
    buffer = ChunkBuffer(interpolate=True)
    buffer.push(chunk(made_at_s=start_s, step_s=1 / rate_hz, length=500))
    assert [buffer.action_at(start_s + tick / rate_hz)[1] for tick in range(500)] == list(range(500))


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


class ScriptedSource:
    """Answers the nth request with actions (n, index), after the time that the nth latency says; None is never."""

    def __init__(self, clock, latencies_s=(), *, length=10, failures=()):
        self.clock, self.length, self.failures = clock, length, failures
        self.latencies_s = itertools.chain(latencies_s, itertools.repeat(0.05))
        self.requests = []
        self.due = None
        self.closed = False

    def first(self, get_observation, options):
        self.clock.time_s += next(self.latencies_s)
        self.requests.append(SimpleNamespace(observation=get_observation(), options=options))
        if 1 in self.failures:
            raise ConnectionLost("pulled the plug")
        return Arrival(chunk(1, length=self.length), 1, 30.0)

    def busy(self, now_s):
        return self.due is not None

    def ask(self, request):
        self.requests.append(request)
        latency_s = next(self.latencies_s)
        seq = len(self.requests)
        answer = chunk(seq, made_at_s=request.captured_s, length=self.length)
        self.due = (np.inf if latency_s is None else request.captured_s + latency_s, Arrival(answer, seq, latency_s))

    def take(self):
        if self.due is None or self.clock.now_s() < self.due[0] - 1e-6:
            return None
        (_, arrival), self.due = self.due, None
        if arrival.seq in self.failures:
            raise ConnectionLost("pulled the plug")
        return arrival

    def close(self):
        self.closed = True

    def asked_at_s(self):
        return [round(request.captured_s - 100, 6) for request in self.requests[1:]]


@pytest.fixture
def clock():
    return HandClock()


def take(actions, count):
    return [tuple(int(number) for number in action) for action in itertools.islice(actions, count)]


def run(source, *, rate_hz=10.0, ticks, options=(), **settings):
    """Return the player and the actions of some ticks."""
    player = ChunkPlayer(source, clock=source.clock, **{"margin_s": 0.0, **settings})
    return player, take(player.run(dict, rate_hz=rate_hz, **dict(options)), ticks)


def test_the_loop_begins_with_the_first_action_however_long_the_first_chunk_took(clock):
    source = ScriptedSource(clock, [30.0, None], length=4)
    _, actions = run(source, ticks=4)
    assert actions == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_how_long_the_first_chunk_took_is_not_held_against_those_to_come(clock):
    source = ScriptedSource(clock, [30.0, 0.05])
    player, _ = run(source, ticks=3)
    assert player.stats.latency_ms == pytest.approx(50)


def test_the_next_chunk_is_asked_for_when_less_remains_than_it_takes(clock):
    source = ScriptedSource(clock, [0.0, 0.25, 0.25, 0.25])
    _, actions = run(source, ticks=16)
    # The second request finds out how long it takes: 0.25 s and a tick before the end, 0.35 s.
    assert source.asked_at_s() == [0.0, 0.7, 1.4]
    assert actions[:3] == [(1, 0), (1, 1), (1, 2)]
    assert actions[3:10] == [(2, index) for index in range(3, 10)]
    assert actions[10:] == [(3, index) for index in range(3, 9)]


def test_a_margin_asks_earlier(clock):
    source = ScriptedSource(clock, [0.0, 0.25])
    run(source, ticks=8, margin_s=0.2)
    assert source.asked_at_s() == [0.0, 0.5]


def test_execute_s_asks_once_a_chunk_was_played_for_so_long(clock):
    source = ScriptedSource(clock, [0.0])
    run(source, ticks=10, execute_s=0.3)
    # Each begins to be played at the tick after it was asked for.
    assert source.asked_at_s() == [0.0, 0.4, 0.8]


def test_execute_s_of_nought_asks_without_pause(clock):
    source = ScriptedSource(clock, [0.0])
    run(source, ticks=5, execute_s=0.0)
    assert source.asked_at_s() == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_requests_tell_what_is_played_and_when_the_answer_will_be(clock):
    source = ScriptedSource(clock, [0.0, 0.15, 0.15, 0.15])
    run(source, ticks=7, execute_s=0.0, options={"steps": 4})
    told = [(request.playing, request.delay_s) for request in source.requests[1:]]
    # The first chunk is dated anew, which its server does not know.
    assert told == [(0, None), (2, pytest.approx(0.2)), (3, pytest.approx(0.2)), (4, pytest.approx(0.2))]
    assert [request.options for request in source.requests] == [{"steps": 4}] * 5


def test_a_chunk_that_answers_an_older_observation_than_the_one_being_played_is_not_played(clock):
    class Unordered(ScriptedSource):
        def take(self):
            arrival = super().take()
            if arrival is None or arrival.seq != 3:
                return arrival
            return Arrival(chunk(3, made_at_s=99.0, length=10), 3, 1.1)

    _, actions = run(Unordered(clock), ticks=4, execute_s=0.0)
    assert actions == [(1, 0), (2, 1), (2, 2), (4, 1)]


def test_ticks_are_absolute_and_those_overrun_are_skipped(clock):
    player = ChunkPlayer(ScriptedSource(clock, [0.0, None]), clock=clock)
    actions = player.run(dict, rate_hz=10)
    assert take(actions, 1) == [(1, 0)]
    clock.time_s += 0.06
    assert take(actions, 1) == [(1, 1)]
    clock.time_s += 0.17
    assert take(actions, 1) == [(1, 3)]
    clock.time_s += 0.12  # late by a fifth of a period: run at once, and the next on time again
    assert take(actions, 2) == [(1, 4), (1, 5)]
    assert clock.slept_until_s == pytest.approx([100.1, 100.3, 100.4, 100.5])
    assert (player.stats.ticks, player.stats.ticks_skipped) == (5, 1)


def test_ticks_do_not_drift(clock):
    run(ScriptedSource(clock, [0.0, None], length=1), rate_hz=50.0, ticks=100_001)
    assert clock.slept_until_s == [100.0 + tick / 50.0 for tick in range(1, 100_001)]


def test_a_failed_request_is_logged_and_made_again_at_the_next_tick(clock, caplog):
    source = ScriptedSource(clock, failures={3, 4})
    player, actions = run(source, ticks=6, execute_s=0.0)
    assert actions == [(1, 0), (2, 1), (2, 2), (2, 3), (5, 1), (6, 1)]
    assert caplog.messages == ["no new chunk: pulled the plug"]
    assert player.stats.errors == 2


def test_a_source_that_takes_no_requests_does_not_end_the_loop(clock):
    class Closed(ScriptedSource):
        def ask(self, request):
            raise ConnectionLost("this stream is closed")

    player, actions = run(Closed(clock, length=2), ticks=4)
    assert actions == [(1, 0), (1, 1), (1, 1), (1, 1)]
    assert (player.stats.errors, player.stats.requests) == (4, 1)


def test_a_mistake_in_the_observation_ends_the_loop(clock, answers_at_once):
    def infer(observation):
        if "state" not in observation:
            raise TypeError("cannot send a Tensor")
        return chunk()

    observations = iter([{"state": 0.0}, {}])
    player = ChunkPlayer(SimpleNamespace(infer=infer), clock=clock)
    actions = player.run(lambda: next(observations), rate_hz=10)
    assert take(actions, 1) == [(0, 0)]
    with pytest.raises(TypeError, match="cannot send a Tensor"):
        take(actions, 1)
    assert player.state is PlayerState.STOPPED


def test_without_a_first_chunk_there_is_no_loop(clock):
    source = ScriptedSource(clock, failures={1})
    with pytest.raises(ConnectionLost):
        run(source, ticks=1)
    assert source.closed


@pytest.mark.parametrize("setting", [{"margin_s": -1.0}, {"execute_s": -0.1}])
def test_settings_that_cannot_be_right_are_refused(clock, setting):
    with pytest.raises(ValueError, match="expected 0 or more"):
        ChunkPlayer(ScriptedSource(clock), **setting)
    with pytest.raises(ValueError, match="rate_hz is 0"):
        next(ChunkPlayer(ScriptedSource(clock)).run(dict, rate_hz=0))


def test_when_actions_run_out_the_last_is_held_until_there_are_new_ones(clock):
    source = ScriptedSource(clock, [0.0, 0.55], length=4)
    player, actions = run(source, ticks=5)
    assert actions == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 3)]
    assert player.stats == PlayerStats(ticks=5, stalls=1, stalled_ticks=1, chunks=1, requests=2)


def test_the_stop_rule_is_told_the_last_action_and_how_long_there_has_been_none(clock):
    told = []

    def stop(last, stalled_s):
        told.append((tuple(last), pytest.approx(stalled_s)))
        return -last

    player, actions = run(ScriptedSource(clock, [0.0, None], length=2), ticks=4, stop=Call(stop))
    assert actions == [(1, 0), (1, 1), (-1, -1), (-1, -1)]
    assert told == [((1.0, 1.0), 0.0), ((1.0, 1.0), 0.1)]
    assert player.stats.stalled_ticks == 2


def test_actions_can_fade_out(clock):
    player = ChunkPlayer(ScriptedSource(clock, [0.0, None], length=2), clock=clock, stop=RampToZero(0.2))
    actions = [float(action[0]) for action in itertools.islice(player.run(dict, rate_hz=10), 6)]
    assert actions == pytest.approx([1, 1, 1, 0.5, 0, 0], abs=1e-5)


def test_a_player_gives_up_when_told_to(clock):
    source = ScriptedSource(clock, [0.0, None], length=2)
    player = ChunkPlayer(source, clock=clock, give_up_s=0.25)
    with pytest.raises(OutOfActions, match=r"no action has been due for 0\.300 s, given up after 0\.25 s"):
        take(player.run(dict, rate_hz=10), 100)
    assert player.stats.ticks == 6
    assert player.state is PlayerState.STOPPED
    assert source.closed


def test_the_state_can_be_seen(clock):
    source = ScriptedSource(clock, [0.0, 0.35, None], length=3)
    player = ChunkPlayer(source, clock=clock)
    waiting, playing, stalled, stopped = PlayerState
    assert player.state is stopped
    while_observing = []
    actions = player.run(lambda: while_observing.append(player.state) or {}, rate_hz=10)
    assert [(next(actions), player.state)[1] for _ in range(5)] == [playing, playing, playing, stalled, stalled]
    assert while_observing == [waiting, waiting, stalled]
    actions.close()
    assert player.state is stopped


@pytest.fixture
def answers_at_once(monkeypatch):
    monkeypatch.setattr("policy_client.sources.ThreadPoolExecutor", AtOnce)


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


def test_answers_of_a_policy_are_dated_by_the_tick_that_asked(clock, answers_at_once):
    asked = []

    def infer(observation, **options):
        asked.append((observation, options))
        return chunk(len(asked), made_at_s=-1.0)

    player = ChunkPlayer(SimpleNamespace(infer=infer), margin_s=0.15, clock=clock)
    actions = player.run(lambda: {"now_s": clock.now_s()}, rate_hz=10, steps=4)
    assert take(actions, 5) == [(1, 0), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert [observation["now_s"] for observation, _ in asked] == pytest.approx([100.0, 100.0, 100.2, 100.4])
    assert all(options == {"steps": 4} for _, options in asked)


class HungPolicy:
    """Answers once, and then not before it is let go."""

    def __init__(self):
        self.let_go = threading.Event()
        self.asked = 0

    def infer(self, _observation):
        self.asked += 1
        if self.asked > 1:
            self.let_go.wait()
        return chunk(self.asked)


@pytest.fixture
def hung_policy():
    policy = HungPolicy()
    yield policy
    policy.let_go.set()


def test_the_loop_runs_on_while_the_server_hangs_and_asks_once_at_a_time(clock, hung_policy):
    actions = ChunkPlayer(hung_policy, execute_s=0.0, clock=clock).run(dict, rate_hz=10)
    assert take(actions, 6) == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 3), (1, 3)]
    actions.close()
    assert hung_policy.asked <= 2


class NotedClock(MonotonicClock):
    """The real clock, which notes until when it was slept on."""

    def __init__(self):
        self.begun_at_s = None
        self.slept_until_s = []

    def now_s(self):
        now_s = super().now_s()
        self.begun_at_s = self.begun_at_s or now_s
        return now_s

    def sleep_until(self, when_s):
        self.slept_until_s.append(when_s)
        super().sleep_until(when_s)


def test_a_second_on_the_real_clock_has_its_ticks_where_they_belong():
    clock = NotedClock()
    player = ChunkPlayer(
        SimpleNamespace(infer=lambda _observation: chunk(made_at_s=time.monotonic(), length=50)), clock=clock
    )
    for _ in player.run(dict, rate_hz=50.0):
        if player.stats.ticks + player.stats.ticks_skipped > 50:
            break
    start_s = player._playback.tick_s(0)
    ticks = [round((when_s - start_s) * 50.0) for when_s in clock.slept_until_s]
    assert clock.slept_until_s == [start_s + tick / 50.0 for tick in ticks]
    assert ticks == sorted(set(ticks))
    assert time.monotonic() >= start_s + 1.0
    assert player.stats.ticks == len(ticks) + 1


def test_latency_is_a_quantile_that_rounds_down():
    latency = LatencyQuantile(0.9)
    assert latency.value_s(0.0) is None
    for index in range(11):
        latency.add(index / 10, 0.0)
    assert latency.value_s(0.0) == 0.9


def test_a_spike_does_not_decide_once_there_is_another_answer():
    latency = LatencyQuantile(0.9)
    latency.add(3.0, 0.0)
    assert latency.value_s(0.0) == 3.0
    latency.add(0.05, 0.1)
    assert latency.value_s(0.1) == 0.05


def test_latencies_are_forgotten_by_number_and_by_age_but_never_all():
    latency = LatencyQuantile(1.0, window=2, longest_s=10.0)
    for latency_s, now_s in [(0.3, 0.0), (0.2, 1.0), (0.1, 5.0)]:
        latency.add(latency_s, now_s)
    assert latency.value_s(5.0) == 0.2
    assert latency.value_s(11.5) == 0.1
    assert latency.value_s(1e6) == 0.1


@pytest.mark.parametrize("settings", [{"quantile": 1.5}, {"quantile": float("nan")}, {"window": 0}])
def test_a_quantile_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        LatencyQuantile(**settings)
