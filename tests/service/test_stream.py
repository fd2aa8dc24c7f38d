"""The streaming protocol: which observation is answered, with what, and when."""

import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from policy_server.bundle import Bundle
from tests.conftest import RunningServer, launched
from tests.service.robot import SLOWLY, STATE, TINY
from tests.service.stream_robot import StreamRobot, recomputed

# Takes slow a few tens of steps, each of which looks whether it is still wanted.
A_WHILE = {"steps": 100, "sampler": "heun", "guidance": 1.5}


@pytest.fixture(scope="module")
def slow(slow_bundle: Bundle) -> Iterator[RunningServer]:
    """A server whose policy takes its time when asked to."""
    with launched(slow_bundle.path, "--engine", "onnx") as server:
        yield server


def test_the_welcome_says_what_a_robot_needs_to_know(server: RunningServer, http: httpx.Client) -> None:
    page = http.get("/v1/policies/tiny").json()
    with StreamRobot(server, name="arm") as robot:
        welcome = robot.welcome
    assert {"protocol": 1, "session": "arm", "resumed": False, "seq": 0, "episode": 0}.items() <= welcome.items()
    assert (welcome["policy"], welcome["version"], welcome["engine"]) == ("tiny", "1", "onnx")
    assert welcome["spec"] == page["spec"] and welcome["inputs"] == page["inputs"]
    assert (welcome["grace_s"], welcome["max_message_bytes"]) == (30.0, 16 << 20)
    assert welcome["chunk_ms"] > 0 and welcome["rate_hz"] > 0 and len(welcome["resume"]) >= 32


def test_a_chunk_says_which_observation_it_answers_and_is_that_of_the_other_doors(
    server: RunningServer, http: httpx.Client
) -> None:
    with StreamRobot(server) as robot:
        for n in range(5):
            observation = {**TINY, "state": STATE * n}
            captured_ns = robot.now_ns()
            chunk = robot.ask(observation, captured_ns=captured_ns, episode=3)
            assert (chunk["episode"], chunk["captured_ns"]) == (3, captured_ns)
            assert (chunk["policy"], chunk["version"], chunk["engine"], chunk["step_s"]) == ("tiny", "1", "onnx", 0.05)
            assert chunk["actions"].dtype == np.float32
            np.testing.assert_array_equal(chunk["actions"], recomputed(http, observation, chunk))
        assert (chunk["superseded"], chunk["stale"]) == (0, 0)


def test_numbers_need_not_be_arrays(server: RunningServer) -> None:
    plain = {name: [float(x) for x in vector] for name, vector in TINY.items()}
    with StreamRobot(server) as robot:
        np.testing.assert_array_equal(robot.actions(plain, seed=7), robot.actions(TINY, seed=7))


def test_the_newest_observation_wins_while_one_is_answered(slow: RunningServer) -> None:
    with StreamRobot(slow, "slow", options={"seed": 7}) as robot:
        first = robot.observe(TINY, options=SLOWLY)
        for n in range(1, 6):
            robot.observe({"state": STATE * n})
        assert robot.receive("chunk")["seq"] == first
        chunk = robot.receive("chunk")
        assert (chunk["seq"], chunk["superseded"]) == (robot.seq, 4)
        np.testing.assert_array_equal(chunk["actions"], robot.actions({"state": STATE * 5}, seed=7))


