"""What a terminal shows of a load test."""

import numpy as np

from policy_client.bench import table
from policy_client.bench.arrivals import Periodic
from tests.unit.bench_results import virtual_result


def test_the_table_names_every_figure_and_lines_up() -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.02))
    lines = table.lines(result)
    rows = lines[2 : lines.index("", 2)]
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split() == ["latency", *["20.0", "ms"] * 5]
    assert lines[-3:] == list(table.tallies(result))


def test_what_failed_is_told_by_name() -> None:
    result = virtual_result(Periodic(10.0), lambda due_s: np.where(due_s < 1.0, np.nan, 0.02))
    assert table.tallies(result)[-1] == "never answered: no_answer 40"


def test_a_machine_that_sends_late_casts_doubt_on_its_figures() -> None:
    late = virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.02), sent_late_s=0.005)
    assert "too slow" in table.doubts(late)[0]
    assert table.doubts(virtual_result(Periodic(10.0), lambda due_s: np.full(len(due_s), 0.02))) == ()
