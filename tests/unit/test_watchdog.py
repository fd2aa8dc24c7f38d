"""What a robot does once its actions have run out."""

from __future__ import annotations

import numpy as np
import pytest

from policy_client import Call, Hold, RampTo, RampToZero

LAST = np.array([1.0, -2.0], np.float32)


def test_hold_repeats_the_last_action():
    assert Hold().action(LAST, 5.0) is LAST


@pytest.mark.parametrize(
    ("stalled_s", "wanted"), [(0.0, [1.0, -2.0]), (0.5, [0.5, -1.0]), (1.0, [0.0, 0.0]), (9.0, [0.0, 0.0])]
)
def test_a_ramp_to_zero_is_a_straight_line(stalled_s, wanted):
    action = RampToZero(1.0).action(LAST, stalled_s)
    assert action.dtype == np.float32
    assert action.tolist() == wanted


@pytest.mark.parametrize(("value", "wanted"), [(3.0, [2.0, 0.5]), ((3.0, 0.0), [2.0, -1.0])])
def test_a_ramp_ends_where_it_is_told_to(value, wanted):
    assert RampTo(value, 1.0).action(LAST, 0.5).tolist() == wanted


def test_a_ramp_that_takes_no_time_is_at_its_end_at_once():
    assert RampTo(7.0, 0.0).action(LAST, 0.0).tolist() == [7.0, 7.0]


def test_a_call_is_told_the_last_action_and_for_how_long_there_was_none():
    assert Call(lambda last, stalled_s: last * stalled_s).action(LAST, 2.0).tolist() == [2.0, -4.0]
