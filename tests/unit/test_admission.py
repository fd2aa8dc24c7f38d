"""What robots are promised, and when a robot is told that it cannot be had."""

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_server.errors import RateTooHigh
from policy_server.runtime.admission import Admission


class Robot:
    """Stands for a session."""


def test_four_fifths_of_what_is_possible_can_be_promised() -> None:
    admission = Admission(lambda: 100.0)
    assert admission.left_hz() == 80.0
    one, other = Robot(), Robot()
    admission.promise(one, 50.0)
    assert admission.left_hz() == 30.0
    admission.promise(other, 30.0)
    assert admission.left_hz() == 0.0


def test_a_rate_that_cannot_be_had_is_refused_with_what_is_left() -> None:
    admission, one, other = Admission(lambda: 100.0), Robot(), Robot()
    admission.promise(one, 47.77)
    with pytest.raises(RateTooHigh, match=r"40 chunks a second cannot be held, 32\.2 are left"):
        admission.promise(other, 40.0)
    assert admission.left_hz() == pytest.approx(32.23)


def test_what_a_refusal_says_is_left_can_be_had() -> None:
    admission, one, other = Admission(lambda: 123.456), Robot(), Robot()
    admission.promise(one, 50.0)
    with pytest.raises(RateTooHigh) as refused:
        admission.promise(other, 1000.0)
    admission.promise(other, float(str(refused.value).split("held, ")[1].split(" are left")[0]))


def test_a_robot_that_asks_again_has_its_new_rate_in_place_of_the_old_one() -> None:
    admission, robot = Admission(lambda: 100.0), Robot()
    admission.promise(robot, 70.0)
    assert admission.left_hz(robot) == 80.0, "its own promise is not in its way"
    admission.promise(robot, 80.0)
    assert admission.left_hz() == 0.0
    with pytest.raises(RateTooHigh):
        admission.promise(robot, 81.0)
    assert admission.left_hz() == 0.0, "what was promised before stays"
    admission.promise(robot, 10.0)
    assert admission.left_hz() == 70.0


def test_a_promise_ends_when_it_is_released_and_releasing_twice_is_no_error() -> None:
    admission, robot = Admission(lambda: 100.0), Robot()
    admission.promise(robot, 70.0)
    admission.release(robot)
    admission.release(robot)
    assert admission.left_hz() == 80.0


def test_a_promise_ends_with_its_robot() -> None:
    admission, robot = Admission(lambda: 100.0), Robot()
    admission.promise(robot, 70.0)
    del robot
    gc.collect()
    assert admission.left_hz() == 80.0


def test_a_machine_that_became_slower_promises_nothing_more() -> None:
    capacity_hz = [100.0]
    admission, robot = Admission(lambda: capacity_hz[0]), Robot()
    admission.promise(robot, 70.0)
    capacity_hz[0] = 50.0
    assert admission.left_hz() == 0.0
    with pytest.raises(RateTooHigh, match="0 are left"):
        admission.promise(Robot(), 1.0)


def test_what_was_never_measured_has_no_limit() -> None:
    admission, robot = Admission(lambda: float("inf")), Robot()
    admission.promise(robot, 1e9)
    assert admission.left_hz() == float("inf")


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 100.0)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_never_is_more_promised_than_may_be(wishes) -> None:
    admission, robots, held = Admission(lambda: 100.0), [Robot() for _ in range(4)], [0.0] * 4
    for place, rate_hz in wishes:
        try:
            admission.promise(robots[place], rate_hz)
            held[place] = rate_hz
        except RateTooHigh:
            assert sum(held) - held[place] + rate_hz > 80.0 - 1e-9
        assert sum(held) <= 80.0 + 1e-9
        assert admission.left_hz() == pytest.approx(80.0 - sum(held), abs=1e-9)


def test_what_was_promised_is_promised_again_on_a_machine_that_became_slower() -> None:
    capacity_hz = 100.0
    admission, robot, other = Admission(lambda: capacity_hz), Robot(), Robot()
    admission.promise(robot, 50.0)
    capacity_hz = 20.0
    admission.promise(robot, 50.0)  # it comes back after its connection broke
    admission.promise(robot, 40.0)
    with pytest.raises(RateTooHigh):
        admission.promise(robot, 60.0)
    with pytest.raises(RateTooHigh):
        admission.promise(other, 1.0)
