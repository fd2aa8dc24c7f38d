"""The openpi websocket protocol, byte for byte: what its unmodified clients rely on."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest

from policy_client.codec import pack
from tests.conftest import RunningServer
from tests.service.robot import CAMERA, PATIENCE_S, SLOWLY, STATE, TINY, TOP, WRIST, Refusal, Robot, refused_upgrade

# `make test` sets up an environment with the stock client, which needs numpy 1.
HAS_OPENPI = all(importlib.util.find_spec(name) for name in ("openpi_client", "tree", "typing_extensions"))
OPENPI_PYTHON = os.environ.get("OPENPI_PYTHON") or (sys.executable if HAS_OPENPI else "")
WINDOW = [np.array([x, -x, 0.1, 0.0], np.float32) for x in (0.5, -0.5, 1.0, 0.2)]


def test_the_server_speaks_first_with_a_binary_msgpack_map(server: RunningServer) -> None:
    with Robot(server) as robot:
        assert isinstance(robot.greeting, bytes)
        metadata = msgpack.unpackb(robot.greeting)
    assert metadata["policy"] == "tiny"
    assert (metadata["horizon"], metadata["step_s"]) == (4, 0.05)
    assert (metadata["inputs"], metadata["action"]) == (["state", "goal"], ["fx", "fy"])


def test_actions_are_the_only_array_of_a_reply_and_have_the_bytes_that_openpi_decodes(server: RunningServer) -> None:
    maps: list[dict[Any, Any]] = []
    with Robot(server) as robot:
        robot.send(TINY)
        reply = msgpack.unpackb(robot.socket.recv(PATIENCE_S), object_hook=lambda found: maps.append(found) or found)
    assert [found for found in maps if b"__npgeneric__" in found] == []
    assert [found for found in maps if b"__ndarray__" in found] == [reply["actions"]]
    assert list(reply["actions"]) == [b"__ndarray__", b"data", b"dtype", b"shape"]
    assert (reply["actions"][b"dtype"], reply["actions"][b"shape"]) == ("<f4", [4, 2])
    actions = np.frombuffer(reply["actions"][b"data"], "<f4")
    assert len(actions) == 8
    assert np.abs(actions).max() <= 1.0


def test_timings_come_with_every_reply_and_the_total_with_the_next_one(server: RunningServer) -> None:
    with Robot(server) as robot:
        first, second = robot.ask(TINY), robot.ask(TINY)
    assert first["server_timing"].keys() == {"infer_ms"}
    assert second["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
    for reply in (first, second):
        assert reply["policy_timing"].keys() == {"infer_ms"}
        assert 0 < reply["policy_timing"]["infer_ms"] <= reply["server_timing"]["infer_ms"]


@pytest.mark.parametrize("path", ["/", "/any/path", "/policy?robot=3", "/v1", "/ein%20Weg"])
def test_any_path_leads_to_the_default_policy(server: RunningServer, path: str) -> None:
    with Robot(server, path) as robot:
        assert robot.ask(TINY)["policy"] == "tiny"


@pytest.mark.parametrize("name", ["tiny", "tiny-step", "camera"])
def test_a_path_can_choose_the_policy(server: RunningServer, name: str) -> None:
    with Robot(server, f"/v1/policies/{name}/openpi") as robot:
        assert msgpack.unpackb(robot.greeting)["policy"] == name
        assert robot.ask(CAMERA if name == "camera" else TINY)["policy"] == name


def test_an_unknown_policy_refuses_the_upgrade_and_says_which_there_are(server: RunningServer) -> None:
    refusal = refused_upgrade(server, "/v1/policies/tidy/openpi")
    assert refusal == Refusal(404, "unknown_policy", "no policy 'tidy' is loaded; there are: tiny, tiny-step, camera")


@pytest.mark.parametrize("path", ["/v1/policies/tiny/openpy", "/v1/policies", "/v1/stream"])
def test_an_unknown_address_below_v1_refuses_the_upgrade(server: RunningServer, path: str) -> None:
    refusal = refused_upgrade(server, path)
    assert (refusal.status, refusal.code) == (404, "no_such_address")
    assert path in refusal.message


def test_healthz_answers_on_the_same_port_with_the_bytes_that_openpi_answers(http: httpx.Client) -> None:
    response = http.get("/healthz")
    assert (response.status_code, response.content) == (200, b"OK\n")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


def test_an_error_is_a_text_frame_with_its_code_and_then_the_server_hangs_up(server: RunningServer) -> None:
    with Robot(server) as robot:
        robot.ask(TINY)
        robot.send({"state": STATE[:3]})
        assert robot.refusal() == Refusal(
            1011, "shape_mismatch", "'state' has shape (3,), expected (4,) (x, y, vx, vy)"
        )


def test_pings_and_other_robots_are_answered_while_chunks_are_computed(server: RunningServer) -> None:

    robots = [Robot(server) for _ in range(20)]
    for robot in robots:
        robot.begin(TINY, options=SLOWLY)
    last = robots[-1]
    assert last.socket.ping().wait(PATIENCE_S)
    with Robot(server, "/v1/policies/camera/openpi") as other:
        np.testing.assert_array_equal(other.ask(CAMERA)["actions"], [CAMERA["state"]] * 4)
    with pytest.raises(TimeoutError):  # all of that came while the last robot still waited
        last.socket.recv(timeout=0)
    for robot in robots:
        assert robot.receive()["actions"].shape == (4, 2)
        robot.socket.close()


def test_the_same_seed_gives_the_same_actions_and_another_seed_others(server: RunningServer) -> None:
    with Robot(server) as robot, Robot(server) as other:
        first = robot.actions(TINY, seed=7)
        np.testing.assert_array_equal(robot.actions(TINY, seed=7), first)
        np.testing.assert_array_equal(other.actions(TINY, seed=7), first)
        assert np.abs(robot.actions(TINY, seed=8) - first).max() > 1e-3
        reply = robot.ask(TINY)
        np.testing.assert_array_equal(other.actions(TINY, seed=reply["seed"]), reply["actions"])


def test_requests_sent_ahead_are_answered_strictly_in_order(server: RunningServer) -> None:
    with Robot(server) as robot:
        for seed in range(5):
            robot.send(TINY, options={"seed": seed, "steps": 200 if seed == 0 else 1})
        assert [robot.receive()["seed"] for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_connection_is_an_episode_and_a_new_one_remembers_nothing(server: RunningServer) -> None:
    with _step_robot(server) as robot:
        answers = [robot.actions({"state": state}, seed=1) for state in WINDOW]
    with _step_robot(server) as robot:
        np.testing.assert_array_equal(robot.actions({"state": WINDOW[0]}, seed=1), answers[0])
    with _step_robot(server) as robot:
        assert np.abs(robot.actions({"state": WINDOW[3]}, seed=1) - answers[3]).max() > 1e-3


def test_roboarena_s_reset_is_answered_in_plain_text_and_begins_a_new_episode(server: RunningServer) -> None:
    with _step_robot(server) as robot:
        fresh = robot.actions({"state": WINDOW[0]}, seed=1, endpoint="infer")
        remembering = robot.actions({"state": WINDOW[0]}, seed=1, endpoint="infer")
        robot.socket.send(pack({"endpoint": "reset", "episode": 3}))
        assert robot.socket.recv(PATIENCE_S) == "reset successful"
        np.testing.assert_array_equal(robot.actions({"state": WINDOW[0]}, seed=1, endpoint="infer"), fresh)
    assert np.abs(remembering - fresh).max() > 1e-3


def test_a_new_session_id_begins_a_new_episode(server: RunningServer) -> None:
    with _step_robot(server) as robot:
        first = [robot.actions({"state": state}, seed=1, session_id="38DSA3hd3") for state in WINDOW]
        second = [robot.actions({"state": state}, seed=1, session_id="38DSA3hd4") for state in WINDOW]
        third = [robot.actions({"state": state}, seed=1, session_id=np.array(["a9"])) for state in WINDOW]
        assert np.abs(robot.actions({"state": WINDOW[0]}, seed=1, session_id=np.array(["a9"])) - first[0]).max() > 1e-3
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)


@pytest.mark.parametrize(
    "observation",
    [
        {"observation/state": STATE, "observation/goal": TINY["goal"]},
        {"observation": TINY},
        {"observation.state": STATE, "goal": TINY["goal"], "prompt": "no policy here reads this"},
        {"state": STATE.tolist(), "goal": TINY["goal"][None].astype(np.float64)},
        {"state": STATE.astype(">f4"), "goal": TINY["goal"].astype(np.int8)},
    ],
    ids=["slashes", "nested", "dots", "lists and doubles", "big-endian and integers"],
)
def test_a_state_is_understood_as_openpi_and_lerobot_spell_it(
    server: RunningServer, observation: Mapping[str, Any]
) -> None:
    with Robot(server) as robot:
        np.testing.assert_array_equal(robot.actions(observation, seed=7), robot.actions(TINY, seed=7))


@pytest.mark.parametrize(
    "images",
    [
        {"images": {"top": TOP, "wrist": WRIST}},
        {"images": {"top": TOP.transpose(2, 0, 1), "wrist": WRIST.transpose(2, 0, 1)}},
        {"observation/images/top": TOP, "observation/wrist": WRIST},
        {"observation.images.top": TOP, "observation.images.wrist": WRIST},
        {"observation": {"images": {"top": TOP}}, "wrist": WRIST},
    ],
    ids=["nested", "channels first", "slashes", "dots", "mixed"],
)
def test_cameras_are_understood_as_openpi_and_lerobot_spell_them(
    server: RunningServer, images: Mapping[str, Any]
) -> None:
    with Robot(server, "/v1/policies/camera/openpi") as robot:
        actions = robot.ask({**images, "observation/state": CAMERA["state"]})["actions"]
    np.testing.assert_array_equal(actions, [CAMERA["state"]] * 4)


@pytest.mark.skipif(not OPENPI_PYTHON, reason="openpi-client is not installed; `make test` names one in OPENPI_PYTHON")
def test_the_unmodified_openpi_client_and_its_chunk_broker_drive_an_episode(server: RunningServer) -> None:
    script = Path(__file__).with_name("stock_robot.py")
    command = [OPENPI_PYTHON, str(script), str(server.port), "10"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    episode = json.loads(ended.stdout)
    with Robot(server) as robot:
        chunk = robot.actions(TINY, seed=7)
        assert episode["metadata"] == msgpack.unpackb(robot.greeting)
    np.testing.assert_array_equal(np.float32(episode["actions"]), [*chunk, *chunk, *chunk[:2]])
    assert episode["complaint"].startswith("Error in inference server:\nunexpected_input: 'stat' is not an input")


def _step_robot(server: RunningServer) -> Robot:
    """Return a robot of the policy that looks back on three observations."""
    return Robot(server, "/v1/policies/tiny-step/openpi")
