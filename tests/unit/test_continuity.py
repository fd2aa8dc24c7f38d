"""How a chunk goes on from the one that the robot is playing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_models.diffusion.continuity import prefix_weights
from policy_models.spec import PolicySpec, SamplerSpec, VectorSpec
from policy_server.errors import InvalidOption
from policy_server.runtime.continuity import (
    CONTINUITIES,
    REPLACE,
    Ensemble,
    Joint,
    Moment,
    RealTimeChunking,
    Replace,
    WarmStart,
    frozen_rows,
    joint,
    read_continuity,
)
from policy_server.runtime.track import Sent, Track

H, STEP_S = 8, 0.1
SPEC = PolicySpec(
    action=VectorSpec(("x", "y"), ("m", "m")),
    state=VectorSpec(("x",), ("m",)),
    horizon=H,
    step_s=STEP_S,
    sampler=SamplerSpec("ddim", "exponential", 3, 0.05, 1.0),
)
UNDENOISED = PolicySpec(action=SPEC.action, state=SPEC.state, horizon=H, step_s=STEP_S)


def sent(at_s: float, seed: int = 0, seq: int = 1) -> Sent:
    draw = np.random.default_rng(seed)
    said, actions = draw.standard_normal((2, H, 2), dtype=np.float32)
    return Sent(seq, at_s, said, actions)


def moment(at_s: float, delay_s: float = 0.0, playing: Sent | None = None, *, gradients: bool = False) -> Moment:
    return Moment(at_s, delay_s, playing, gradients)


def published(start: int, end: int, total: int, schedule: str) -> np.ndarray:
    """`get_prefix_weights` of the code published with the RTC paper, in numpy."""
    start = min(start, end)
    rows = np.arange(total)
    if schedule == "ones":
        w = np.ones(total)
    elif schedule == "zeros":
        w = (rows < start).astype(float)
    else:
        w = np.clip((start - 1 - rows) / (end - start + 1) + 1, 0, 1)
        if schedule == "exponential":
            w = w * np.expm1(w) / (math.e - 1)
    return np.where(rows >= end, 0, w)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "ones", "zeros"])
def test_weights_are_those_of_the_published_code(schedule) -> None:
    for total in (1, 4, 10):
        for end in range(total + 1):
            for start in range(end + 1):
                got = prefix_weights(total, start, end, schedule)
                assert got.dtype == np.float32
                np.testing.assert_allclose(got, published(start, end, total, schedule), atol=1e-6)


def test_weights_are_those_of_its_example() -> None:
    wanted = [1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0, 0, 0]
    np.testing.assert_allclose(prefix_weights(10, 2, 6, "linear"), wanted, atol=1e-6)


@given(
    st.integers(1, 30),
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from(["exponential", "linear", "ones", "zeros"]),
)
@settings(max_examples=100, deadline=None)
def test_frozen_rows_weigh_one_and_the_others_ever_less(total, frozen, overlap, schedule) -> None:
    weights = prefix_weights(total, frozen, overlap, schedule)
    assert (weights[:frozen] == 1).all()
    assert (weights[max(frozen, overlap) :] == 0).all()
    assert (np.diff(weights) <= 0).all()


@pytest.mark.parametrize(
    ("delay_s", "left_at_s", "frozen"),
    [
        (0.0, 0.0, 0),
        (1e-9, 0.0, 0),
        (0.05, 0.0, 1),
        (0.1, 0.0, 1),
        (0.1 * 3, 0.0, 3),
        (0.31, 0.0, 4),
        (5.0, 0.0, H),
        (5.0, 0.5, 3),
        (0.2, 0.85, 0),
        (-1.0, 0.0, 0),
    ],
)
def test_rows_that_are_played_before_the_chunk_comes_are_frozen_if_the_last_one_has_them(
    delay_s: float, left_at_s: float, frozen: int
) -> None:
    assert frozen_rows(moment(1.0 + left_at_s, delay_s, sent(1.0)), SPEC) == frozen


def test_nothing_is_frozen_before_the_first_chunk() -> None:
    assert frozen_rows(moment(1.0, 0.5), SPEC) == 0


def test_a_chunk_is_pulled_towards_what_is_left_of_the_one_being_played() -> None:
    playing = sent(1.0)
    continuation = RealTimeChunking("linear", overlap=2).begin(moment(1.2, 0.1 * 3, playing), SPEC)
    assert continuation is not None
    np.testing.assert_allclose(continuation.actions[:6], playing.actions[2:], atol=1e-6)
    np.testing.assert_array_equal(continuation.actions[6:], np.repeat(playing.actions[-1:], 2, axis=0))
    np.testing.assert_allclose(continuation.weights, [1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0], atol=1e-6)
    assert continuation.warm_steps is None


def test_rows_that_the_old_chunk_has_not_are_free() -> None:
    continuation = RealTimeChunking("ones", overlap=100).begin(moment(1.5, 0.1, sent(1.0)), SPEC)
    assert continuation is not None
    assert continuation.weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_weights_fall_over_an_eighth_of_a_chunk_unless_it_is_said() -> None:
    begun = [RealTimeChunking(overlap=overlap).begin(moment(1.0, 0.1, sent(1.0)), SPEC) for overlap in (None, 2, 0)]
    counts = [int((continuation.weights > 0).sum()) for continuation in begun if continuation]
    assert counts == [2, 3, 1]


def test_guidance_has_no_limit_where_there_are_gradients_and_lerobots_where_there_are_none() -> None:
    with_gradients, without = (
        RealTimeChunking().begin(moment(1.0, 0.1, sent(1.0), gradients=gradients), SPEC) for gradients in (True, False)
    )
    assert with_gradients is not None and without is not None
    assert with_gradients.gradients and with_gradients.strength > 1e6
    assert not without.gradients and without.strength == 10.0
    said = RealTimeChunking(strength=3.0).begin(moment(1.0, 0.1, sent(1.0)), SPEC)
    assert said is not None and said.strength == 3.0


def test_a_warm_start_begins_at_the_plan_and_is_pulled_nowhere() -> None:
    playing = sent(1.0)
    continuation = WarmStart(2).begin(moment(1.1, 0.1, playing), SPEC)
    assert continuation is not None
    assert continuation.warm_steps == 2
    assert not continuation.weights.any()
    np.testing.assert_allclose(continuation.actions[:7], playing.actions[1:], atol=1e-6)


@pytest.mark.parametrize("way", [kind() for kind in CONTINUITIES.values()], ids=lambda way: way.mode)
@pytest.mark.parametrize(
    "when", [moment(1.0, 0.1), moment(9.0, 0.1, sent(1.0)), moment(0.5, 0.1, sent(1.0))], ids=["first", "late", "early"]
)
def test_without_anything_to_go_on_from_a_chunk_is_what_the_policy_says(way, when: Moment) -> None:
    said, track = np.ones((H, 2), np.float32), Track()
    if when.playing is not None:
        track.add(when.playing)
    assert way.begin(when, SPEC) is None
    np.testing.assert_array_equal(way.finish(said, when, track, SPEC), said)


@pytest.mark.parametrize("way", [Replace(), RealTimeChunking(), WarmStart()], ids=lambda way: way.mode)
def test_all_but_ensembles_send_what_the_policy_said(way) -> None:
    track, playing, said = Track(), sent(1.0), np.ones((H, 2), np.float32)
    track.add(playing)
    np.testing.assert_array_equal(way.finish(said, moment(1.2, 0.1, playing), track, SPEC), said)


def act_ensemble(chunks: list[tuple[int, np.ndarray]], t: int, m: float) -> np.ndarray:
    """ACT's evaluation loop: the weighted mean of all actions that were predicted for step t, oldest first."""
    populated = np.array([actions[t - began] for began, actions in chunks if 0 <= t - began < len(actions)])
    weights = np.exp(-m * np.arange(len(populated)))
    return (populated * (weights / weights.sum())[:, None]).sum(axis=0)


