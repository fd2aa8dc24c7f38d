"""What a robot's clock shows, from pings that may take longer one way than the other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_server.gateway.stream.clock import RobotClock

ways_s = st.floats(0, 2.0)


def clock_of(offset_s: float, *exchanges: tuple[float, float, float]) -> RobotClock:
    """Return a clock after exchanges (sent_s, up_s, down_s) with a robot whose clock is ahead by `offset_s`."""
    clock = RobotClock()
    for sent_s, to_robot_s, back_s in exchanges:
        clock.answered(sent_s, sent_s + to_robot_s + offset_s, sent_s + to_robot_s + back_s)
    return clock


def test_before_the_first_answer_an_observation_is_as_young_as_it_can_be() -> None:
    clock = RobotClock()
    assert clock.best is None
    assert clock.ours_s(robot_s=1e6, received_s=5.0) == 5.0
    assert clock.way_s == 0.0


def test_with_equal_ways_the_offset_is_exact() -> None:
    clock = clock_of(1000.0, (10.0, 0.02, 0.02))
    assert clock.best is not None
    assert clock.best.offset_s == pytest.approx(1000.0)
    assert clock.way_s == pytest.approx(0.02)
    assert clock.ours_s(robot_s=1020.0, received_s=21.0) == pytest.approx(20.0)


@given(st.floats(-1e5, 1e5), st.lists(st.tuples(st.floats(0, 1e4), ways_s, ways_s), min_size=1, max_size=16))
@settings(max_examples=100, deadline=None)
def test_the_offset_is_known_to_within_half_the_quickest_round_trip(offset_s: float, exchanges) -> None:
    clock = clock_of(offset_s, *exchanges)
    best = clock.best
    assert best is not None
    assert best.round_trip_s == pytest.approx(min(up + down for _, up, down in exchanges), abs=1e-9)
    assert abs(best.offset_s - offset_s) <= best.round_trip_s / 2 + 1e-9


@given(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5), st.tuples(st.floats(0, 1e4), ways_s, ways_s))
@settings(max_examples=60, deadline=None)
def test_nothing_was_captured_after_it_came(offset_s: float, robot_s: float, exchange) -> None:
    assert clock_of(offset_s, exchange).ours_s(robot_s, received_s=7.0) <= 7.0


def test_a_slow_answer_does_not_spoil_what_a_quick_one_told() -> None:
    clock = clock_of(3.0, (0.0, 0.01, 0.01), (1.0, 2.0, 0.0), (4.0, 0.0, 5.0))
    assert clock.ours_s(robot_s=13.0, received_s=99.0) == pytest.approx(10.0)


def test_clocks_drift_so_old_answers_are_forgotten() -> None:
    clock = clock_of(0.0, (0.0, 0.001, 0.001))
    for second in range(16):
        clock.answered(second, second + 0.01 + 5.0, second + 0.02)
    assert clock.best is not None
    assert clock.best.offset_s == pytest.approx(5.0)


def test_an_answer_from_before_its_question_is_none() -> None:
    clock = RobotClock()
    clock.answered(sent_s=10.0, robot_s=3.0, received_s=9.0)
    assert clock.best is None
