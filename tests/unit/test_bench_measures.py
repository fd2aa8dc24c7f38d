"""The figures of a load test, from what became of every observation."""

import json

import numpy as np
import pytest

from policy_client.bench.arrivals import Periodic
from policy_client.bench.distribution import Distribution, counts, decode, in_words, together
from policy_client.bench.measures import Fates
from policy_client.bench.result import json_schema, load_result, save_result
from tests.unit.bench_results import virtual_result

draw = np.random.default_rng(5)


def test_a_distribution_keeps_quantiles_to_three_digits() -> None:
    times_ms = draw.lognormal(2, 1, 5000)
    found = Distribution.of(times_ms)
    exact = np.quantile(times_ms, (0.5, 0.9, 0.99, 0.999), method="inverted_cdf")
    np.testing.assert_allclose((found.p50_ms, found.p90_ms, found.p99_ms, found.p99_9_ms), exact, rtol=2e-3)
    assert found.max_ms == times_ms.max()
    assert counts(decode(found.histogram))[1].sum() == 5000


def test_a_distribution_of_nothing_is_all_zero() -> None:
    assert Distribution.of([]).p99_ms == 0


def test_histograms_add_up() -> None:
    parts = [draw.uniform(1, 100, 50) for _ in range(3)]
    values_ms, counted = together([Distribution.of(part).histogram for part in parts])
    np.testing.assert_array_equal(counted.sum(axis=1), [50, 50, 50])
    whole_ms, often = counts(decode(Distribution.of(np.concatenate(parts)).histogram))
    np.testing.assert_array_equal(values_ms, whole_ms)
    np.testing.assert_array_equal(counted.sum(axis=0), often)


def test_answers_after_the_deadline_are_missed() -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: np.where(due_s < 5.0, 0.2, 0.01), seconds=20.0)
    assert result.answered == result.asked
    assert result.missed_share == pytest.approx(0.25, abs=0.01)


def test_jitter_is_what_answers_add_to_the_pauses_between_observations() -> None:
    even = virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.04))
    assert even.jitter.max_ms == pytest.approx(0, abs=1e-6)
    uneven = virtual_result(Periodic(10.0), lambda due_s: np.where(np.arange(len(due_s)) % 2, 0.02, 0.05), robots=1)
    assert uneven.jitter.p50_ms == pytest.approx(30, rel=0.01)


def test_a_chunk_ages_from_its_observation_until_the_next_chunk_comes() -> None:
    # Steps are taken at every phase between two answers, so ages are even between 30 and 130 ms.
    result = virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.03), robots=40, step_s=0.037)
    assert result.chunk_age.p50_ms == pytest.approx(80, abs=5)
    assert 120 < result.chunk_age.max_ms < 130.1
    assert result.starved == 0


def test_a_robot_whose_chunk_is_older_than_its_actions_is_starved() -> None:
    # Chunks hold 0.1 s, and are 0.05 to 0.25 s old.
    result = virtual_result(Periodic(5.0), lambda due_s: np.full(len(due_s), 0.05), robots=40, step_s=0.01, horizon=10)
    assert result.starved == pytest.approx(0.75, abs=0.05)


def test_stages_of_an_answer_and_what_lies_outside_make_up_its_latency() -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: draw.uniform(0.01, 0.09, len(due_s)))
    assert list(result.stages) == ["inference", "outside"]
    whole_ms = sum(stage.mean_ms for stage in result.stages.values())
    assert whole_ms == pytest.approx(result.latency.mean_ms)


def test_logs_of_processes_are_put_together_where_stages_differ() -> None:
    def log(robot: int, stage: str) -> dict:
        one = np.ones(1)
        return {
            "robot": np.array([robot]),
            **dict.fromkeys(("due_s", "sent_s", "received_s"), one),
            "superseded": np.array([False]),
            "horizon": np.array([4]),
            "stages_ms": {stage: one},
            "failures": {"overloaded": 2},
        }

    fates = Fates.of([log(0, "inference"), log(1, "waiting")])
    np.testing.assert_array_equal(fates.robot, [0, 1])
    np.testing.assert_array_equal(fates.stages_ms["waiting"], [np.nan, 1])
    assert fates.failures == {"overloaded": 4}


def test_a_result_comes_back_from_its_file(tmp_path) -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: draw.uniform(0.01, 0.09, len(due_s)))
    save_result(tmp_path / "result.json", result)
    assert load_result(tmp_path / "result.json") == result


def test_results_of_another_schema_and_other_files_are_refused(tmp_path) -> None:
    path = tmp_path / "result.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99, expected 1"):
        load_result(path)
    path.write_text('{"schema": 1, "made_at": "now"}')
    with pytest.raises(ValueError, match="no result of policy-bench"):
        load_result(path)


def test_the_schema_names_every_field_of_a_result(tmp_path) -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.03))
    save_result(tmp_path / "result.json", result)
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(json_schema()["$defs"]["Result"]["properties"]) == set(written)


@pytest.mark.parametrize(
    ("time_ms", "words"), [(0.25, "0.250 ms"), (12.345, "12.3 ms"), (1234.0, "1,234 ms"), (3_600_000.0, "never")]
)
def test_times_are_printed_with_units(time_ms: float, words: str) -> None:
    assert in_words(time_ms) == words