@pytest.mark.parametrize("m", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_ensemble_is_the_mean_that_act_takes(m: float, every: int) -> None:
    track, way, chunks = Track(), Ensemble(m), []
    for query in range(5):
        began = every * query
        said = np.random.default_rng(query).standard_normal((H, 2), dtype=np.float32)
        got = way.finish(said, moment(7.0 + STEP_S * began, 0.1, None), track, SPEC)
        chunks.append((began, said))
        wanted = [act_ensemble(chunks, t, m) for t in range(began, began + H)]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        track.add(Sent(query + 1, 7.0 + STEP_S * began, said, got))


def test_an_ensemble_between_two_steps_takes_what_lies_between() -> None:
    track, before = Track(), np.arange(H, dtype=np.float32)[:, None].repeat(2, axis=1)
    track.add(Sent(1, 1.0, before, before))
    got = Ensemble(0.0).finish(np.zeros((H, 2), np.float32), moment(1.05), track, SPEC)
    np.testing.assert_allclose(got[:, 0], [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("raw", "way"),
    [
        ("replace", REPLACE),
        ("rtc", RealTimeChunking()),
        (
            {"mode": "rtc", "schedule": "linear", "overlap": 5, "strength": 5},
            RealTimeChunking("linear", overlap=5, strength=5.0),
        ),
        ({"mode": "ensemble", "decay": 0.1}, Ensemble(0.1)),
        ({"mode": "warm", "steps": 3}, WarmStart(3)),
        ({"mode": "warm"}, WarmStart()),
    ],
)
def test_a_continuity_is_read_from_its_name_or_a_map(raw, way) -> None:
    assert read_continuity(raw, SPEC) == way


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("magic", "'continuity' is 'magic', expected one of replace, rtc, ensemble, warm"),
        (None, "'continuity' is None, expected one of"),
        (3, "'continuity' is 3, expected one of"),
        ({"decay": 0.1}, "'continuity' is None, expected one of"),
        ({"mode": ["rtc"]}, r"'continuity' is \['rtc'\], expected one of"),
        ({"mode": "rtc", "schedule": "cubic"}, "'continuity.schedule'.*'cubic'"),
        ({"mode": "rtc", "strength": -1}, "'continuity.strength'.*-1"),
        ({"mode": "rtc", "strength": math.nan}, "'continuity.strength'"),
        ({"mode": "rtc", "overlap": -1}, "'continuity.overlap'"),
        ({"mode": "warm", "steps": 0}, "'continuity.steps'.*0"),
        ({"mode": "ensemble", "decay": math.inf}, "'continuity.decay'"),
        ({"mode": "replace", "steps": 3}, "'continuity.steps'.*3"),
        ({"mode": "rtc", 3: 4}, "'continuity"),
    ],
)
def test_a_continuity_that_is_wrong_is_refused_by_name(raw, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        read_continuity(raw, SPEC)


@pytest.mark.parametrize("mode", ["rtc", "warm"])
def test_a_policy_that_does_not_denoise_is_not_asked_to(mode: str) -> None:
    with pytest.raises(InvalidOption, match="this policy does not denoise"):
        read_continuity(mode, UNDENOISED)


@pytest.mark.parametrize("mode", ["replace", "ensemble"])
def test_the_other_ways_are_for_every_policy(mode: str) -> None:
    assert read_continuity(mode, UNDENOISED).mode == mode


def test_a_joint_says_how_a_chunk_was_joined() -> None:
    assert joint(RealTimeChunking(), moment(1.0, 0.2), SPEC) == Joint("rtc")
    assert joint(RealTimeChunking(), moment(1.3, 0.1 * 2, sent(1.0)), SPEC) == Joint("rtc", 2, 5, 200.0)
    assert joint(Ensemble(), moment(1.3, 0.5, sent(1.0)), SPEC) == Joint("ensemble", 0, 5, 500.0)
    assert joint(REPLACE, moment(9.0, 0.5, sent(1.0)), SPEC) == Joint("replace", 0, 0, 500.0)
