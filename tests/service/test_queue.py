"""Queues, budgets and sessions: what happens when robots want more than the engine can give."""

import contextlib
import itertools
from typing import Any

import httpx
import numpy as np
import pytest

from policy_server.bundle import Bundle
from tests.conftest import Launch, RunningServer
from tests.service.robot import SLOWLY, STATE, TINY, Robot, in_json, refusal_of

ALICE = [{"state": np.array([x, -x, 0.1, 0.0], np.float32)} for x in (0.5, -0.5, 1.0, 0.2, -0.8)]
BOB = [{"state": np.array([-x, x, 0.0, x], np.float32)} for x in (1.5, 0.7, -1.0, 0.3, 2.0)]


def test_a_burst_past_the_capacity_is_refused_at_once_and_what_was_accepted_is_answered(
    launch: Launch, slow_bundle: Bundle
) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx", "--queue-capacity", "2")
    with contextlib.ExitStack() as stack:
        robots = [stack.enter_context(Robot(server)) for _ in range(6)]
        for robot in robots[:2]:
            robot.begin(TINY, options=SLOWLY)
        response = httpx.post(f"{server.url}/v1/policies/slow/act", json={"observation": in_json(TINY)})
        for robot in robots[2:]:
            robot.send(TINY)
        refusals = [refusal_of(response), *(robot.refusal() for robot in robots[2:])]
        for refusal, status in zip(refusals, (503, 1011, 1011, 1011, 1011), strict=True):
            assert (refusal.status, refusal.code) == (status, "overloaded")
            assert refusal.message.startswith("2 requests already wait")
        assert response.headers["retry-after"] == "1"
        with pytest.raises(TimeoutError):  # nothing above had to wait for the engine
            robots[1].socket.recv(timeout=0)
        for robot in robots[:2]:
            assert robot.receive()["actions"].shape == (4, 2)
        assert robots[0].ask(TINY)["actions"].shape == (4, 2)


@pytest.mark.parametrize("budget_ms", [1e-6, 0.01])
def test_a_budget_that_cannot_be_met_is_refused_at_every_door(
    server: RunningServer, http: httpx.Client, budget_ms: float
) -> None:
    options = {**SLOWLY, "budget_ms": budget_ms}
    refusal = refusal_of(http.post("/v1/policies/tiny/act", json={"observation": in_json(TINY), "options": options}))
    assert (refusal.status, refusal.code) == (504, "deadline_exceeded")
    with Robot(server) as robot:
        robot.send(TINY, options=options)
        refusal = robot.refusal()
    assert (refusal.status, refusal.code) == (1011, "deadline_exceeded")
    assert "the deadline passed" in refusal.message


def test_a_chunk_that_runs_out_of_time_is_abandoned_between_two_steps(launch: Launch, slow_bundle: Bundle) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx", "--request-timeout-s", "0.02")
    with Robot(server) as robot, Robot(server) as other:
        robot.begin(TINY, options=SLOWLY)  # needs many times the time allowed
        assert robot.refusal().code == "deadline_exceeded"
        chunk = other.ask(TINY, options={"budget_ms": 10_000})
        assert chunk["policy_timing"]["infer_ms"] > 0


def test_who_waits_past_the_deadline_is_refused_and_who_can_wait_is_answered(
    launch: Launch, slow_bundle: Bundle
) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx")
    with Robot(server) as slow, Robot(server) as hasty, Robot(server) as patient:
        slow.begin(TINY, options=SLOWLY)
        hasty.send(TINY, options={"budget_ms": 1})
        patient.begin(TINY, options={"budget_ms": 20_000, "seed": 7})
        assert slow.receive()["actions"].shape == (4, 2)
        assert hasty.refusal().code == "deadline_exceeded"
        answer = patient.receive()["actions"]
        np.testing.assert_array_equal(patient.actions(TINY, seed=7), answer)


def test_a_refused_request_is_not_remembered_by_its_session(http: httpx.Client) -> None:
    def turn(state: list[float], session: str | None, **options: float) -> httpx.Response:
        request = {"observation": {"state": state}, "session": session, "options": {"seed": 1, **options}}
        return http.post("/v1/policies/tiny-step/act", json=request)

    assert turn([9.0, 9.0, 9.0, 9.0], "late", budget_ms=1e-6).status_code == 504
    fresh = turn(STATE.tolist(), None).json()["actions"]
    assert turn(STATE.tolist(), "late").json()["actions"] == fresh
    http.delete("/v1/policies/tiny-step/sessions/late")


def test_episodes_on_two_connections_never_mix(server: RunningServer) -> None:
    alone = [_episode(server, episode) for episode in (ALICE, BOB)]
    with _step_robot(server) as alice, _step_robot(server) as bob:
        together = [
            (alice.actions(hers, seed=1), bob.actions(his, seed=1)) for hers, his in zip(ALICE, BOB, strict=True)
        ]
    for got, wanted in zip(zip(*together, strict=True), alone, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_episodes_of_two_named_sessions_never_mix(server: RunningServer, http: httpx.Client) -> None:
    episodes = {"alice": ALICE, "bob": BOB}
    got: dict[str, list[Any]] = {name: [] for name in episodes}
    for turn, name in itertools.product(range(len(ALICE)), episodes):
        request = {"observation": in_json(episodes[name][turn]), "session": name, "options": {"seed": 1}}
        got[name].append(http.post("/v1/policies/tiny-step/act", json=request).json()["actions"])
    for name, episode in episodes.items():
        np.testing.assert_array_equal(np.float32(got[name]), _episode(server, episode))
        http.delete(f"/v1/policies/tiny-step/sessions/{name}")


def test_robots_that_ask_at_the_same_time_get_what_they_would_get_alone(server: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        robots = [stack.enter_context(Robot(server)) for _ in range(16)]
        wanted = [robots[0].actions({"state": STATE * n}, seed=n) for n in range(16)]
        for _ in range(3):
            for n, robot in enumerate(robots):
                robot.send({"state": STATE * n}, options={"seed": n})
            for robot, chunk in zip(robots, wanted, strict=True):
                np.testing.assert_array_equal(robot.receive()["actions"], chunk)


def _step_robot(server: RunningServer) -> Robot:
    """Return a robot of the policy that looks back on three observations."""
    return Robot(server, "/v1/policies/tiny-step/openpi")


def _episode(server: RunningServer, episode: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    with _step_robot(server) as robot:
        return [robot.actions(turn, seed=1) for turn in episode]
