"""The chunks that a robot was sent, and how long they take to reach it."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policy_server.runtime.delay import DelayQuantile
from policy_server.runtime.track import Sent, Track, given_before, rows_at, rows_left

starts = st.sampled_from([0.0, 0.3, 1234.5, 86_400.7, 1.7e9])  # seconds since a boot, or since 1970
steps = st.sampled_from([0.005, 0.02, 0.05, 0.1, 1 / 30, 1 / 3])
chunks = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20).map(lambda rows: np.float32(rows)[:, None])


def sent(actions, at_s=0.0, seq=1) -> Sent:
    actions = np.float32(actions).reshape(len(actions), -1)
    return Sent(seq, at_s, actions, actions)


@given(chunks, starts, steps)
@settings(max_examples=100, deadline=None)
def test_a_chunk_says_for_the_times_of_its_rows_exactly_its_rows(actions, start_s: float, step_s: float) -> None:
    times_s = start_s + step_s * np.arange(len(actions))
    np.testing.assert_array_equal(rows_at(actions, start_s, times_s, step_s), actions)
    for row, time_s in enumerate(times_s.tolist()):
        assert rows_left(sent(actions, start_s), time_s, step_s) == len(actions) - row


@given(chunks, starts, steps, st.lists(st.floats(-3, 25), min_size=1, max_size=10))
@settings(max_examples=100, deadline=None)
def test_between_two_rows_it_says_what_lies_between_them(actions, start_s: float, step_s: float, places) -> None:
    assume(start_s < 1e9)
    times_s = start_s + step_s * np.array(places)
    wanted = np.interp(places, np.arange(len(actions)), actions[:, 0])
    got = rows_at(actions, start_s, times_s, step_s)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[:, 0], wanted, atol=0.03)
    assert actions.min() - 1e-5 <= got.min() <= got.max() <= actions.max() + 1e-5


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12), steps, st.lists(st.floats(-2, 14), min_size=2))
@settings(max_examples=100, deadline=None)
def test_a_chunk_that_rises_is_never_said_to_fall(rows, step_s: float, places) -> None:
    rising = np.float32(sorted(rows))[:, None]
    said = rows_at(rising, 5.0, 5.0 + step_s * np.array(sorted(places)), step_s)[:, 0]
    assert (np.diff(said) >= -1e-5).all()


def test_outside_of_a_chunk_its_ends_go_on() -> None:
    actions = np.float32([[1], [2], [3]])
    said = rows_at(actions, 10.0, np.array([0.0, 9.99, 10.2, 10.21, 99.0]), 0.1)
    assert said[:, 0].tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("at_s", "left"),
    [(0.0, 4), (0.1 * 3, 1), (0.05, 3), (0.3 + 1e-12, 1), (0.31, 0), (0.4, 0), (9.0, 0), (-0.1, 0), (-1e-12, 4)],
)
def test_what_is_left_of_a_chunk_are_its_whole_rows_that_are_still_due(at_s: float, left: int) -> None:
    assert rows_left(sent(range(4)), at_s, 0.1) == left


@pytest.mark.parametrize(
    ("at_s", "rows"),
    [(0.0, []), (0.1, [0]), (0.1 * 3, [0, 1, 2]), (0.5, [2, 3, 4]), (0.25, [0.5, 1.5]), (-1.0, []), (2.0, [5, 5, 5])],
)
def test_what_a_robot_was_given_before_are_the_rows_that_were_due(at_s: float, rows: list[float]) -> None:
    got = given_before(sent(range(6)), at_s, 0.1)
    np.testing.assert_allclose(got[:, 0], rows, atol=1e-5)


def test_before_the_first_chunk_a_robot_was_given_nothing() -> None:
    assert given_before(None, 1.0, 0.1).size == 0


def test_a_track_finds_chunks_by_what_they_answer() -> None:
    track = Track()
    assert track.find(None) is None
    first, second = sent([0], seq=1), sent([0], seq=4)
    track.add(first)
    track.add(second)
    assert track.find(None) is second
    assert track.find(1) is first
    assert track.find(2) is None
    assert track.find(0) is None, "a robot that plays nothing"
    assert track.all() == (first, second)
    track.clear()
    assert track.all() == ()


def test_a_track_keeps_the_last_few() -> None:
    track = Track()
    for seq in range(100):
        track.add(sent([0], seq=seq))
    assert [one.seq for one in track.all()] == list(range(92, 100))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def noted(*delays_s: float, **more) -> DelayQuantile:
    delays = DelayQuantile(clock=Clock(), **more)
    for delay_s in delays_s:
        delays.note(delay_s)
    return delays


def test_without_delays_none_is_expected() -> None:
    assert noted().value_s == 0.0


def test_of_a_few_delays_the_slow_first_one_does_not_count() -> None:
    assert noted(0.9).value_s == 0.9, "there is no other"
    assert noted(0.9, 0.1).value_s == 0.1
    assert noted(0.9, 0.1, 0.2).value_s == 0.2
    assert noted(0.9, 0.1, 0.2, 0.15).value_s == 0.15


def test_of_many_delays_nine_in_ten_are_no_longer() -> None:
    assert noted(*(0.01 * i for i in range(1, 31))).value_s == pytest.approx(0.28)
    assert noted(*[0.1] * 19, 5.0).value_s == 0.1, "one spike in twenty is not planned for"
    assert noted(*[0.1] * 5, *[5.0] * 5).value_s == 5.0


def test_a_spike_is_forgotten_once_enough_delays_came_after_it() -> None:
    delays = noted(*[9.0] * 8)
    for _ in range(32):
        delays.note(0.1)
    assert delays.value_s == 0.1


def test_old_delays_are_forgotten_but_the_last_one() -> None:
    clock = Clock()
    delays = DelayQuantile(clock=clock)
    for delay_s in (9.0, 8.0, 0.3):
        delays.note(delay_s)
    clock.now_s += 29.0
    assert delays.value_s == 8.0
    clock.now_s += 2.0
    assert delays.value_s == 0.3, "better than nothing"
    delays.note(0.2)
    assert delays.value_s == 0.2


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_what_is_expected_has_been_seen(delays_s, quantile: float) -> None:
    delays = DelayQuantile(quantile, clock=Clock())
    for delay_s in delays_s:
        delays.note(delay_s)
    assert delays.value_s in delays_s[-32:]
