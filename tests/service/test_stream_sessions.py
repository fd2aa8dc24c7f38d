"""Streaming sessions: they outlive connections and versions, and end when they should."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from policy_server.bundle import Bundle
from tests.conftest import Launch, RunningServer, launched
from tests.service.robot import PATIENCE_S, STATE, TINY
from tests.service.stream_robot import StreamRobot
from tests.service.triton import successor

EPISODE = [{"state": np.array([x, -x, 0.1, 0.0], np.float32)} for x in (0.5, -0.5, 1.0, 0.2, -0.8, 0.3)]
GRACE_S = 1.0


@pytest.fixture(scope="module")
def small(tiny_bundle: Bundle, tiny_step_bundle: Bundle) -> Iterator[RunningServer]:
    """A server with room for two sessions, which waits for lost robots for a moment only."""
    limits = ("--stream-grace-s", GRACE_S, "--stream-capacity", 2)
    with launched(tiny_bundle.path, tiny_step_bundle.path, "--engine", "onnx", *limits) as server:
        yield server


def test_an_episode_over_a_broken_connection_is_as_one_without(server: RunningServer) -> None:
    with StreamRobot(server, "tiny-step") as robot:
        wanted = [robot.actions(turn, seed=1) for turn in EPISODE]
    got = []
    with StreamRobot(server, "tiny-step", options={"seed": 1}) as robot:
        robot.send("set", revision=1, options={"seed": 1})
        for turn in EPISODE[:3]:
            got.append(robot.ask(turn, revision=1)["actions"])
        robot.break_off()
    with StreamRobot(server, "tiny-step", resume=robot.welcome["resume"], seq=robot.seq) as again:
        assert (again.welcome["resumed"], again.welcome["seq"], again.welcome["episode"]) == (True, 3, 0)
        assert again.welcome["session"] == robot.welcome["session"]
        for turn in EPISODE[3:]:
            got.append(again.ask(turn, revision=1)["actions"])
    np.testing.assert_array_equal(got, wanted)
    assert (wanted[3] != _first_of_an_episode(server)).any(), "the policy remembers nothing, so nothing was tested"


def _first_of_an_episode(server: RunningServer) -> np.ndarray:
    with StreamRobot(server, "tiny-step") as robot:
        return robot.actions(EPISODE[3], seed=1)


def test_two_robots_episodes_never_mix(server: RunningServer) -> None:
    with StreamRobot(server, "tiny-step") as robot:
        alone = [robot.actions(turn, seed=1) for turn in EPISODE]
    with StreamRobot(server, "tiny-step") as robot, StreamRobot(server, "tiny-step") as other:
        together = [(robot.actions(turn, seed=1), other.actions({"state": STATE}, seed=1))[0] for turn in EPISODE]
    np.testing.assert_array_equal(together, alone)


def test_a_session_is_forgotten_once_its_robot_has_stayed_away(small: RunningServer) -> None:
    with StreamRobot(small, "tiny-step") as robot:
        assert robot.welcome["grace_s"] == GRACE_S
        robot.send("set", revision=3)
        wanted = robot.actions(EPISODE[0], seed=1)
        robot.actions(EPISODE[1], seed=1)
        robot.break_off()
    time.sleep(1.5 * GRACE_S)
    with StreamRobot(small, "tiny-step", resume=robot.welcome["resume"], seq=robot.seq) as again:
        assert (again.welcome["resumed"], again.welcome["seq"]) == (False, 0)
        assert again.welcome["resume"] != robot.welcome["resume"]
        assert again.refusal(EPISODE[0], revision=3) == "unknown_revision"
        again.send("set", revision=3)  # the number that it had: to this session it is new
        np.testing.assert_array_equal(again.actions(EPISODE[0], seed=1, revision=3), wanted)


def test_a_session_that_is_left_and_taken_up_again_and_again_does_not_end(small: RunningServer) -> None:
    with StreamRobot(small, "tiny-step") as robot:
        robot.ask(EPISODE[0])
    for _ in range(6):
        time.sleep(GRACE_S / 4)
        with StreamRobot(small, "tiny-step", resume=robot.welcome["resume"], seq=robot.seq) as robot:
            assert robot.welcome["resumed"]
            assert robot.ask(EPISODE[0])


def test_a_bye_ends_the_session_at_once(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        robot.ask(TINY)
        robot.send("bye")
        assert robot.close_code() == 1000
    with StreamRobot(server, resume=robot.welcome["resume"]) as again:
        assert not again.welcome["resumed"]


def test_a_token_is_good_for_its_own_policy_alone(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        for policy, token in (("tiny-step", robot.welcome["resume"]), ("tiny", "x" * 32), ("tiny", "")):
            with StreamRobot(server, policy, resume=token) as other:
                assert not other.welcome["resumed"]
                assert other.welcome["resume"] != robot.welcome["resume"]
        robot.ask(TINY)


def test_a_second_connection_takes_the_session_over(server: RunningServer) -> None:
    with StreamRobot(server, "tiny-step") as robot:
        wanted = [robot.actions(turn, seed=1) for turn in EPISODE[:2]]
    with StreamRobot(server, "tiny-step") as robot:
        first = robot.actions(EPISODE[0], seed=1)
        with StreamRobot(server, "tiny-step", resume=robot.welcome["resume"], seq=robot.seq) as taker:
            assert taker.welcome["resumed"]
            with contextlib.suppress(ConnectionClosed):
                robot.send("bye")  # it has no say any more
            assert robot.close_code() == 4001
            np.testing.assert_array_equal([first, taker.actions(EPISODE[1], seed=1)], wanted)
            with StreamRobot(server, "tiny-step", resume=robot.welcome["resume"]) as third:
                assert third.welcome["resumed"]


def test_a_server_that_shuts_down_finishes_what_it_has_begun_and_refuses_what_comes(
    launch: Launch, tiny_bundle: Bundle
) -> None:
    patience = ("--request-timeout-s", PATIENCE_S, "--drain-s", PATIENCE_S)
    server = launch(tiny_bundle.path, "--engine", "onnx", *patience)
    at_length = {"smoothing": {"sigma": 0.1, "samples": 64}, "steps": 100, "sampler": "heun"}
    with StreamRobot(server) as robot, StreamRobot(server) as late:
        robot.observe(TINY, options=at_length)
        robot.exchange_clocks()
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        assert late.refusal(TINY) == "draining"
        assert robot.receive("chunk")["radius"] >= 0
        assert robot.close_code() == late.close_code() == 1012
    assert server.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in server.log()


def test_who_finds_no_room_is_told_so_and_robots_that_left_make_room(small: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        robots = [stack.enter_context(StreamRobot(small)) for _ in range(2)]
        refused = StreamRobot(small)
        assert refused.receive("error")["code"] == "too_many_sessions"
        assert refused.close_code() == 1013
        robots[0].break_off()
        with StreamRobot(small) as robot:  # or else whoever lost its token would wait
            robot.ask(TINY)
        robots[1].ask(TINY)
    with StreamRobot(small, resume=robots[0].welcome["resume"]) as again:
        assert not again.welcome["resumed"]


def test_a_refused_hello_leaves_the_session_as_it_was(server: RunningServer) -> None:
    with StreamRobot(server, rate_hz=1, options={"seed": 7}) as robot:
        for wrong in ({"rate_hz": 99_999, "options": {"seed": 8}}, {"continuity": "none"}, {"protocol": 2}):
            intruder = StreamRobot(server, resume=robot.welcome["resume"], **wrong)
            intruder.receive("error")
            assert intruder.close_code() == 1008
        assert robot.ask(TINY)["seed"] == 7


def test_rates_are_promised_to_sessions_and_given_back(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        free_hz = robot.welcome["rate_hz"]
    with StreamRobot(server, rate_hz=0.4 * free_hz) as robot:
        with StreamRobot(server) as other:
            assert other.welcome["rate_hz"] < 0.75 * free_hz
        token = robot.welcome["resume"]
        with StreamRobot(server, rate_hz=0.4 * free_hz, resume=token) as robot:
            assert robot.welcome["resumed"]
            with StreamRobot(server, resume=token) as robot, StreamRobot(server) as other:  # it wants none any more
                assert other.welcome["rate_hz"] > 0.75 * free_hz


def test_a_session_goes_on_when_its_policy_is_swapped(launch: Launch, tiny_step_bundle: Bundle, tmp_path: Path) -> None:
    server = launch(tiny_step_bundle.path, "--engine", "onnx")
    with StreamRobot(server, "tiny-step") as robot:
        first = [robot.actions(turn, seed=1) for turn in EPISODE[:3]]
        new = successor(tiny_step_bundle, tmp_path / "tiny-step")
        swapped = httpx.put(f"{server.url}/v1/policies/tiny-step", json={"bundle": str(new.path)}, timeout=PATIENCE_S)
        assert swapped.status_code == 200
        assert robot.ask(EPISODE[3])["version"] == "1"  # in the middle of an episode
        robot.break_off()
    with StreamRobot(server, "tiny-step", resume=robot.welcome["resume"], seq=robot.seq) as again:
        assert (again.welcome["resumed"], again.welcome["version"]) == (True, "2")
        assert again.ask(EPISODE[4])["version"] == "1"
        chunk = again.ask(EPISODE[0], episode=1, options={"seed": 1})
        assert chunk["version"] == "2"
        np.testing.assert_allclose(chunk["actions"], 0.5 * first[0], atol=1e-5)


def test_a_key_is_needed_where_there_are_keys(launch: Launch, tiny_bundle: Bundle) -> None:
    server = launch(tiny_bundle.path, "--engine", "onnx", env={"POLICY_SERVER_API_KEYS": "right"})
    for headers in (None, {"Authorization": "Api-Key wrong"}):
        with pytest.raises(InvalidStatus) as refused:
            StreamRobot(server, headers=headers)
        assert refused.value.response.status_code == 401
    with StreamRobot(server, headers={"Authorization": "Api-Key right"}) as robot:
        robot.ask(TINY)


def test_there_is_no_stream_to_a_policy_that_is_not_served(server: RunningServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        StreamRobot(server, "nobody")
    assert refused.value.response.status_code == 404
