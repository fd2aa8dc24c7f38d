"""How the chunks of a stream go on from one another."""

import httpx
import numpy as np
import pytest

from tests.conftest import RunningServer
from tests.service.robot import STATE, TINY
from tests.service.stream_robot import Message, StreamRobot, recomputed

STEP_NS = 50_000_000  # of tiny, whose chunks have 4 rows
OTHER = {**TINY, "state": STATE * 3}


def _second(robot: StreamRobot, first_ns: int, **fields) -> tuple[Message, Message]:
    """Return a chunk, and the one that answers another observation a step later."""
    first = robot.ask(TINY, captured_ns=first_ns, options={"seed": 1})
    return first, robot.ask(OTHER, **{"captured_ns": first_ns + STEP_NS, "options": {"seed": 2}, **fields})


@pytest.mark.parametrize("began_ns", [0, 1_700_000_000_123_456_789, -(2**62)], ids=["at boot", "in 1970", "later"])
def test_real_time_chunking_holds_the_rows_that_are_played_before_the_chunk_comes(
    server: RunningServer, http: httpx.Client, began_ns: int
) -> None:
    with StreamRobot(server, continuity="rtc") as robot:
        first, second = _second(robot, began_ns, delay_ms=100, playing=1)
        assert first["continuity"] == {"mode": "rtc", "frozen": 0, "overlap": 0, "delay_ms": 0.0}
        assert second["continuity"] == {"mode": "rtc", "frozen": 2, "overlap": 3, "delay_ms": 100.0}
        np.testing.assert_array_equal(first["actions"], recomputed(http, TINY, first))
        free = recomputed(http, OTHER, second)
        assert np.abs(first["actions"][1:3] - free[:2]).max() > 0.05, "nothing to hold"
        np.testing.assert_allclose(second["actions"][:2], first["actions"][1:3], atol=0.02)


@pytest.mark.parametrize("playing", [0, 7], ids=["none", "one that never was"])
def test_a_robot_that_plays_nothing_known_gets_what_the_policy_says(
    server: RunningServer, http: httpx.Client, playing: int
) -> None:
    for mode in ("rtc", "warm"):
        with StreamRobot(server, continuity=mode) as robot:
            _, second = _second(robot, 0, delay_ms=100, playing=playing)
            assert second["continuity"] == {"mode": mode, "frozen": 0, "overlap": 0, "delay_ms": 0.0}
            np.testing.assert_array_equal(second["actions"], recomputed(http, OTHER, second))


def test_without_being_told_the_server_reckons_with_the_last_chunk_and_recent_delays(server: RunningServer) -> None:
    with StreamRobot(server, continuity="rtc") as robot:
        robot.exchange_clocks()
        now_ns = robot.now_ns()
        robot.ask(TINY, captured_ns=now_ns - STEP_NS)  # takes a step and more to come
        joint = robot.ask(OTHER, captured_ns=robot.now_ns())["continuity"]
        assert joint["delay_ms"] > 50
        assert joint["frozen"] == min(np.ceil(joint["delay_ms"] / 50), joint["overlap"])


def test_a_chunk_that_has_run_out_and_one_of_another_episode_are_not_gone_on_from(
    server: RunningServer, http: httpx.Client
) -> None:
    with StreamRobot(server, continuity="rtc") as robot:
        _, second = _second(robot, 0, captured_ns=4 * STEP_NS, playing=1, delay_ms=100)
        assert (second["continuity"]["frozen"], second["continuity"]["overlap"]) == (0, 0)
        np.testing.assert_array_equal(second["actions"], recomputed(http, OTHER, second))
        third = robot.ask(OTHER, captured_ns=5 * STEP_NS, playing=2, delay_ms=100, episode=1)
        assert third["continuity"]["overlap"] == 0


def test_an_ensemble_is_the_mean_of_all_that_was_said_of_a_moment(server: RunningServer, http: httpx.Client) -> None:
    with StreamRobot(server, continuity={"mode": "ensemble", "decay": 0.5}) as robot:
        first, second = _second(robot, 0)
        assert (second["continuity"]["mode"], second["continuity"]["overlap"]) == ("ensemble", 3)
        said = recomputed(http, OTHER, second)
        older, newer = 1.0, np.exp(-0.5)
        mean = (older * first["actions"][1:] + newer * said[:3]) / (older + newer)
        np.testing.assert_allclose(second["actions"][:3], mean, atol=1e-6)
        np.testing.assert_allclose(second["actions"][3], said[3], atol=1e-6)


def test_a_warm_start_stays_nearer_to_the_chunk_being_played(server: RunningServer, http: httpx.Client) -> None:
    with StreamRobot(server, continuity={"mode": "warm", "steps": 1}) as robot:
        first, second = _second(robot, 0, playing=1)
        assert (second["continuity"]["mode"], second["continuity"]["overlap"]) == ("warm", 3)
        said = recomputed(http, OTHER, second)
        played = first["actions"][1:]
        assert np.abs(second["actions"][:3] - played).sum() < np.abs(said[:3] - played).sum()


def test_an_observation_may_ask_for_another_way_than_its_hello(server: RunningServer, http: httpx.Client) -> None:
    with StreamRobot(server, continuity="rtc") as robot:
        _, second = _second(robot, 0, playing=1, delay_ms=100, options={"continuity": "replace"})
        assert second["continuity"] == {"mode": "replace", "frozen": 0, "overlap": 3, "delay_ms": 100.0}
        np.testing.assert_array_equal(second["actions"], recomputed(http, OTHER, second))
