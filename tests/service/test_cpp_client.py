"""The C++ client: built with sanitizers, then led by the hand against a scripted server and a real one."""

import math
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from policy_client.codec import pack, unpack
from tests.conftest import RunningServer
from tests.service.cpp_robot import Robot, leashed
from tests.service.scripted_door import PATIENCE_S, ROWS, WELCOME, Door, ScriptedServer, scripted_server

SOURCE = Path(__file__).parents[2] / "clients" / "cpp"


def _missing() -> str:
    programs = [name for name in ("g++", "cmake") if not shutil.which(name)]
    headers = {
        "libboost-dev": "boost/beast.hpp",
        "libmsgpack-cxx-dev": "msgpack.hpp",
        "doctest-dev": "doctest/doctest.h",
    }
    places = [Path("/usr/include"), Path("/usr/local/include")]
    packages = [name for name, header in headers.items() if not any((place / header).exists() for place in places)]
    return " ".join(programs + packages)


# The first test builds, on a machine that may be busy with other tests.
pytestmark = [
    pytest.mark.skipif(bool(_missing()), reason=f"the C++ client needs Debian's {_missing()}"),
    pytest.mark.timeout(600),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs."""
    folder = tmp_path_factory.mktemp("cpp")
    configure = ["-DPOLICY_CLIENT_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=", "-DCMAKE_CXX_FLAGS=-O0"]
    _run("cmake", "-S", SOURCE, "-B", folder, *configure)
    _run("cmake", "--build", folder, "--parallel", "2")
    return folder


def _run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def robot(built: Path, scripted: ScriptedServer) -> Iterator[Robot]:
    with leashed(built, scripted.port) as robot:
        yield robot


def test_bytes_chunks_and_sessions_pass_their_unit_tests(built: Path) -> None:
    _run("ctest", "--test-dir", built, "--output-on-failure", "--no-tests=error")


def test_another_project_finds_it_once_installed(built: Path, tmp_path: Path) -> None:
    _run("cmake", "--install", built, "--prefix", tmp_path / "installed")
    assert (tmp_path / "installed/include/policy_client/policy_stream.hpp").exists()
    (tmp_path / "robot.cpp").write_text("#include <policy_client/message.hpp>\nint main() { policy::wire::bye(); }\n")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(robot CXX)\nfind_package(policy_client 0.1 REQUIRED)\n"
        "add_executable(robot robot.cpp)\ntarget_link_libraries(robot policy_client::policy_client)\n"
    )
    _run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}")
    _run("cmake", "--build", tmp_path / "build")


def test_hello_says_what_was_asked_for(built: Path, scripted: ScriptedServer) -> None:
    options = {
        "api_key": "key",
        "name": "arm",
        "rate_hz": 20,
        "deadline_ms": 150,
        "continuity": "rtc",
        "policy": "a b/c",
    }
    with leashed(built, scripted.port, **options) as robot:
        door, hello = scripted.accept()
        wanted = {"protocol": 1, "name": "arm", "rate_hz": 20.0, "deadline_ms": 150.0, "continuity": "rtc"}
        assert hello == wanted
        assert door.connection.request is not None
        assert door.connection.request.path == "/v1/policies/a%20b%2Fc/stream"
        assert door.connection.request.headers["Authorization"] == "Api-Key key"
        assert robot.ask("wait_open") == {"open": 1}
        assert robot.ask("welcome") == {"session": "5f0c", "policy": "tiny", "resume": ""}


def test_an_observation_goes_up_and_its_chunk_comes_down_to_the_last_bit(
    robot: Robot, scripted: ScriptedServer
) -> None:
    door, _ = scripted.accept()
    before_ns = time.monotonic_ns()
    robot.ask("send 0.5 -0.25 1e-300 3")
    observation = door.receive("observation")
    assert before_ns < observation["captured_ns"] < time.monotonic_ns()
    np.testing.assert_array_equal(observation["observation"]["state"], [0.5, -0.25, 1e-300, 3])
    assert {name: observation[name] for name in ("seq", "episode", "revision", "playing")} == {
        "seq": 1,
        "episode": 0,
        "revision": 0,
        "playing": 0,
    }
    door.answer(observation, policy="tiny", timings={"infer_ms": 1.5}, continuity={"mode": "rtc", "frozen": 2})
    chunk = robot.ask("wait_chunk")
    assert (chunk["seq"], chunk["horizon"], chunk["step_s"]) == (1, 3, 0.05)
    assert (chunk["policy"], chunk["mode"], chunk["frozen"], chunk["infer_ms"]) == ("tiny", "rtc", 2, 1.5)
    assert chunk["captured_ns"] == observation["captured_ns"]
    assert np.array_equal(np.float32(chunk["first"]), ROWS[0])
    for after_ms, row in [(0, 0), (49, 0), (50, 1), (149, 2)]:
        assert np.float32(robot.ask(f"row {after_ms}")["action"]).tobytes() == ROWS[row].tobytes()
    assert robot.ask("row -1") is robot.ask("row 150") is None


def test_the_next_observation_says_which_chunk_is_played(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    robot.ask("send 1")
    door.answer(door.receive("observation"), step_s=100.0)
    robot.ask("wait_chunk")
    robot.ask("send_with 12.5 7 1")
    observation = door.receive("observation")
    assert (observation["playing"], observation["delay_ms"], observation["options"]) == (1, 12.5, {"seed": 7})


def test_an_image_arrives_byte_for_byte(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    robot.ask("send_image 480 640")
    image = door.receive("observation")["observation"]["top"]
    np.testing.assert_array_equal(image, (np.arange(480 * 640 * 3) % 251).astype(np.uint8).reshape(480, 640, 3))


def test_a_ping_is_answered_at_once_with_the_clock_of_the_robot(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    sent_ns = time.monotonic_ns()
    door.send("ping", sent_ns=sent_ns)
    pong = door.receive("pong")
    assert pong["sent_ns"] == sent_ns
    assert sent_ns < pong["robot_ns"] < time.monotonic_ns()  # on one machine the two clocks are one
    assert pong["robot_ns"] - sent_ns < 1e9
    assert door.connection.ping().wait(PATIENCE_S)
    robot.wait_for("counters", pings=1)


def test_sets_resets_and_cancels_go_before_the_observations_they_are_about(
    robot: Robot, scripted: ScriptedServer
) -> None:
    door, _ = scripted.accept()
    robot.ask("wait_open")
    robot.ask("set open the drawer")
    wanted = {"revision": 1, "inputs": {"prompt": "open the drawer"}, "options": {"steps": 5}}
    assert door.receive("set") == wanted
    robot.ask("send 1")
    observation = door.receive("observation")
    assert observation["revision"] == 1
    robot.ask("cancel")
    assert door.receive("cancel") == {"seq": 1}
    assert robot.ask("reset") == {"episode": 1}
    assert door.receive("reset") == {"episode": 1}
    door.answer(observation)
    robot.ask("send 1")
    assert door.receive("observation")["episode"] == 1
    assert robot.wait_for("counters", chunks_ignored=1)["chunks"] == 0
    door.send("error", code="unknown_revision", message="no set 1", seq=2)
    assert door.receive("set") == wanted


def test_late_and_double_chunks_are_ignored(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    observations = []
    for state in range(3):
        robot.ask(f"send {state}")
        observations.append(door.receive("observation"))
    for number in (1, 1, 0):
        door.answer(observations[number], np.full((2, 2), number, np.float32))
    counters = robot.wait_for("counters", chunks_ignored=2)
    assert counters["chunks"] == 1
    assert robot.ask("latest")["first"] == [1, 1]


def test_a_cut_connection_is_taken_up_again_with_the_token(robot: Robot, scripted: ScriptedServer) -> None:
    door, hello = scripted.accept()
    assert "resume" not in hello
    robot.ask("send 1")
    door.answer(door.receive("observation"), step_s=100.0)
    robot.ask("wait_chunk")
    door.cut()
    robot.wait_for("counters", failures=1)
    robot.ask("send 2")
    robot.ask("send 3")

    door, hello = scripted.accept(resumed=True, resume="another", seq=1)
    assert hello["resume"] == "secret"
    observation = door.receive("observation")
    assert (observation["seq"], observation["playing"]) == (3, 1)
    assert observation["observation"]["state"] == [3]
    door.answer(observation)
    assert robot.ask("wait_chunk 3")["seq"] == 3
    counters = robot.ask("counters")
    assert (counters["connections"], counters["resumes"], counters["replaced"]) == (2, 1, 1)
    assert robot.ask("error")["code"] == "connection_lost"

    door.connection.close(1012)
    _, hello = scripted.accept(resumed=True)
    assert hello["resume"] == "another"


def test_a_session_that_the_server_forgot_is_told_everything_anew(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    robot.ask("set open the drawer")
    door.receive("set")
    robot.ask("send 1")
    door.answer(door.receive("observation"), step_s=100.0)
    robot.ask("wait_chunk")
    door.cut()
    door, _ = scripted.accept(resumed=False)
    assert door.receive("set")["revision"] == 1
    robot.ask("send 1")
    assert door.receive("observation")["playing"] == 0
    assert robot.ask("row 5")  # what the robot has, it plays on


def test_an_error_about_an_observation_does_not_end_the_conversation(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    robot.ask("send 1")
    door.receive("observation")
    door.send("error", code="shape_mismatch", message="'state' has shape (1,)", seq=1)
    assert robot.wait_for("error", seq=1) == {"code": "shape_mismatch", "message": "'state' has shape (1,)", "seq": 1}
    robot.ask("send 1")
    door.answer(door.receive("observation"))
    assert robot.ask("wait_chunk")["seq"] == 2
    assert robot.ask("counters")["server_errors"] == 1


def test_a_message_of_a_later_protocol_is_ignored(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    door.send("weather", outlook=["fair"])
    robot.ask("send 1")
    door.answer(door.receive("observation"), forecast={"rain": 0})
    assert robot.ask("wait_chunk")["seq"] == 1


CHUNK = {"type": "chunk", "seq": 1, "episode": 0, "captured_ns": 1, "actions": ROWS, "step_s": 0.05}
GARBAGE = {
    "text": "no binary frame",
    "empty": b"",
    "no map": pack([1, 2, 3]),
    "no type": pack({"seq": 1}),
    "cut off": pack(CHUNK)[:-1],
    "more behind": pack(CHUNK) + b"\x00",
    "never asked for": pack({**CHUNK, "seq": 99}),
    "another time": pack(CHUNK),
    "doubles": pack({**CHUNK, "actions": ROWS.astype(np.float64)}),
    "a list": pack({**CHUNK, "actions": ROWS.tolist()}),
    "one row": pack({**CHUNK, "actions": ROWS[0]}),
    "no rows": pack({**CHUNK, "actions": ROWS[:0]}),
    "not finite": pack({**CHUNK, "actions": ROWS * np.float32(math.nan)}),
    "second welcome": pack({"type": "welcome", **WELCOME}),
    "random": np.random.default_rng(0).bytes(500),
    "four billion": b"\x81\xa4type\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE)
def test_garbage_closes_the_connection_and_the_next_one_is_as_good_as_new(
    robot: Robot, scripted: ScriptedServer, frame: bytes | str
) -> None:
    door, _ = scripted.accept()
    robot.ask("send 1")
    door.receive("observation")
    door.connection.send(frame)
    assert door.close_code() == 1002
    assert robot.wait_for("error", code="malformed_message")["message"]
    door, hello = scripted.accept(resumed=True)
    assert hello["resume"] == "secret"
    robot.ask("send 1")
    door.answer(door.receive("observation"))
    assert robot.ask("wait_chunk")["seq"] == 2
    assert robot.ask("counters")["protocol_errors"] == 1


def test_a_message_past_the_limit_is_not_read(built: Path, scripted: ScriptedServer) -> None:
    with leashed(built, scripted.port, max_message_bytes=10_000) as robot:
        door, _ = scripted.accept()
        door.send("weather", outlook=bytes(10_001))
        door.close_code()
        robot.wait_for("counters", protocol_errors=1)
        scripted.accept(resumed=True)
        robot.wait_for("state", state="open")


def test_a_refused_hello_is_told_and_tried_again(robot: Robot, scripted: ScriptedServer) -> None:
    for _ in range(2):
        door = Door(scripted.connections.get(timeout=PATIENCE_S))
        door.receive("hello")
        door.send("error", code="rate_too_high", message="3 Hz are left")
        door.connection.close(1008)
        robot.wait_for("state", state="refused")
        assert robot.ask("error") == {"code": "rate_too_high", "message": "3 Hz are left", "seq": 0}
    scripted.accept()
    assert robot.ask("wait_open") == {"open": 1}


def test_a_refused_upgrade_is_told_and_tried_again(built: Path, scripted: ScriptedServer) -> None:
    scripted.status = HTTPStatus.UNAUTHORIZED
    with leashed(built, scripted.port) as robot:
        robot.wait_for("state", state="refused")
        message = robot.ask("error")["message"]
        assert message == 'HTTP 401: {"error": {"code": "unauthorized"}}'
        scripted.status = HTTPStatus.SWITCHING_PROTOCOLS
        scripted.accept()
        assert robot.ask("wait_open") == {"open": 1}


def test_a_session_taken_over_by_another_client_is_not_taken_back(robot: Robot, scripted: ScriptedServer) -> None:
    door, _ = scripted.accept()
    door.connection.close(4001, "another connection")
    robot.wait_for("state", state="closed")
    assert robot.ask("error")["code"] == "taken_over"
    robot.ask("send 1")
    with pytest.raises(queue.Empty):
        scripted.connections.get(timeout=0.5)
    assert robot.quit() < 1000


def test_a_server_that_falls_silent_is_left_and_never_blocks_the_robot(robot: Robot, scripted: ScriptedServer) -> None:
    scripted.accept()  # from here on nothing is read: its queue of two messages fills up, then the network
    robot.ask("wait_open")
    for _ in range(20):
        begun_s = time.monotonic()
        robot.ask("send_image 1000 1000")
        assert time.monotonic() - begun_s < 1.5  # the copy of 3 MB under a sanitizer, and no network
    assert robot.ask("counters")["replaced"] > 0
    door, _ = scripted.accept(resumed=True)
    while door.receive("observation")["seq"] < 20:
        pass
    assert robot.ask("error")["code"] == "connection_lost"


def test_the_robot_takes_leave(built: Path, scripted: ScriptedServer) -> None:
    with leashed(built, scripted.port, close_ms=10_000) as robot:
        door, _ = scripted.accept()
        robot.ask("wait_open")
        ended_in_ms: list[float] = []
        leaving = threading.Thread(target=lambda: ended_in_ms.append(robot.quit()))
        leaving.start()
        assert door.receive("bye") == {}
        door.connection.close(1000)
        leaving.join()
        assert ended_in_ms[0] < 5000


def test_the_robot_does_not_wait_for_a_server_that_takes_no_leave(robot: Robot, scripted: ScriptedServer) -> None:
    scripted.accept()
    robot.ask("wait_open")
    assert robot.quit() < 1000


def test_the_robot_ends_at_once_while_nobody_answers(built: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, leashed(built, mute.getsockname()[1]) as robot:
        assert robot.ask("state") == {"state": "connecting"}
        with mute.accept()[0]:
            assert robot.quit() < 1000
    with leashed(built, 1, host="no-such-host.invalid") as robot:
        robot.ask("send 1")
        assert robot.quit() < 2000


def test_the_example_plays_what_it_is_sent(built: Path, scripted: ScriptedServer) -> None:
    command = [built / "drive", "--port", str(scripted.port), "--ticks", "40", "--vector", "state=1,2.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as drive:
        door, _ = scripted.accept()
        with suppress(ConnectionClosed):
            while (message := unpack(door.connection.recv(PATIENCE_S)))["type"] == "observation":
                np.testing.assert_array_equal(message["observation"]["state"], [1, 2.5])
                door.answer(message, np.full((4, 2), 0.25, np.float32))
        door.connection.close(1000)
        printed, _ = drive.communicate(timeout=PATIENCE_S)
    assert drive.returncode == 0
    assert "play    0.2500    0.2500" in printed
    assert "40 ticks:" in printed


def test_the_example_says_how_it_is_used(built: Path) -> None:
    assert "--policy NAME" in _run(built / "drive", "--help")
    wrong = subprocess.run([built / "drive", "--speed", "3"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "drive: there is no --speed; --help says what there is\n")


def test_the_real_server_answers_a_robot_in_cpp(built: Path, server: RunningServer) -> None:
    with leashed(built, server.port, rate_hz=5) as robot:
        assert robot.ask("wait_open") == {"open": 1}
        assert robot.ask("welcome")["policy"] == "tiny"
        for seq in (1, 2, 3):
            robot.ask("send 0.5 -0.25 0.1 0")
            chunk = robot.ask(f"wait_chunk {seq}")
            assert (chunk["seq"], chunk["horizon"], chunk["step_s"], chunk["policy"]) == (seq, 4, 0.05, "tiny")
            assert np.abs(chunk["first"]).max() <= 1.0
        robot.ask("send 1")  # a state of the wrong width
        assert robot.wait_for("error", seq=4)["code"] == "shape_mismatch"
        assert robot.ask("reset") == {"episode": 1}
        robot.ask("send 0.5 -0.25 0.1 0")
        assert robot.ask("wait_chunk 5")["episode"] == 1
        assert robot.ask("counters")["protocol_errors"] == 0
        robot.quit()