def test_what_comes_twice_or_late_is_dropped_and_counted(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        robot.ask(TINY, seq=5)
        for seq in (5, 4, 1):
            robot.observe(TINY, seq=seq)
        chunk = robot.ask(TINY)
        assert (chunk["seq"], chunk["stale"], chunk["superseded"]) == (6, 3, 0)


def test_an_earlier_episodes_observations_are_dropped(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        robot.ask(TINY, episode=2)
        robot.observe(TINY, episode=1)
        assert robot.ask(TINY, episode=2)["stale"] == 1


@pytest.mark.parametrize("early", [False, True], ids=["with the observation", "by a reset"])
def test_a_new_episode_remembers_nothing_of_the_one_before(server: RunningServer, early: bool) -> None:
    def episode(robot: StreamRobot, number: int) -> list[np.ndarray]:
        if early:
            robot.send("reset", episode=number)
        return [robot.actions({"state": STATE * n}, seed=1, episode=number) for n in (1, 2, 3)]

    with StreamRobot(server, "tiny-step") as robot:
        first, second = episode(robot, 1), episode(robot, 2)
        np.testing.assert_array_equal(first, second)
        again = robot.actions({"state": STATE}, seed=1, episode=2)
        assert (again != first[0]).any(), "the policy remembers nothing, so nothing was tested"


def test_a_reset_gives_up_what_is_answered_and_what_waits(slow: RunningServer) -> None:
    with StreamRobot(slow, "slow") as robot:
        robot.observe(TINY, options=SLOWLY)
        robot.observe(TINY, options=SLOWLY)
        robot.send("reset", episode=1)
        assert robot.ask(TINY, episode=1)["seq"] == 3  # the first that comes


def test_a_cancel_gives_up_observations_up_to_its_number(slow: RunningServer) -> None:
    with StreamRobot(slow, "slow") as robot:
        robot.observe(TINY, options=SLOWLY)
        robot.observe(TINY, options=SLOWLY)
        robot.send("cancel", seq=1)
        robot.send("cancel", seq=2)
        robot.observe(TINY, options=A_WHILE)
        robot.send("cancel", seq=2)
        assert robot.receive("chunk")["seq"] == 3
        robot.send("cancel", seq=100)  # nothing is left to cancel, and what comes is not meant
        assert robot.ask(TINY)["seq"] == 4


def test_an_answer_under_way_reaches_the_connection_that_the_robot_has_by_then(slow: RunningServer) -> None:
    with StreamRobot(slow, "slow") as robot:
        robot.observe(TINY, options=A_WHILE)
        with StreamRobot(slow, "slow", resume=robot.welcome["resume"], seq=1) as again:
            assert (again.welcome["resumed"], again.welcome["seq"]) == (True, 1)
            assert again.receive("chunk")["seq"] == 1


def test_a_set_holds_from_the_observation_on_that_names_it(server: RunningServer) -> None:
    state, goal = {"state": STATE}, {"goal": TINY["goal"]}
    with StreamRobot(server, options={"seed": 7}) as robot:
        with_goal, without = robot.ask(TINY)["actions"], robot.ask(state)["actions"]
        in_one_step = robot.ask(TINY, options={"steps": 1})["actions"]
        assert len({actions.tobytes() for actions in (with_goal, without, in_one_step)}) == 3

        def says(wanted: np.ndarray, observation=state, **fields) -> None:
            np.testing.assert_array_equal(robot.ask(observation, **fields)["actions"], wanted)

        robot.send("set", revision=1, inputs=goal)
        says(with_goal, revision=1)
        says(without)
        robot.send("set", revision=3, inputs=goal, options={"steps": 1})
        says(in_one_step, revision=3)
        says(with_goal, revision=3, options={"steps": 3})
        says(with_goal, TINY)  # options hold for those that name it, and no others
        robot.send("set", revision=3, inputs={})
        robot.send("set", revision=2, inputs={})
        says(in_one_step, revision=3)  # what was said twice or late changes nothing
        robot.send("set", revision=4, inputs={})
        says(without, revision=4)  # it replaces all that was said before


def test_a_set_that_did_not_arrive_is_asked_for(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        assert robot.refusal({"state": STATE}, revision=1) == "unknown_revision"
        robot.send("set", revision=1, inputs={"goal": TINY["goal"]})
        robot.ask({"state": STATE}, revision=1)
        assert robot.refusal({"state": STATE}, revision=2) == "unknown_revision"


def test_options_of_an_observation_go_before_those_of_the_hello(server: RunningServer) -> None:
    with StreamRobot(server, options={"seed": 7, "steps": 1}) as robot, StreamRobot(server) as other:
        assert (robot.ask(TINY)["seed"], robot.ask(TINY, options={"seed": 8})["seed"]) == (7, 8)
        wanted = other.ask(TINY, options={"seed": 8, "steps": 1})["actions"]
        np.testing.assert_array_equal(robot.ask(TINY, options={"seed": 8})["actions"], wanted)
        assert other.ask(TINY)["seed"] != other.ask(TINY)["seed"]


def test_a_chunk_that_would_come_too_late_is_refused_and_the_next_one_is_answered(slow: RunningServer) -> None:
    with StreamRobot(slow, "slow", deadline_ms=200) as robot:
        robot.exchange_clocks()
        assert robot.refusal(TINY, options=SLOWLY | {"steps": 200}) == "deadline_exceeded"
        assert robot.refusal(TINY, captured_ns=robot.now_ns() - 10**9) == "deadline_exceeded"
        assert robot.refusal(TINY, options={"budget_ms": 1e-6}) == "deadline_exceeded"
    with StreamRobot(slow, "slow", deadline_ms=60_000) as robot:
        robot.ask(TINY, options=A_WHILE)
        assert robot.refusal(TINY, options={**A_WHILE, "budget_ms": 1}) == "deadline_exceeded"


@pytest.mark.parametrize("clock_s", [0, -1e9, 1.7e9], ids=["ours", "far behind", "since 1970"])
def test_the_age_of_an_observation_is_known_whatever_the_robots_clock_shows(
    server: RunningServer, clock_s: float
) -> None:
    with StreamRobot(server, clock_ns=int(1e9 * clock_s)) as robot:
        begun_s = time.monotonic()
        timings = robot.ask(TINY)["timings"]  # before a pong: as young as it can be
        assert 0 == timings["received_ms"] <= timings["waited_ms"] < timings["total_ms"]
        robot.exchange_clocks()
        timings = robot.ask(TINY, captured_ns=robot.now_ns() - 250_000_000)["timings"]
        spent_ms = 1e3 * (time.monotonic() - begun_s)
        assert 250 - spent_ms < timings["received_ms"] < 250 + spent_ms
        parts_ms = timings["received_ms"] + timings["waited_ms"] + timings["infer_ms"]
        assert parts_ms <= timings["total_ms"] < 250 + spent_ms


def test_an_observation_of_the_future_is_as_young_as_can_be(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        robot.exchange_clocks()
        assert robot.ask(TINY, captured_ns=robot.now_ns() + 10**12)["timings"]["received_ms"] == 0
