"""What robots get wrong in the streaming protocol: it is named, and other robots notice nothing."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from policy_client.codec import pack
from tests.conftest import RunningServer
from tests.service.robot import SLOWLY, TINY
from tests.service.stream_robot import StreamRobot


@pytest.fixture(autouse=True)
def undisturbed(server: RunningServer, assert_still_serving: Callable[[], None]) -> Iterator[None]:
    """Another robot streams before and after, and gets the very same chunk; so do robots at the other doors."""
    with StreamRobot(server, name="bystander") as bystander:
        wanted = bystander.actions(TINY, seed=7)
        yield
        np.testing.assert_array_equal(bystander.actions(TINY, seed=7), wanted)
    assert_still_serving()


def _refused(server: RunningServer, *frames: bytes | str, **hello: Any) -> tuple[str, int]:
    """Return the error's code and the close code that these frames get after a hello, or in its place."""
    robot = StreamRobot(server, greet=bool(hello), **hello)
    if hello:
        robot.receive("welcome")
    for frame in frames:
        robot.socket.send(frame)
    error = robot.receive("error")
    assert "seq" not in error
    assert 0 < len(error["message"]) < 1100
    return error["code"], robot.close_code()


NO_MESSAGES = {
    "text": '{"type": "observation"}',
    "empty": b"",
    "noise": np.random.default_rng(0).bytes(500),
    "cut off": pack({"type": "cancel", "seq": 1})[:-1],
    "a list": pack(["cancel", 1]),
    "no type": pack({"seq": 1}),
    "no such type": pack({"type": "observe", "seq": 1}),
    "a type that is no text": pack({"type": 1}),
    "a type of bytes": pack({b"type": b"bye"}),
    "too deep": b"\x91" * 1000 + b"\xc0",
    "too many values": b"\xdd\xff\xff\xff\xff",
    "a second hello": pack({"type": "hello", "protocol": 1}),
}


@pytest.mark.parametrize("frame", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_of_the_protocol_ends_the_connection(server: RunningServer, frame: bytes | str) -> None:
    assert _refused(server, frame, name="abuser") == ("malformed_message", 1002)


@pytest.mark.parametrize("type_", ["observation", "set", "reset", "cancel", "pong", "bye"])
def test_the_conversation_begins_with_a_hello(server: RunningServer, type_: str) -> None:
    fields = {"bye": {}, "pong": {"sent_ns": 1, "robot_ns": 1}, "reset": {"episode": 1}}.get(type_, {"seq": 1})
    if type_ == "observation":
        fields |= {"captured_ns": 1, "observation": TINY}
    elif type_ == "set":
        fields = {"revision": 1}
    assert _refused(server, pack({"type": type_, **fields})) == ("malformed_message", 1002)


HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "a later version": ({"protocol": 2}, "unsupported_protocol"),
    "no version": ({}, "malformed_message"),
    "a version in words": ({"protocol": "1"}, "malformed_message"),
    "an unknown key": ({"protocol": 1, "colour": "red"}, "malformed_message"),
    "a key of bytes": ({"protocol": 1, b"name": "x"}, "malformed_message"),
    "a long name": ({"protocol": 1, "name": "x" * 65}, "malformed_message"),
    "a rate of nothing": ({"protocol": 1, "rate_hz": 0}, "malformed_message"),
    "no number": ({"protocol": 1, "deadline_ms": float("nan")}, "malformed_message"),
    "too high a rate": ({"protocol": 1, "rate_hz": 90_000}, "rate_too_high"),
    "an unknown option": ({"protocol": 1, "options": {"speed": 2}}, "invalid_option"),
    "an option out of range": ({"protocol": 1, "options": {"steps": 0}}, "invalid_option"),
    "options in a list": ({"protocol": 1, "options": [1]}, "malformed_message"),
    "an unknown continuity": ({"protocol": 1, "continuity": "smooth"}, "invalid_option"),
    "an unknown key of one": ({"protocol": 1, "continuity": {"mode": "rtc", "colour": 1}}, "invalid_option"),
    "a continuity without mode": ({"protocol": 1, "continuity": {"decay": 1}}, "invalid_option"),
}


@pytest.mark.parametrize(("hello", "code"), HELLOS.values(), ids=HELLOS)
def test_a_hello_that_is_refused_is_told_why(server: RunningServer, hello: dict[str, Any], code: str) -> None:
    assert _refused(server, pack({"type": "hello", **hello})) == (code, 1008)


def test_a_policy_that_does_not_denoise_offers_no_continuity_that_does(server: RunningServer) -> None:
    for mode in ("rtc", "warm"):
        robot = StreamRobot(server, "camera", continuity=mode)
        assert robot.receive("error")["code"] == "invalid_option"
        assert robot.close_code() == 1008
    with StreamRobot(server, "camera", continuity="ensemble"):
        pass


