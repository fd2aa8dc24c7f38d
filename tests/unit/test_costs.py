"""What runs cost, and what follows from it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_models.program import GraphCall
from policy_server.runtime.costs import ROWS, Costs, Kind, measure

SAME, MIXED = Kind("denoise", mixed=False), Kind("denoise", mixed=True)


def costs_of(by_rows: dict[int, float], kind: Kind = SAME, **more) -> Costs:
    costs = Costs(**more)
    for rows, took_s in by_rows.items():
        costs.measure(kind, rows, took_s)
    return costs


def test_nothing_is_known_of_what_never_ran() -> None:
    assert Costs().of_s(SAME, 4) == 0.0


def test_between_two_numbers_of_rows_it_is_a_straight_line_and_beyond_the_last_proportional() -> None:
    costs = costs_of({2: 3.0, 4: 5.0, 8: 6.0})
    assert costs.of_s(SAME, 2) == 3.0
    assert costs.of_s(SAME, 3) == 4.0
    assert costs.of_s(SAME, 6) == 5.5
    assert costs.of_s(SAME, 16) == 12.0
    assert costs.of_s(SAME, 1) == 3.0, "no less than what was seen"


def test_the_quickest_of_the_recent_runs_tells_how_quick_the_machine_is() -> None:
    costs = costs_of({1: 2.0, 2: 3.0})
    for took_s in (5.0, 2.0, 9.0):
        costs.note(SAME, 1, took_s)
    assert costs.of_s(SAME, 1) == 2.0
    for _ in range(20):
        costs.note(SAME, 1, 4.0)
    assert costs.of_s(SAME, 1) == 4.0, "a machine that became slower is believed in the end"
    assert costs.of_s(SAME, 2) == 6.0, "with any number of rows"


def test_the_quickest_of_what_was_measured_counts() -> None:
    costs = costs_of({1: 2.0})
    costs.measure(SAME, 1, 3.0)
    assert costs.of_s(SAME, 1) == 2.0
    costs.measure(SAME, 1, 1.0)
    assert costs.of_s(SAME, 1) == 1.0


def test_what_was_never_measured_is_known_by_its_first_run_under_load() -> None:
    costs = Costs()
    costs.note(SAME, 2, 3.0)
    assert costs.of_s(SAME, 4) == 6.0


@given(st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=40))
def test_runs_that_load_held_up_do_not_change_how_many_rows_are_best(took_s) -> None:
    """Sizes that are run would come to look dear and sizes that are not would look cheap, for ever."""
    costs = costs_of({1: 0.30, 2: 0.50, 4: 0.85, 8: 1.60})
    for each_s in took_s:
        costs.note(SAME, 8, each_s)
    assert costs.best_rows(SAME, 8) == 8


def test_more_rows_never_cost_less() -> None:
    costs = costs_of({1: 2.0, 2: 1.5, 4: 3.0})
    assert costs.of_s(SAME, 2) == 2.0


def test_a_mixed_run_that_was_never_seen_is_taken_to_cost_what_others_do() -> None:
    assert costs_of({1: 2.0}).of_s(MIXED, 1) == 2.0
    assert costs_of({1: 2.0}, MIXED).of_s(SAME, 1) == 2.0
    assert costs_of({1: 2.0}).of_s(Kind("perceive", mixed=False), 1) == 0.0


@pytest.mark.parametrize(
    ("by_rows", "best"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0, 16: 5.0}, 16),
        ({1: 1.0, 2: 2.1, 4: 4.5, 8: 9.5, 16: 20.0}, 1),
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 4.0, 16: 9.0}, 4),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 16),
        ({}, 16),
    ],
    ids=["the more the better", "alone", "a few", "a tie goes to the larger", "nothing known"],
)
def test_a_run_takes_the_rows_that_cost_the_least_each(by_rows, best: int) -> None:
    assert costs_of(by_rows).best_rows(SAME, 16) == best


@given(st.dictionaries(st.sampled_from(ROWS), st.floats(1e-4, 10.0), min_size=1), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_no_other_number_of_rows_would_have_been_better(by_rows, available: int) -> None:
    costs = costs_of(by_rows)
    best = costs.best_rows(SAME, available)
    assert 1 <= best <= available
    each = [costs.of_s(SAME, rows) / rows for rows in range(1, available + 1)]
    assert each[best - 1] == pytest.approx(min(each))


def test_capacity_is_that_of_the_number_of_robots_that_share_runs_best() -> None:
    costs = costs_of({1: 0.010, 2: 0.012, 4: 0.016, 8: 0.040, 16: 0.100}, chunk=[(SAME, 1)] * 5)
    assert costs.capacity_hz() == pytest.approx(4 / (5 * 0.016))


def test_capacity_counts_every_kind_of_run_of_a_chunk() -> None:
    perceive = Kind("perceive", mixed=False)
    costs = costs_of(dict.fromkeys(ROWS, 0.010), chunk=[(perceive, 1)] + [(SAME, 1)] * 10)
    for rows in ROWS:
        costs.measure(perceive, rows, 0.005 * rows)
    assert costs.capacity_hz() == pytest.approx(16 / (10 * 0.010 + 16 * 0.005))


def test_what_costs_nothing_has_no_limit() -> None:
    assert Costs().capacity_hz() == math.inf


class Scripted:
    """An engine whose runs take a second for each row, and two for each way, by its own clock."""

    name, precision, differentiable, most_runs = "scripted", "f32", False, 1

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ran = []

    def run(self, graph, inputs):
        rows, ways = len(inputs["x"]), len(np.unique(inputs["x"]))
        self.now_s += rows + 2.0 * ways
        self.ran.append((graph, rows, ways))
        return inputs

    def clock(self) -> float:
        return self.now_s

    def close(self) -> None:
        """Nothing to give back."""


def asked(graph: str, way=None, rows: int = 1) -> GraphCall:
    return GraphCall(graph, {"x": np.full((rows, 2), way or 0.0, np.float32)}, way)


def test_every_graph_is_measured_with_every_number_of_rows_and_ways_apart_and_mixed() -> None:
    engine = Scripted()
    costs = measure([asked("perceive"), asked("denoise", 3.0), asked("denoise", 1.0)], engine, engine.clock)
    assert costs.chunk == [(Kind("perceive", mixed=False), 1), (SAME, 1), (SAME, 1)]
    assert [costs.of_s(Kind("perceive", mixed=False), rows) for rows in ROWS] == [3, 4, 6, 10, 18]
    assert [costs.of_s(SAME, rows) for rows in ROWS] == [3, 4, 6, 10, 18]
    assert [costs.of_s(MIXED, rows) for rows in ROWS[1:]] == [6, 8, 12, 20]
    assert {rows for graph, rows, _ in engine.ran if graph == "denoise"} == set(ROWS)
    assert costs.measured_at_s > 0


def test_graphs_whose_calls_all_go_the_same_way_are_not_measured_twice() -> None:
    engine = Scripted()
    measure([asked("denoise")] * 3, engine, engine.clock)
    assert len(engine.ran) == 5 * len(ROWS)


def test_a_robot_whose_calls_have_two_rows_needs_twice_as_many() -> None:
    engine = Scripted()
    costs = measure([asked("denoise", rows=2)] * 4, engine, engine.clock)
    chunks = {robots: 4 * (2 * robots + 2.0) for robots in (1, 2, 4, 8)}
    assert costs.capacity_hz() == pytest.approx(max(robots / took_s for robots, took_s in chunks.items()))
