"""The load test reports what a server's stalls cost its robots, all of it; a closed loop would hide it."""

import numpy as np
import pytest

from policy_client.bench.arrivals import Periodic, Poisson
from tests.unit.bench_results import stalled, virtual_result

EVERY_S, STALL_S, SERVICE_S = 10.0, 0.5, 0.002


def true_quantile_ms(share: float) -> float:
    """Of the latency over moments of a period: 1 - share of them fall so soon after a stall began."""
    return 1e3 * (STALL_S - (1 - share) * EVERY_S + SERVICE_S)


@pytest.mark.parametrize("arrivals", [Periodic(50.0), Poisson(50.0)], ids=repr)
def test_p99_and_p999_of_a_server_with_known_stalls_are_within_two_percent_of_the_truth(arrivals) -> None:
    latency = virtual_result(arrivals, stalled(EVERY_S, STALL_S, SERVICE_S), robots=40, seconds=200.0).latency
    assert latency.p50_ms == pytest.approx(1e3 * SERVICE_S, rel=0.02)
    assert latency.p99_ms == pytest.approx(true_quantile_ms(0.99), rel=0.02)
    assert latency.p99_9_ms == pytest.approx(true_quantile_ms(0.999), rel=0.02)


def test_a_closed_loop_on_the_same_server_sees_next_to_nothing_of_the_stalls() -> None:
    delay_s = stalled(EVERY_S, STALL_S, SERVICE_S)
    now_s, latencies_s = 0.001, []
    while now_s < 200.0:  # the next question waits for the answer, as wrk's does
        latencies_s.append(float(delay_s(np.array(now_s))))
        now_s += latencies_s[-1]
    assert np.quantile(latencies_s, 0.99) == pytest.approx(SERVICE_S, rel=0.02)
    assert np.quantile(latencies_s, 0.999) == pytest.approx(SERVICE_S, rel=0.02)


def test_what_is_never_answered_counts_as_slower_than_anything() -> None:
    def delay_s(due_s: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(due_s)) % 50 == 0, np.nan, 0.003)  # 2 %

    result = virtual_result(Periodic(50.0), delay_s)
    assert result.latency.p90_ms == pytest.approx(3, rel=0.01)
    assert result.latency.p99_ms == 3_600_000
    assert result.missed_share == pytest.approx(0.02)
    assert result.failures == {"no_answer": result.asked - result.answered}