OBSERVATION = {"seq": 1, "captured_ns": 1, "observation": TINY}
WRONG_KEYS: dict[str, dict[str, Any]] = {
    "an unknown key": {"type": "observation", **OBSERVATION, "colour": "red"},
    "a key of bytes": {"type": "observation", **OBSERVATION, b"seq": 1},
    "no number": {"type": "observation", "captured_ns": 1, "observation": TINY},
    "number 0": {"type": "observation", **OBSERVATION, "seq": 0},
    "half a number": {"type": "observation", **OBSERVATION, "seq": 1.5},
    "a number in words": {"type": "observation", **OBSERVATION, "seq": "1"},
    "a truth for a number": {"type": "observation", **OBSERVATION, "seq": True},
    "a number past the end": {"type": "observation", **OBSERVATION, "seq": 2**63},
    "no time": {"type": "observation", "seq": 1, "observation": TINY},
    "an episode before the first": {"type": "observation", **OBSERVATION, "episode": -1},
    "an endless delay": {"type": "observation", **OBSERVATION, "delay_ms": float("inf")},
    "an observation that is none": {"type": "observation", **OBSERVATION, "observation": [1, 2]},
    "a set without revision": {"type": "set", "inputs": {}},
    "revision 0": {"type": "set", "revision": 0},
    "a set of nonsense": {"type": "set", "revision": 1, "inputs": 3},
    "a reset to nowhere": {"type": "reset"},
    "a cancel of everything": {"type": "cancel"},
    "a pong without a ping": {"type": "pong", "robot_ns": 1},
    "a bye with words": {"type": "bye", "reason": "tired"},
}


@pytest.mark.parametrize("message", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_message_with_a_wrong_key_is_ignored_and_the_conversation_goes_on(
    server: RunningServer, message: dict[str, Any]
) -> None:
    with StreamRobot(server) as robot:
        robot.socket.send(pack(message))
        error = robot.receive("error")
        assert error["code"] == "malformed_message" and "seq" not in error
        assert message["type"] in error["message"]
        assert robot.ask(TINY)["seq"] == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"observation": {}}, "missing_input"),
    "a wrong shape": ({"observation": {"state": np.zeros(3, np.float32)}}, "shape_mismatch"),
    "no finite number": ({"observation": {"state": np.full(4, np.nan, np.float32)}}, "not_finite"),
    "words": ({"observation": {"state": "left"}}, "wrong_type"),
    "a misspelt input": ({"observation": {**TINY, "gaol": TINY["goal"]}}, "unexpected_input"),
    "an unknown option": ({"options": {"speed": 2}}, "invalid_option"),
    "no step at all": ({"options": {"steps": 0}}, "invalid_option"),
    "a budget in words": ({"options": {"budget_ms": "soon"}}, "invalid_option"),
    "a budget that is no number": ({"options": {"budget_ms": float("nan")}}, "invalid_option"),
    "a set that never came": ({"revision": 9}, "unknown_revision"),
}


@pytest.mark.parametrize("deadline_ms", [None, 10_000], ids=["", "with a deadline"])
@pytest.mark.parametrize(("fields", "code"), REFUSED.values(), ids=REFUSED)
def test_an_observation_that_cannot_be_answered_is_refused_by_its_number(
    server: RunningServer, fields: dict[str, Any], code: str, deadline_ms: float | None
) -> None:
    with StreamRobot(server, **({"deadline_ms": deadline_ms} if deadline_ms else {})) as robot:
        assert robot.refusal(**{"observation": TINY, **fields}) == code
        assert robot.ask(TINY)["seq"] == 2


def test_a_set_with_wrong_options_is_refused_and_not_relied_on(server: RunningServer) -> None:
    with StreamRobot(server) as robot:
        robot.send("set", revision=1, options={"steps": 0})
        error = robot.receive("error")
        assert error["code"] == "invalid_option" and "seq" not in error
        assert robot.refusal(TINY, revision=1) == "unknown_revision"


def test_a_robot_that_floods_the_server_gets_its_newest_chunk_and_takes_nothing_from_others(
    server: RunningServer,
) -> None:
    with StreamRobot(server, options={"seed": 7}) as flooding, StreamRobot(server, options={"seed": 7}) as other:
        wanted = other.ask(TINY)["actions"]
        for _ in range(40):
            for _ in range(50):
                flooding.observe(TINY, episode=flooding.seq, options=SLOWLY)
                flooding.send("cancel", seq=flooding.seq - 1)
            np.testing.assert_array_equal(other.ask(TINY)["actions"], wanted)
        newest = flooding.observe(TINY, episode=flooding.seq)
        while (chunk := flooding.receive("chunk"))["seq"] < newest:
            pass
        np.testing.assert_array_equal(chunk["actions"], wanted)


def test_a_robot_that_does_not_read_its_errors_takes_nothing_from_others(server: RunningServer) -> None:
    wrong = pack({"type": "cancel", "seq": 1, "x" * 1000: None})
    with StreamRobot(server) as deaf, StreamRobot(server, options={"seed": 7}) as other:
        wanted = other.ask(TINY)["actions"]
        for _ in range(40):
            for _ in range(200):
                deaf.socket.send(wrong)
            np.testing.assert_array_equal(other.ask(TINY)["actions"], wanted)
        deaf.break_off()


def test_robots_that_hang_up_while_they_are_answered_leave_no_trace(server: RunningServer) -> None:
    before = server.log().count("Traceback")
    for n in range(20):
        with StreamRobot(server) as robot:
            robot.observe(TINY, options=SLOWLY if n % 2 else {})
            if n % 4 == 0:
                robot.send("bye")
            elif n % 4 == 1:
                robot.break_off()
            else:
                time.sleep(0.001 * n)
    assert server.log().count("Traceback") == before
