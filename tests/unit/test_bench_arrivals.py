"""When robots of a load test send."""

import numpy as np
import pytest

from policy_client.bench.arrivals import Bursts, Periodic, Poisson, Ramp, Trace, read_arrivals

SEED = 11
PATTERNS = (
    Periodic(20.0),
    Poisson(20.0),
    Bursts(20.0, 4),
    Ramp(1.0, 39.0),
    Ramp(39.0, 1.0),
    Trace(((0.5, 0.7), (0.1,))),
)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_times_depend_on_seed_and_robot_alone_and_lie_in_order_within_the_test(pattern) -> None:
    times = pattern.times(3, 10.0, SEED)
    np.testing.assert_array_equal(times, pattern.times(3, 10.0, SEED))
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < 10.0)).all()


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=repr)
def test_many_robots_send_at_the_mean_rate(pattern) -> None:
    sent = sum(len(pattern.times(robot, 20.0, SEED)) for robot in range(50))
    assert sent / (50 * 20.0) == pytest.approx(pattern.rate_at(20.0), rel=0.03)


def test_robots_with_the_same_rate_have_phases_of_their_own() -> None:
    first = [Periodic(10.0).times(robot, 1.0, SEED)[0] for robot in range(20)]
    assert len(set(first)) == 20
    assert np.ptp(first) > 0.05


def test_a_burst_is_sent_at_one_moment() -> None:
    times = Bursts(20.0, 4).times(0, 10.0, SEED)
    assert (times.reshape(-1, 4) == times.reshape(-1, 4)[:, :1]).all()
    np.testing.assert_allclose(np.diff(times[::4]), 0.2)


def test_poisson_pauses_vary_as_much_as_they_last() -> None:
    pauses = np.diff(Poisson(100.0).times(0, 100.0, SEED))
    assert pauses.std() / pauses.mean() == pytest.approx(1.0, abs=0.05)


def test_a_ramp_sends_ever_more_often() -> None:
    times = Ramp(10.0, 90.0).times(0, 10.0, SEED)
    assert len(times) == pytest.approx(500, abs=1)
    # Half way the integral of the rate is 10 * 5 + 80 / 10 * 25 / 2.
    assert np.searchsorted(times, 5.0) == pytest.approx(150, abs=1)


def test_a_trace_is_read_and_replayed_robot_by_robot(tmp_path) -> None:
    path = tmp_path / "trace"
    path.write_text("# seconds robot\n0.5 left\n0.1, right\n0.2 left\n\n")
    trace = read_arrivals(f"trace:{path}", 1.0)
    np.testing.assert_array_equal(trace.times(0, 10.0, SEED), [0.2, 0.5])
    np.testing.assert_array_equal(trace.times(1, 10.0, SEED), [0.1])
    np.testing.assert_array_equal(trace.times(2, 0.3, SEED), [0.2])


def test_a_trace_that_cannot_be_read_is_refused_with_its_line(tmp_path) -> None:
    path = tmp_path / "trace"
    path.write_text("0.5 left\nsoon\n")
    with pytest.raises(ValueError, match="line 2: 'soon', expected 'seconds' or 'seconds robot'"):
        read_arrivals(f"trace:{path}", 1.0)


@pytest.mark.parametrize("text", ["", "often", "bursts:0", "bursts", "ramp:5", "ramp:-1..2", "ramp:0..0", "periodic:3"])
def test_a_pattern_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected periodic, poisson, bursts:SIZE"):
        read_arrivals(text, 1.0)
