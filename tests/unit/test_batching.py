"""Which calls are run next, together."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_models.program import GraphCall
from policy_server.runtime.batching import Shares, Work, choose, kind_of
from policy_server.runtime.costs import MOST_ROWS, Costs, Kind

CHEAP_TOGETHER = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3, 16: 1.4}
NO_CHEAPER_TOGETHER = {1: 1.0, 2: 2.5, 4: 5.5, 8: 12.0, 16: 25.0}


def costs_of(*, mixed=None, graph="denoise", **by_rows) -> Costs:
    costs = Costs()
    for kind, took in ((Kind(graph, mixed=False), by_rows["same"]), (Kind(graph, mixed=True), mixed)):
        for rows, took_s in (took or {}).items():
            costs.measure(kind, rows, took_s)
    return costs


def call(graph="denoise", *, rows=1, width=2, way=None, gradient=False, dtype=np.float32) -> GraphCall:
    x = np.zeros((rows, width), dtype)
    return GraphCall(graph, {"x": x}, way, x if gradient else None)


def work(deadline_s=1e9, tenant="a", needs_s=1.0, **of_call) -> Work:
    return Work(call(**of_call), deadline_s, tenant, needs_s)


def queue(count, **of_call) -> list[Work]:
    """Return works with time enough, the most urgent first."""
    return [work(1e6 + i, **of_call) for i in range(count)]


def chosen(waiting, costs=None, shares=None, now_s=0.0) -> list[int]:
    """Return the places in `waiting` of what is chosen."""
    batch = choose(waiting, costs or Costs(), shares or Shares(), now_s)
    return [next(i for i, other in enumerate(waiting) if other is picked) for picked in batch]


def test_the_earliest_deadline_is_first_and_the_others_follow_in_their_order() -> None:
    assert chosen([work(5.0), work(3.0), work(4.0)]) == [1, 2, 0]


def test_the_most_urgent_decides_about_the_graph() -> None:
    waiting = [work(5.0), work(3.0, graph="perceive"), work(4.0), work(6.0, graph="perceive")]
    assert chosen(waiting) == [1, 3]


@pytest.mark.parametrize(
    "other",
    [{"graph": "perceive"}, {"width": 3}, {"gradient": True}, {"dtype": np.float64}],
    ids=["graph", "shape", "gradient", "dtype"],
)
def test_what_cannot_be_rows_of_one_run_is_never_mixed(other) -> None:
    assert chosen([work(1.0), work(2.0, **other), work(3.0)]) == [0, 2]


def test_gradients_share_runs_with_each_other() -> None:
    waiting = [work(1.0, gradient=True), work(2.0), work(3.0, gradient=True)]
    assert chosen(waiting) == [0, 2]
    assert kind_of([waiting[0], waiting[2]]) == Kind("gradient of denoise", mixed=False)


def test_a_run_grows_for_as_long_as_a_row_gets_cheaper() -> None:
    waiting = queue(12)
    assert len(chosen(waiting, costs_of(same=CHEAP_TOGETHER))) == 12
    assert len(chosen(waiting, costs_of(same=NO_CHEAPER_TOGETHER))) == 1
    best_at_four = {1: 1.0, 2: 1.2, 4: 1.4, 8: 4.0, 16: 9.0}
    assert chosen(waiting, costs_of(same=best_at_four)) == [0, 1, 2, 3]


def test_a_run_has_no_more_rows_than_were_measured() -> None:
    waiting = queue(40)
    assert len(chosen(waiting, costs_of(same=CHEAP_TOGETHER))) == MOST_ROWS
    assert len(chosen(waiting)) == MOST_ROWS, "nor where nothing is known yet"


def test_rows_count_and_not_calls() -> None:
    waiting = queue(12, rows=2)
    assert len(chosen(waiting, costs_of(same=CHEAP_TOGETHER))) == 8
    assert len(chosen(waiting, costs_of(same=NO_CHEAPER_TOGETHER))) == 1, "a call is never split"


def test_robots_at_other_steps_are_left_for_later_where_mixing_ways_costs_more_a_row() -> None:
    waiting = [work(1e6, way=80.0), work(2e6, way=0.1), work(3e6, way=80.0)]
    dear = costs_of(same=CHEAP_TOGETHER, mixed={2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0})
    assert chosen(waiting, dear) == [0, 2]
    nearly_free = costs_of(same=CHEAP_TOGETHER, mixed={2: 1.2, 4: 1.3, 8: 1.4, 16: 1.5})
    assert chosen(waiting, nearly_free) == [0, 1, 2]


def test_one_that_goes_its_own_way_is_joined_if_that_is_cheaper_than_going_alone() -> None:
    waiting = [work(1e5, way=80.0), *queue(7, way=0.1)]
    assert chosen(waiting, costs_of(same=CHEAP_TOGETHER, mixed={2: 1.5, 4: 2.0, 8: 3.0})) == list(range(8))
    assert chosen(waiting, costs_of(same=CHEAP_TOGETHER, mixed={2: 3.0, 4: 6.0, 8: 12.0})) == [0]


def test_nobody_joins_if_the_first_would_miss_its_deadline_for_it() -> None:
    costs = costs_of(same={1: 1.0, 2: 1.5, 4: 2.0, 8: 2.5, 16: 3.0})
    waiting = [work(10.0), *(work(1000.0 + i) for i in range(15))]
    assert len(chosen(waiting, costs, now_s=7.0)) == 16
    assert len(chosen(waiting, costs, now_s=7.9)) == 4
    assert len(chosen(waiting, costs, now_s=8.9)) == 1


def test_all_that_the_first_needs_yet_is_counted_as_slowed_by_the_others() -> None:
    costs = costs_of(same={1: 1.0, 2: 1.5, 4: 2.0, 8: 2.5, 16: 3.0})
    others = [work(1000.0 + i) for i in range(15)]
    assert len(chosen([work(31.0, needs_s=10.0), *others], costs)) == 16
    assert len(chosen([work(16.0, needs_s=10.0), *others], costs)) == 2
    assert len(chosen([work(9.0, needs_s=10.0), *others], costs)) == 1, "one that will be late is run all the same"


@given(
    st.lists(
        st.builds(
            work,
            deadline_s=st.floats(0, 10),
            tenant=st.sampled_from("abc"),
            needs_s=st.floats(0, 10),
            graph=st.sampled_from(["denoise", "perceive"]),
            rows=st.integers(1, 3),
            way=st.sampled_from([None, 1.0, 2.0]),
            gradient=st.booleans(),
        ),
        min_size=1,
        max_size=20,
    ),
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 5)),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_is_some_of_what_waits_and_all_of_it_fits(waiting, used_s) -> None:
    batch = choose(waiting, costs_of(same=CHEAP_TOGETHER), shares_of(**used_s), now_s=0.0)
    assert len(set(map(id, batch))) == len(batch) >= 1
    assert set(map(id, batch)) <= set(map(id, waiting))
    assert len({(w.call.graph, w.call.cotangent is None, w.call.inputs["x"].shape[1:]) for w in batch}) == 1
    assert len(batch) == 1 or sum(len(w.call.inputs["x"]) for w in batch) <= MOST_ROWS


def test_a_tenant_that_has_had_less_goes_before_an_earlier_deadline() -> None:
    waiting = [work(1.0, "a"), work(2.0, "a"), work(9.0, "b"), work(8.0, "b")]
    assert chosen(waiting, shares=shares_of(a=3.0, b=1.0)) == [3, 0, 2, 1], "nobody has two turns before all have one"


def test_one_that_floods_has_no_more_turns_in_a_run_than_the_second_busiest() -> None:
    waiting = [*(work(1.0 + i, "flood") for i in range(9)), work(50.0, "a"), work(60.0, "a"), work(70.0, "b")]
    assert sorted(chosen(waiting)) == [0, 1, 9, 10, 11]


def test_a_run_is_charged_to_those_who_shared_it() -> None:
    shares = shares_of(b=1.0)
    shares.charge([work(tenant="a"), work(tenant="a"), work(tenant="b"), work(tenant="a")], 4.0)
    assert (shares.used_s("a"), shares.used_s("b")) == (3.0, 2.0)


def test_a_tenant_that_was_away_is_owed_nothing_and_owes_nothing() -> None:
    shares = Shares()
    shares.enter("a")
    for _ in range(100):
        shares.charge([work(tenant="a")], 1.0)
    shares.enter("b")
    assert (shares.used_s("a"), shares.used_s("b")) == (100.0, 99.0), "what the last run began with"


def test_a_tenant_that_comes_back_at_once_has_lost_nothing_and_gained_nothing() -> None:
    shares = Shares()
    shares.enter("ahead")
    shares.enter("behind")
    shares.charge([work(tenant="ahead")], 5.0)
    shares.charge([work(tenant="behind")], 1.0)
    for tenant in ("behind", "ahead"):
        shares.leave(tenant)
        shares.enter(tenant)
        assert (shares.used_s("ahead"), shares.used_s("behind")) == (5.0, 1.0)


def test_nobody_is_ahead_once_nobody_has_anything_to_do() -> None:
    shares = Shares()
    shares.enter("a")
    shares.charge([work(tenant="a")], 5.0)
    shares.leave("a")
    assert shares.used_s("a") == 0


def shares_of(**used_s: float) -> Shares:
    shares = Shares()
    for tenant, seconds in used_s.items():
        shares.charge([work(tenant=tenant)], seconds)
    return shares


def seconds_had(robots: dict[str, int], graphs: dict[str, str], costs: Costs, runs: int = 3000) -> Counter:
    """Let each tenant's robots ask again as soon as they are answered, chunks of three calls; return its seconds."""
    shares, had, now_s, waiting = Shares(), Counter(), 0.0, []

    def ask(tenant: str) -> None:
        shares.enter(tenant)
        waiting.append(work(now_s + 1000.0, tenant, needs_s=3.0, graph=graphs[tenant]))

    for tenant in itertools.chain.from_iterable([name] * count for name, count in robots.items()):
        ask(tenant)
    for _ in range(runs):
        batch = choose(waiting, costs, shares, now_s)
        took_s = costs.of_s(kind_of(batch), len(batch))
        shares.charge(batch, took_s)
        now_s += took_s
        for done in batch:
            had[done.tenant] += took_s / len(batch)
            done.needs_s -= 1.0
        finished = [done for done in batch if not done.needs_s]
        waiting = [other for other in waiting if other.needs_s]
        for done in finished:
            shares.leave(done.tenant)
        for done in finished:
            ask(done.tenant)
    return had


