"""Whatever a robot sends by mistake or in malice, it gets a typed error, and other robots notice nothing."""

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import httpx
import msgpack
import numpy as np
import pytest

from policy_client.codec import pack
from tests.conftest import RunningServer
from tests.service.robot import CAMERA, STATE, TINY, TOP, Refusal, Robot, in_json, refusal_of

StillServing = Callable[[], None]
JPEG = cv2.imencode(".jpg", TOP)[1].tobytes()
PNG = cv2.imencode(".png", TOP)[1].tobytes()
HUGE = "x" * 3_000_000


@dataclass(frozen=True)
class Bad:
    """A request, and the error it must get: which, what was got, what was wanted."""

    name: str
    request: Any
    code: str
    words: tuple[str, ...]
    policy: str = "tiny"
    json_alone: bool = False  # msgpack has no form for it

    def __str__(self) -> str:
        return self.name

    def check(self, refusal: Refusal, status: int) -> None:
        assert (refusal.status, refusal.code) == (status, self.code), refusal
        for word in self.words:
            assert word in refusal.message


def _png_of_size(width: int, height: int) -> bytes:
    """Return a small file that claims to be a huge image of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 24))) + chunk(b"IEND", b"")


def _state(name: str, value: Any, code: str, *words: str, **rest: Any) -> Bad:
    return Bad(name, {**TINY, "state": value}, code, ("'state'", *words), **rest)


def _camera(name: str, top: Any, code: str, *words: str) -> Bad:
    return Bad(name, {**CAMERA, "top": top}, code, ("'top'", *words), "camera")


BAD_OBSERVATIONS = [
    Bad("no input at all", {}, "missing_input", ("'state' is missing", "nothing")),
    Bad("a missing camera", {"top": TOP, "state": [0, 0]}, "missing_input", ("'wrist'", "'top'"), "camera"),
    Bad("a misspelt key", {**TINY, "stat": STATE}, "unexpected_input", ("'stat'", "'state', 'goal'")),
    Bad("an empty key", {**TINY, "": STATE}, "unexpected_input", ("''",)),
    Bad("a key of megabytes", {**TINY, HUGE: STATE}, "unexpected_input", ("xxx",)),
    Bad("a key with a lone surrogate", {**TINY, "\ud800": 1}, "unexpected_input", ("ud800",), json_alone=True),
    Bad("one input twice", {**TINY, "observation/state": STATE}, "unexpected_input", ("second 'state'",)),
    Bad("a key of another policy", {**TINY, "top": TOP}, "unexpected_input", ("'top'",)),
    _state("too few numbers", STATE[:3], "shape_mismatch", "(3,)", "(4,)"),
    _state("too many numbers", np.zeros(5), "shape_mismatch", "(5,)", "(4,) (x, y, vx, vy)"),
    _state("a batch axis", STATE[None], "shape_mismatch", "(1, 4)", "(4,)"),
    _state("no axis", np.array(1.0), "shape_mismatch", "()", "(4,)"),
    _state("no numbers", np.zeros(0), "shape_mismatch", "(0,)"),
    _state("an empty list", [], "shape_mismatch", "(0,)"),
    _state("a ragged list", [1, [2, 3], 4, 5], "wrong_type", "ragged"),
    _state("a list of maps", [{"x": 1}] * 4, "wrong_type", "dict in it"),
    _state("booleans", np.zeros(4, bool), "wrong_type", "array of bool", "numbers"),
    _state("a list of booleans", [True] * 4, "wrong_type", "bool in it", "numbers"),
    _state("words", ["1", "2", "3", "4"], "wrong_type", "str in it", "numbers"),
    _state("nulls", [None] * 4, "wrong_type", "NoneType in it", "numbers"),
    _state("null", None, "wrong_type", "NoneType", "numbers"),
    _state("one number", 1.0, "wrong_type", "float", "numbers"),
    _state("text", "here", "wrong_type", "str", "numbers"),
    _state("bytes", b"here", "wrong_type", "bytes", "numbers"),
    _state("integers without end", [10**400] * 4, "wrong_type", "object", "numbers", json_alone=True),
    _state("a list nested past numpy", json.loads("[" * 80 + "]" * 80), "wrong_type", json_alone=True),
    _state("NaN", np.array([0, np.nan, 0, 0]), "not_finite", "nan at index 1", "finite"),
    _state("a list with infinity", [0.0, 0.0, -np.inf, 0.0], "not_finite", "-inf at index 2", "finite"),
    _state("a float64 past float32", np.array([0, 0, 0, 1e300]), "not_finite", "1e+300 at index 3", "float32"),
    Bad("a nested state", {"state": {"x": 1}}, "unexpected_input", ("'state/x'",)),
    Bad("a goal of two rows", {**TINY, "goal": np.zeros((2, 4))}, "shape_mismatch", ("'goal'", "(2, 4)", "(1, 4)")),
    Bad("a NaN goal", {**TINY, "goal": np.full(4, np.nan)}, "not_finite", ("'goal'", "nan at index 0")),
    _camera("an image of another size", TOP[:, :-1], "shape_mismatch", "(48, 63, 3)", "(48, 64, 3)"),
    _camera("a grey image", TOP[..., 0], "shape_mismatch", "(48, 64)"),
    _camera("an image with alpha", np.zeros((48, 64, 4), np.uint8), "shape_mismatch", "(48, 64, 4)"),
    _camera("an image of no rows", TOP[:0], "shape_mismatch", "(0, 64, 3)"),
    _camera("a float image", TOP / np.float32(255), "wrong_type", "float32", "uint8"),
    _camera("an image as nested lists", TOP[:2, :2].tolist(), "wrong_type", "list", "uint8 array"),
    _camera("an image as text", "top.png", "wrong_type", "str", "JPEG or PNG"),
    _camera("an encoded image of another size", cv2.imencode(".png", TOP[1:])[1].tobytes(), "shape_mismatch", "47"),
    _camera("no image bytes", b"", "undecodable_image", "JPEG or PNG"),
    _camera("bytes of another kind", b"GIF89a" + PNG, "undecodable_image", "b'GIF8'", "JPEG or PNG"),
    _camera("a JPEG of nothing but its first bytes", JPEG[:4], "undecodable_image", "4 bytes"),
    _camera("a JPEG cut in half", JPEG[: len(JPEG) // 2], "undecodable_image", "cut off"),
    _camera("a JPEG without its last byte", JPEG[:-1], "undecodable_image", "cut off"),
    _camera("a PNG cut in half", PNG[: len(PNG) // 2], "undecodable_image", "cut off"),
    _camera("a PNG of noise", PNG[:60] + np.random.default_rng(0).bytes(2000), "undecodable_image"),
    _camera("a decompression bomb", _png_of_size(60_000, 60_000), "undecodable_image", "pixels"),
    _camera("a bomb within four bytes of sizes", _png_of_size(2**31 - 1, 2**31 - 1), "undecodable_image"),
]

BAD_OPTIONS = [
    ({"steps": 0}, ("'options.steps'", "greater than or equal to 1", "got 0")),
    ({"steps": 1000}, ("'options.steps'", "less than or equal to 200", "got 1000")),
    ({"steps": "x"}, ("'options.steps'", "integer", "got 'x'")),
    ({"steps": 1.5}, ("'options.steps'", "integer", "got 1.5")),
    ({"steps": [3]}, ("'options.steps'", "integer", "got [3]")),
    ({"stps": 3}, ("'options.stps'", "not permitted", "got 3")),
    ({"sampler": "dimm"}, ("'options.sampler'", "there is no sampler 'dimm'; there are: euler, ", "ddim")),
    ({"sampler": 3}, ("'options.sampler'", "string", "got 3")),
    ({"sampler": HUGE}, ("'options.sampler'", "no sampler 'xxx")),
    ({"guidance": float("nan")}, ("'options.guidance'", "finite", "got nan")),
    ({"guidance": float("inf")}, ("'options.guidance'", "got inf")),
    ({"guidance": -0.1}, ("'options.guidance'", "got -0.1")),
    ({"guidance": 21}, ("'options.guidance'", "got 21")),
    ({"seed": -1}, ("'options.seed'", "got -1")),
    ({"seed": 2**63}, ("'options.seed'", "less than", str(2**63))),
    ({"budget_ms": 0}, ("'options.budget_ms'", "greater than 0", "got 0")),
    ({"budget_ms": float("nan")}, ("'options.budget_ms'", "got nan")),
    ([3], ("'options' is list", "map")),
    ("fast", ("'options' is str", "map")),
]


def _ask_in_json(http: httpx.Client, server: RunningServer, policy: str, request: Mapping[str, Any]) -> Refusal:
    body = json.dumps(in_json(request))
    headers = {"content-type": "application/json"}
    return refusal_of(http.post(f"/v1/policies/{policy}/act", content=body, headers=headers))


def _ask_in_msgpack(http: httpx.Client, server: RunningServer, policy: str, request: Mapping[str, Any]) -> Refusal:
    headers = {"content-type": "application/msgpack"}
    return refusal_of(http.post(f"/v1/policies/{policy}/act", content=pack(request), headers=headers))


def _ask_openpi(http: httpx.Client, server: RunningServer, policy: str, request: Mapping[str, Any]) -> Refusal:
    options = {"options": request["options"]} if "options" in request else {}
    with Robot(server, f"/v1/policies/{policy}/openpi") as robot:
        robot.send(request["observation"], **options)
        return robot.refusal()


DOORS = {"JSON": (_ask_in_json, 422), "msgpack": (_ask_in_msgpack, 422), "openpi": (_ask_openpi, 1011)}


@pytest.mark.parametrize(
    ("bad", "door"),
    [(bad, door) for bad in BAD_OBSERVATIONS for door in DOORS if door == "JSON" or not bad.json_alone],
    ids=str,
)
def test_a_bad_observation_is_refused_by_name_at_every_door(
    http: httpx.Client, server: RunningServer, assert_still_serving: StillServing, bad: Bad, door: str
) -> None:
    ask, status = DOORS[door]
    bad.check(ask(http, server, bad.policy, {"observation": bad.request}), status)
    assert_still_serving()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: repr(value)[:40])
def test_a_bad_option_is_refused_by_name_at_every_door(
    http: httpx.Client,
    server: RunningServer,
    assert_still_serving: StillServing,
    options: Any,
    words: tuple[str, ...],
    door: str,
) -> None:
    ask, status = DOORS[door]
    refusal = ask(http, server, "tiny", {"observation": TINY, "options": options})
    Bad("", None, "invalid_option", words).check(refusal, status)
    assert "Value error" not in refusal.message
    assert_still_serving()


def _forged(**changes: Any) -> bytes:
    array = {b"__ndarray__": True, b"data": bytes(32), b"dtype": "<f8", b"shape": [4]}
    return msgpack.packb({**array, **{key.encode(): value for key, value in changes.items()}})


def _holding(state: bytes) -> bytes:
    return b"\x81\xa5state" + state


GOOD_FRAME = pack(TINY)
BAD_FRAMES = [
    Bad("nothing", b"", "malformed_message", ()),
    Bad("one byte", b"\xc1", "malformed_message", ("msgpack",)),
    Bad("random bytes", np.random.default_rng(0).bytes(500), "malformed_message", ()),
    Bad("JSON", b'{"state": [1, 2, 3, 4]}', "malformed_message", ("bytes after the end",)),
    Bad("a message cut in half", GOOD_FRAME[: len(GOOD_FRAME) // 2], "malformed_message", ("msgpack",)),
    Bad("a message and a half", GOOD_FRAME + GOOD_FRAME[:9], "malformed_message", ("9 bytes after the end",)),
    Bad("a forged dtype of objects", _holding(_forged(dtype="|O")), "malformed_message", ("'|O'", "expected")),
    Bad("a dtype of records", _holding(_forged(dtype="f8,f8")), "malformed_message", ("'f8,f8'", "expected")),
    Bad("a dtype of numbers", _holding(_forged(dtype=7)), "malformed_message", ("dtype is 7",)),
    Bad("a shape past the data", _holding(_forged(shape=[5])), "malformed_message", ("32 bytes", "expected 40")),
    Bad("a shape of 2**62", _holding(_forged(shape=[2**62, 8])), "malformed_message", ("32 bytes",)),
    Bad("a negative shape", _holding(_forged(shape=[-4])), "malformed_message", ("non-negative",)),
    Bad("a marker without data", _holding(b"\x81\xc4\x0b__ndarray__\xc3"), "malformed_message", ("keys",)),
    Bad("an extension type", _holding(b"\xd4\x05\x00"), "malformed_message", ()),
    Bad("a map of a billion entries", b"\xdf\x3b\x9a\xca\x00", "malformed_message", ()),
    Bad("a string of a billion bytes", _holding(b"\xdb\x3b\x9a\xca\x00abc"), "malformed_message", ()),
    Bad("a thousand lists", _holding(b"\x91" * 1000 + b"\x00"), "malformed_message", ("nested",)),
    Bad("a key twice", b"\x82\xa5state\x01\xa5state\x01", "malformed_message", ("'state' twice",)),
]


@pytest.mark.parametrize("bad", BAD_FRAMES, ids=str)
def test_bytes_that_are_no_message_are_refused_on_the_websocket(
    server: RunningServer, assert_still_serving: StillServing, bad: Bad
) -> None:
    with Robot(server) as robot:
        robot.socket.send(bad.request)
        bad.check(robot.refusal(), 1011)
    assert_still_serving()


@pytest.mark.parametrize(
    "bad",
    [
        Bad("a text frame", "hello", "malformed_message", ("text frame", "binary")),
        Bad("JSON in a text frame", '{"state": [1, 2, 3, 4]}', "malformed_message", ("text frame", "binary")),
        Bad("a list", pack([1, 2]), "malformed_message", ("list", "map")),
        Bad("an array", pack(STATE), "malformed_message", ("ndarray", "map")),
        Bad("a key that is no string", b"\x81\xc4\x01s\x01", "wrong_type", ("b's'", "string")),
        Bad("an unknown endpoint", pack({"endpoint": "kill"}), "malformed_message", ("'kill'", "'infer' or 'reset'")),
        Bad("an endpoint that is an array", pack({"endpoint": STATE}), "malformed_message", ("'infer' or 'reset'",)),
        Bad("an endpoint of megabytes", pack({"endpoint": HUGE}), "malformed_message", ("'endpoint' is 'xxx",)),
        Bad("a session that is an array", pack({"session_id": STATE}), "missing_input", ("'state'",)),
    ],
    ids=str,
)
def test_a_message_that_makes_no_sense_is_refused_on_the_websocket(
    server: RunningServer, assert_still_serving: StillServing, bad: Bad
) -> None:
    with Robot(server) as robot:
        robot.socket.send(bad.request)
        bad.check(robot.refusal(), 1011)
    assert_still_serving()


def _json(**request: Any) -> bytes:
    return json.dumps(request).encode()


def _array(**changes: Any) -> bytes:
    return _json(observation={"state": {**in_json(np.zeros(4, np.float32)), **changes}})


BAD_BODIES = [
    *[("application/msgpack", bad) for bad in BAD_FRAMES],
    *[
        ("application/json", Bad(name, body, "malformed_message", words))
        for name, body, words in [
            ("nothing", b"", ("not JSON",)),
            ("half an object", b'{"observation": {', ("not JSON",)),
            ("random bytes", np.random.default_rng(0).bytes(500), ("not JSON",)),
            ("msgpack", GOOD_FRAME, ("not JSON",)),
            ("a list", b"[]", ("list", "'observation'")),
            ("null", b"null", ("NoneType", "'observation'")),
            ("no observation", b"{}", ("'observation'", "required")),
            ("an observation that is a list", _json(observation=[1]), ("'observation'", "dictionary")),
            ("a misspelt field", _json(observation={}, option={}), ("'option'", "not permitted")),
            ("an empty session", _json(observation={}, session=""), ("'session'", "at least 1")),
            ("a session of numbers", _json(observation={}, session=5), ("'session'", "string")),
            ("a session of megabytes", _json(observation={}, session=HUGE), ("'session'", "at most 128")),
            ("ten thousand lists", b"[" * 10_000, ("not JSON",)),
            ("five hundred maps", b'{"a":' * 500 + b"1" + b"}" * 500, ()),
            ("a number of 5000 digits", b'{"observation": {"state": [' + b"9" * 5000 + b"]}}", ("not JSON",)),
            ("an array of objects", _array(dtype="|O"), ("'|O'", "booleans, integers or floats")),
            ("an array of records", _array(dtype="i4,("), ("'i4,('", "booleans, integers or floats")),
            ("an array without a dtype", _array(dtype=None), ("None", "booleans, integers or floats")),
            ("a dtype that is a map", _array(dtype={"names": ["a"], "formats": ["O"]}), ("booleans",)),
            ("an array past its data", _array(shape=[5]), ("16 bytes", "[5]")),
            ("an array of 2**62", _array(shape=[2**62, 8]), ("16 bytes",)),
            ("an array of a negative size", _array(shape=[-4]), ("list of sizes",)),
            ("an array that is not base64", _array(__numpy__="?"), ("base64",)),
            ("bytes that are not base64", _json(observation={"state": {"base64": [1]}}), ("base64",)),
        ]
    ],
    ("text/plain", Bad("plain text", b"hello", "malformed_message", ("'text/plain'", "application/json"))),
    ("multipart/form-data; boundary=x", Bad("a form", b"--x--", "malformed_message", ("'multipart/form-data'",))),
    ("", Bad("no content type", _json(observation={}), "malformed_message", ("''", "application/json"))),
]


@pytest.mark.parametrize(("media_type", "bad"), BAD_BODIES, ids=str)
def test_a_body_that_is_no_request_is_refused(
    http: httpx.Client, assert_still_serving: StillServing, media_type: str, bad: Bad
) -> None:
    headers = {"content-type": media_type}
    bad.check(refusal_of(http.post("/v1/policies/tiny/act", content=bad.request, headers=headers)), 400)
    assert_still_serving()
