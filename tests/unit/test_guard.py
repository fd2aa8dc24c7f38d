"""What leaves for a robot is finite and within its limits, or does not leave."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from policy_models.spec import Box, MotionLimits, PolicySpec, VectorSpec
from policy_server.errors import LimitsViolated, NonFiniteActions
from policy_server.runtime.fallbacks import FALLBACKS, Hold, LastGood
from policy_server.runtime.guard import Guard

H, A, STEP_S = 8, 2, 0.05
ARM = VectorSpec(("a", "b"), ("rad", "m"), (-1.0, 0.0), (1.0, 0.5))
FREE = VectorSpec(("a", "b"), ("rad", "m"))
NONE = np.empty((0, A), dtype=np.float32)

numbers = st.floats(-1e6, 1e6, width=32)
near = st.floats(-2, 2, width=32)


def chunks(elements: st.SearchStrategy[float] = numbers, rows: int = H) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (rows, A), elements=elements)


def spec(action: VectorSpec = ARM, **motion: object) -> PolicySpec:
    return PolicySpec(action=action, horizon=H, step_s=STEP_S, motion=MotionLimits(**motion) if motion else None)


def derivative(rows: np.ndarray, order: int) -> np.ndarray:
    """Return the largest absolute derivative of each number, (A,), and what rounding to float32 may add to it."""
    if len(rows) <= order:
        return np.zeros((2, A))
    largest = np.abs(np.diff(rows.astype(np.float64), order, axis=0)).max(axis=0)
    rounding = 2**order * np.finfo(np.float32).eps * np.abs(rows).max(axis=0)
    return np.stack([largest, rounding]) / STEP_S**order


@given(chunks())
def test_nothing_passes_the_limits_and_what_moved_is_counted(actions) -> None:
    guarded = Guard("p", spec()).check(actions)
    assert (guarded.actions >= np.float32(ARM.low)).all()
    assert (guarded.actions <= np.float32(ARM.high)).all()
    assert guarded.report.clamped == np.count_nonzero(guarded.actions != actions)
    assert sum(guarded.report.by.values()) == guarded.report.clamped


def test_actions_without_limits_pass_as_they_are() -> None:
    actions = np.float32([[1e9, -1e9]])
    guarded = Guard("p", spec(FREE)).check(actions)
    assert guarded.actions is actions
    assert guarded.report.clamped == 0
    assert guarded.report.by == {}
    assert guarded.report.worst is None


@given(
    chunks(),
    chunks(near, rows=3),
    st.integers(0, 3),
    st.floats(0.1, 10),
    st.floats(0.1, 100),
    st.one_of(st.none(), st.floats(1, 10)),
)
def test_limits_of_motion_that_can_be_met_together_are_met(
    actions, before, known, velocity, acceleration, jerk
) -> None:
    # With enough jerk to end any acceleration within a step, each row has room whatever the row before it did.
    jerk_limit = None if jerk is None else jerk * acceleration / STEP_S
    limits = {"velocity": velocity, "acceleration": acceleration, "jerk": jerk_limit}
    before = before[3 - known :]
    for order, limit in enumerate(limits.values(), 1):
        assume(limit is None or (derivative(before, order)[0] <= limit).all())
    guard = Guard("p", spec(FREE, **{kind: (limit, limit) for kind, limit in limits.items()}))
    guarded = guard.check(actions, before)
    rows = np.concatenate([before, guarded.actions])
    for order, limit in enumerate(limits.values(), 1):
        largest, rounding = derivative(rows, order)
        assert limit is None or (largest <= limit * (1 + 1e-9) + rounding).all()
    assert guarded.report.unmet == 0


@given(chunks(), chunks(near, rows=1), st.floats(0.1, 10))
def test_velocity_and_position_are_met_together(actions, before, velocity) -> None:
    before = np.clip(before, np.float32(ARM.low), np.float32(ARM.high))
    guarded = Guard("p", spec(velocity=(velocity, None))).check(actions, before).actions
    assert ((guarded >= np.float32(ARM.low)) & (guarded <= np.float32(ARM.high))).all()
    largest, rounding = derivative(np.concatenate([before, guarded]), 1)
    assert largest[0] <= velocity * (1 + 1e-9) + rounding[0]
    np.testing.assert_array_equal(guarded[:, 1], np.clip(actions[:, 1], *np.float32([0.0, 0.5])))


def _intervals(history: np.ndarray, limits: dict[str, float], column: int) -> list[tuple[float, float]]:
    """Return what each kind of limit allows the row after three, the last to win last."""
    x3, x2, x1 = history[-3:, column].astype(np.float64)
    centres = {"jerk": 3 * x1 - 3 * x2 + x3, "acceleration": 2 * x1 - x2, "velocity": x1}
    reaches = {kind: limits[kind] * STEP_S ** (3 - k) for k, kind in enumerate(centres)}
    box = (-0.5, 0.5) if column == 0 else (-np.inf, np.inf)
    return [
        *((centres[k] - reaches[k], centres[k] + reaches[k]) for k in centres),
        box,
        (ARM.low[column], ARM.high[column]),
    ]


@given(chunks(near), chunks(near, rows=3), *[st.floats(0.1, limit) for limit in (10, 100, 1000)])
def test_each_row_is_within_its_limits_and_the_one_that_comes_last_wins(
    actions, before, velocity, acceleration, jerk
) -> None:
    limits = {"velocity": velocity, "acceleration": acceleration, "jerk": jerk}
    everywhere = {kind: (limit, limit) for kind, limit in limits.items()}
    guard = Guard("p", spec(**everywhere, workspace=Box(("a",), (-0.5,), (0.5,))))
    rows = np.concatenate([before, guard.check(actions, before).actions])
    for i in range(H):
        for column in range(A):
            clipped, intervals = float(rows[3 + i, column]), _intervals(rows[: 3 + i], limits, column)
            for low, high in intervals:
                clipped = min(max(clipped, low), high)
            # It is what clipping makes of it: within all limits that have room for each other, and else in the last.
            assert rows[3 + i, column] == pytest.approx(clipped, abs=2e-5)
    assert (rows[3:] <= np.float32(ARM.high)).all()


@given(chunks(near), chunks(near, rows=3), *[st.floats(0.1, limit) for limit in (10, 100, 1000)])
def test_a_chunk_within_its_limits_passes_as_it_is(actions, before, velocity, acceleration, jerk) -> None:
    motion = {"velocity": (velocity,) * A, "acceleration": (acceleration,) * A, "jerk": (jerk,) * A}
    guard = Guard("p", spec(**motion))
    once = guard.check(actions, before)
    assume(once.report.unmet == 0)
    again = guard.check(once.actions, before)
    np.testing.assert_array_equal(again.actions, once.actions)
    assert again.report.clamped == 0
    assert again.report.by == {}
    assert guard.counts.clamped_chunks <= 1


@pytest.mark.parametrize("jump", [2, 10, 40, 500])
@pytest.mark.parametrize("jerk", [None, 1.0, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("velocity", [None, 3.0])
def test_a_jump_becomes_a_motion_that_ends_where_it_should(velocity, jerk, jump) -> None:
    motion = MotionLimits((velocity,), (1.0,), (jerk,))
    guard = Guard("p", PolicySpec(action=VectorSpec(("x",), ("m",)), horizon=1000, step_s=1.0, motion=motion))
    guarded = guard.check(np.full((1000, 1), jump, dtype=np.float32), np.zeros((3, 1), dtype=np.float32))
    assert guarded.actions.max() <= 1.03 * jump
    np.testing.assert_allclose(guarded.actions[-500:], jump, rtol=1e-3)
    assert guarded.report.unmet == 0


def test_a_moving_target_is_caught_up_with() -> None:
    guard = Guard(
        "p", PolicySpec(action=FREE, horizon=200, step_s=1.0, motion=MotionLimits((), (1.0, 1.0), (0.5, 0.5)))
    )
    target = np.stack([20 + 0.5 * np.arange(200), 20 + 20 * np.sin(0.1 * np.arange(200))], axis=1).astype(np.float32)
    guarded = guard.check(target, np.zeros((3, A), dtype=np.float32))
    np.testing.assert_allclose(guarded.actions[60:], target[60:], atol=0.2)


def test_a_robot_that_is_too_fast_for_the_wall_stops_there_and_the_report_says_so() -> None:
    guard = Guard("p", spec(acceleration=(1.0, None)))
    before = np.float32([[0.7, 0], [0.8, 0], [0.9, 0]])
    report = guard.check(np.full((H, A), [2.0, 0.0], dtype=np.float32), before)
    np.testing.assert_array_equal(report.actions[:, 0], np.float32(1.0))
    assert report.report.unmet > 0
    assert report.report.by["position"] == H


def test_rows_that_have_passed_are_not_held_to_how_the_robot_moves() -> None:
    guard = Guard("p", spec(velocity=(1.0, 1.0)))
    actions = np.zeros((H, A), dtype=np.float32)
    actions[:3, 0] = 0.9  # never played
    guarded = guard.check(actions, np.zeros((3, A), dtype=np.float32), first=3)
    assert guarded.report.clamped == 0
    assert guard.check(actions, np.zeros((3, A), dtype=np.float32)).report.by == {"velocity": 5}


def test_a_chunk_that_has_passed_is_held_to_its_position_alone() -> None:
    guard = Guard("p", spec(velocity=(1.0, 1.0)))
    report = guard.check(np.full((H, A), 2, dtype=np.float32), first=H).report
    assert report.by == {"position": 2 * H}
    assert report.worst is not None and report.worst.kind == "position"


def test_without_earlier_actions_the_first_row_may_be_anywhere() -> None:
    guard = Guard("p", spec(FREE, velocity=(1.0, 1.0), acceleration=(1.0, 1.0), jerk=(1.0, 1.0)))
    assert guard.check(np.full((H, A), 5, dtype=np.float32)).report.clamped == 0


@given(chunks(st.floats(width=32)), chunks(st.floats(width=32, allow_nan=False, allow_infinity=False), rows=3))
@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("mode", ["clamp", "refuse"])
def test_no_number_that_is_none_ever_passes(fallback, mode, actions, before) -> None:
    motion = {"velocity": (1.0, None), "acceleration": (None, 1.0), "jerk": (1.0, 1.0)}
    guard = Guard("p", spec(FREE, **motion), mode=mode, fallback=FALLBACKS[fallback]())
    try:
        assert np.isfinite(guard.check(actions, before, playing=before).actions).all()
    except NonFiniteActions:
        assert not np.isfinite(actions).all()
    except LimitsViolated:
        assert mode == "refuse"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_chunk_with_any_number_that_is_none_is_withheld(bad: float) -> None:
    guard = Guard("p", spec())
    actions = np.zeros((H, A), dtype=np.float32)
    actions[3, 1] = bad
    with pytest.raises(NonFiniteActions, match="policy 'p' produced actions that are not finite"):
        guard.check(actions)
    assert (guard.counts.chunks, guard.counts.refusals) == (1, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.0, -0.01], "a position of 'b' in row 2 of -0.01 m, allowed is 0 to 0.5"),
        ([0.0, 0.45], "a velocity of 'b' in row 2 of 9 m/s, allowed is -2 to 2"),
        ([-0.45, 0.0], "a workspace of 'a' in row 2 of -0.45 rad, allowed is -0.4 to 0.4"),
    ],
)
def test_a_refused_chunk_says_which_number_was_outside_of_which_limit(row, message: str) -> None:
    limits = {"velocity": (None, 2.0), "workspace": Box(("a",), (-0.4,), (0.4,))}
    guard = Guard("p", spec(**limits), mode="refuse")
    actions = np.zeros((H, A), dtype=np.float32)
    guard.check(actions)
    actions[2] = row
    with pytest.raises(LimitsViolated, match=f"policy 'p' produced {message}; the chunk was withheld"):
        guard.check(actions)
    assert guard.counts.refusals == 1


BAD = np.full((H, A), np.nan, dtype=np.float32)


def test_the_last_good_chunk_is_played_to_its_end_and_its_last_row_held() -> None:
    playing = np.float32([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
    guard = Guard("p", spec(), fallback=LastGood())
    guarded = guard.check(BAD, playing=playing)
    np.testing.assert_array_equal(guarded.actions[:3], playing)
    np.testing.assert_array_equal(guarded.actions[3:], np.repeat(playing[-1:], H - 3, axis=0))
    assert guarded.report.fallback == "last_good"
    assert guard.counts.fallbacks == {"last_good": 1}
    with pytest.raises(NonFiniteActions):
        guard.check(BAD, playing=NONE)


def test_the_last_action_is_held() -> None:
    before = np.float32([[0.0, 0.2], [0.1, 0.1]])
    guard = Guard("p", spec(), mode="refuse", fallback=Hold())
    guarded = guard.check(np.full((H, A), 3, dtype=np.float32), before)
    np.testing.assert_array_equal(guarded.actions, np.repeat(before[-1:], H, axis=0))
    assert guarded.report.fallback == "hold"
    assert guarded.report.worst is not None and guarded.report.worst.kind == "position"
    with pytest.raises(LimitsViolated):
        guard.check(np.full((H, A), 3, dtype=np.float32))


def test_a_fallback_brakes_within_the_limits_too() -> None:
    guard = Guard("p", spec(FREE, acceleration=(1.0, 1.0)), fallback=Hold())
    before = np.float32([[0.0, 0], [0.02, 0], [0.04, 0]])
    guarded = guard.check(BAD, before)
    largest, rounding = derivative(np.concatenate([before, guarded.actions]), 2)
    assert (largest <= 1.0 + rounding).all()
    assert guarded.report.clamped > 0


def test_chunks_are_counted_by_what_became_of_them() -> None:
    guard = Guard("p", spec(), fallback=Hold())
    guard.check(np.zeros((H, A), dtype=np.float32))
    guard.check(np.full((H, A), 2, dtype=np.float32))
    guard.check(BAD, np.zeros((1, A), dtype=np.float32))
    counts = guard.counts
    assert (counts.chunks, counts.clamped_chunks, counts.refusals) == (3, 1, 1)
    assert counts.clamped == {"position": 2 * H}


@pytest.mark.parametrize(
    ("motion", "message"),
    [
        ({"velocity": (1.0,)}, "motion.velocity has 1 entries for 2 action names"),
        ({"jerk": (1.0, 0.0)}, "jerk limits must be positive numbers, or null for none, got 0.0"),
        ({"acceleration": (float("nan"), None)}, "acceleration limits must be positive"),
        ({"workspace": Box(("c",), (0.0,), (1.0,))}, "motion.workspace names 'c'; an action has 'a', 'b'"),
    ],
)
def test_limits_that_do_not_fit_the_action_are_refused(motion, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(spec(), motion=MotionLimits(**motion))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((("a",), (1.0,), (1.0,)), "'a': low must be below high"),
        ((("a",), (0.0,), (float("inf"),)), "both finite"),
        ((("a", "b"), (0.0,), (1.0, 1.0)), "low has 1 entries for 2 names"),
        ((("a", "a"), (0.0, 0.0), (1.0, 1.0)), "names that differ"),
    ],
)
def test_a_box_without_room_is_refused(box, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Box(*box)