def test_a_flood_of_one_tenant_takes_about_half_of_the_engines_time() -> None:
    costs = costs_of(same={rows: 1e-3 * takes for rows, takes in NO_CHEAPER_TOGETHER.items()})
    had = seconds_had({"flood": 40, "one": 3}, {"flood": "denoise", "one": "denoise"}, costs)
    assert had["one"] / had.total() == pytest.approx(0.5, abs=0.05)


def test_shares_are_of_time_and_not_of_runs() -> None:
    costs = costs_of(same={1: 0.010, 16: 0.160}, graph="perceive")
    costs.measure(Kind("denoise", mixed=False), 1, 0.001)
    costs.measure(Kind("denoise", mixed=False), 16, 0.016)
    had = seconds_had({"dear": 20, "cheap": 4}, {"dear": "perceive", "cheap": "denoise"}, costs)
    assert had["cheap"] / had.total() == pytest.approx(0.5, abs=0.08)  # a dear run is a tenth of what is remembered


def test_what_waits_is_shared_among_the_threads_that_want_some() -> None:
    assert len(choose(queue(8), costs_of(same=CHEAP_TOGETHER), Shares(), 0.0, takers=2)) == 4
    assert len(choose(queue(1), costs_of(same=CHEAP_TOGETHER), Shares(), 0.0, takers=2)) == 1
