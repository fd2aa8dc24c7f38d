"""The HTTP door: chunks in JSON and msgpack, sessions, options, and what the server says of itself."""

from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI

from policy_client.codec import pack, unpack
from tests.service.robot import CAMERA, STATE, TINY, TOP, WRIST, in_json, refusal_of

POLICIES = ["tiny", "tiny-step", "camera"]
TURN = [{"state": [x, -x, 0.1, 0.0]} for x in (0.5, -0.5, 1.0, 0.2)]


def test_a_chunk_in_json_comes_with_everything_needed_to_use_and_to_repeat_it(http: httpx.Client) -> None:
    reply = _act(http, TINY, options={"seed": 7})
    actions = np.array(reply.pop("actions"))
    assert actions.shape == (4, 2)
    assert np.abs(actions).max() <= 1.0
    assert reply.pop("infer_ms") > 0
    assert reply == {"step_s": 0.05, "policy": "tiny", "version": "1", "engine": "onnx", "seed": 7, "clamped": 0}


@pytest.mark.parametrize("media_type", ["application/msgpack", "application/x-msgpack", "application/vnd.msgpack"])
def test_a_chunk_in_msgpack_is_the_one_in_json(http: httpx.Client, media_type: str) -> None:
    body = pack({"observation": TINY, "options": {"seed": 7}})
    response = http.post("/v1/policies/tiny/act", content=body, headers={"content-type": media_type})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/msgpack")
    packed, plain = unpack(response.content), _act(http, TINY, options={"seed": 7})
    assert packed["actions"].dtype == np.float32
    np.testing.assert_array_equal(packed["actions"], np.float32(plain["actions"]))
    assert packed.keys() == plain.keys()


@pytest.mark.parametrize(
    "observation",
    [
        TINY,
        {"state": STATE.tolist(), "goal": [TINY["goal"].tolist()]},
        {"observation/state": STATE, "observation": {"goal": TINY["goal"]}, "prompt": "go there"},
        {"state": {"__numpy__": in_json(STATE)["__numpy__"], "dtype": "float32", "shape": [4]}, "goal": TINY["goal"]},
    ],
    ids=["json-numpy", "lists", "prefixed", "dtype in words"],
)
def test_vectors_may_be_lists_or_arrays_under_any_usual_name(
    http: httpx.Client, observation: Mapping[str, Any]
) -> None:
    assert _actions(http, observation, seed=7) == _actions(http, TINY, seed=7)


def test_a_seed_reproduces_a_chunk_also_one_that_nobody_asked_for(http: httpx.Client) -> None:
    first, second = _act(http, TINY), _act(http, TINY)
    assert first["seed"] != second["seed"]
    assert first["actions"] != second["actions"]
    assert _actions(http, TINY, seed=first["seed"]) == first["actions"]
    assert _actions(http, TINY, seed=2**63 - 1) == _actions(http, TINY, seed=2**63 - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 20},
        {"sampler": "heun"},
        {"sampler": "euler_ancestral"},
        {"guidance": 2},
        {"guidance": 0},
    ],
    ids=str,
)
def test_each_option_changes_the_chunk_and_null_keeps_the_default(
    http: httpx.Client, options: Mapping[str, Any]
) -> None:
    usual = np.array(_actions(http, TINY, seed=7))
    assert np.abs(_actions(http, TINY, seed=7, **options) - usual).max() > 1e-3
    np.testing.assert_array_equal(_actions(http, TINY, seed=7, **dict.fromkeys(options)), usual)


def test_guidance_zero_is_the_same_as_leaving_out_the_goal(http: httpx.Client) -> None:
    assert _actions(http, TINY, seed=7, guidance=0) == _actions(http, {"state": STATE}, seed=7)


def test_budgets_that_can_be_met_are_met(http: httpx.Client) -> None:
    assert _actions(http, TINY, seed=7, budget_ms=20_000) == _actions(http, TINY, seed=7)


def test_a_named_session_remembers_what_the_robot_saw(http: httpx.Client, episode: str) -> None:
    alone = [_turn(http, turn) for turn in TURN]
    together = [_turn(http, turn, episode) for turn in TURN]
    assert together[0] == alone[0]
    for remembering, forgetful in zip(together[1:], alone[1:], strict=True):
        assert np.abs(np.subtract(remembering, forgetful)).max() > 1e-4


def test_a_deleted_session_begins_anew(http: httpx.Client, episode: str) -> None:
    first = [_turn(http, turn, episode) for turn in TURN]
    for _ in range(2):  # deleting twice is fine
        assert http.delete(f"/v1/policies/tiny-step/sessions/{episode}").status_code == 204
    assert [_turn(http, turn, episode) for turn in TURN] == first


def test_a_refused_request_leaves_its_session_as_it_was(http: httpx.Client, episode: str) -> None:
    wanted = [_turn(http, turn, episode) for turn in TURN]
    http.delete(f"/v1/policies/tiny-step/sessions/{episode}")
    got = []
    for turn in TURN:
        response = http.post("/v1/policies/tiny-step/act", json={"observation": {"state": [1]}, "session": episode})
        assert response.status_code == 422
        got.append(_turn(http, turn, episode))
    assert got == wanted


def test_the_list_names_every_policy_and_the_default_one(http: httpx.Client) -> None:
    policies = http.get("/v1/policies").json()
    assert [policy["name"] for policy in policies] == POLICIES
    assert [policy["name"] for policy in policies if policy["default"]] == ["tiny"]
    assert [policy["family"] for policy in policies] == ["beso", "beso", "hold"]
    assert {policy["engine"] for policy in policies} == {"onnx"}


def test_a_spec_tells_units_limits_and_rates(http: httpx.Client) -> None:
    policy = http.get("/v1/policies/tiny").json()
    assert policy["spec"]["action"] == {
        "names": ["fx", "fy"],
        "units": ["N", "N"],
        "low": [-1.0, -1.0],
        "high": [1.0, 1.0],
    }
    assert policy["spec"]["state"]["units"] == ["m", "m", "m/s", "m/s"]
    assert (policy["spec"]["horizon"], policy["spec"]["step_s"]) == (4, 0.05)
    assert policy["inputs"]["state"] == "float32 (4,): x [m], y [m], vx [m/s], vy [m/s]"
    assert policy["licence"] == "Apache-2.0"
    assert policy["golden_drift"] < 1e-4
    assert policy["chunk_ms"] > 0


def test_a_spec_tells_the_size_and_the_resize_rule_of_each_camera(http: httpx.Client) -> None:
    cameras = http.get("/v1/policies/camera").json()["spec"]["cameras"]
    assert cameras == [
        {"name": "top", "height": 48, "width": 64, "resize": "refuse", "crop": 1.0},
        {"name": "wrist", "height": 32, "width": 32, "resize": "area", "crop": 1.0},
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_the_example_of_every_policy_works_as_given(http: httpx.Client, name: str) -> None:
    policy = http.get(f"/v1/policies/{name}").json()
    response = http.post(f"/v1/policies/{name}/act", json=policy["example"])
    assert response.status_code == 200, response.text
    assert np.shape(response.json()["actions"]) == (policy["spec"]["horizon"], 2)


def test_the_openapi_document_is_valid_and_its_examples_work(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    assert all(_resolves(document, reference) for reference in _references(document))
    act = document["paths"]["/v1/policies/{name}/act"]["post"]
    body = act["requestBody"]["content"]
    assert body.keys() == {"application/json", "application/msgpack"}
    assert body["application/json"]["schema"]["properties"].keys() == {"observation", "options", "session"}
    assert "guidance" in body["application/json"]["schema"]["properties"]["options"]["properties"]
    examples = body["application/json"]["examples"]
    assert examples.keys() == {"tiny", "tiny-step"}
    for name, example in examples.items():
        assert http.post(f"/v1/policies/{name}/act", json=example["value"]).status_code == 200
    assert {"200", "400", "401", "404", "413", "422", "503", "504"} <= act["responses"].keys()
    assert http.get("/docs").status_code == 200


@pytest.mark.parametrize(
    "image",
    [
        TOP,
        TOP.transpose(2, 0, 1).copy(),
        cv2.imencode(".png", TOP[..., ::-1])[1].tobytes(),
        cv2.imencode(".jpg", TOP[..., ::-1])[1].tobytes(),
        cv2.imencode(".png", TOP[..., 0])[1].tobytes(),
    ],
    ids=["array", "channels first", "PNG", "JPEG", "grey PNG"],
)
@pytest.mark.parametrize("in_msgpack", [False, True], ids=["JSON", "msgpack"])
def test_an_image_may_be_an_array_or_an_encoded_file(
    http: httpx.Client, image: np.ndarray | bytes, in_msgpack: bool
) -> None:
    observation = {**CAMERA, "top": image}
    if in_msgpack:
        headers = {"content-type": "application/msgpack"}
        response = http.post("/v1/policies/camera/act", content=pack({"observation": observation}), headers=headers)
        actions = unpack(response.content)["actions"].tolist()
    else:
        actions = _act(http, observation, policy="camera")["actions"]
    assert actions == [[0.5, -0.25]] * 4


@pytest.mark.parametrize("size", [(64, 64), (32, 31), (8, 8), (720, 1280)])
def test_a_camera_whose_rule_is_area_takes_images_of_any_size(http: httpx.Client, size: tuple[int, int]) -> None:
    wrist = np.zeros((*size, 3), np.uint8)
    assert _act(http, {**CAMERA, "wrist": wrist}, policy="camera")["actions"] == [[0.5, -0.25]] * 4


def test_a_camera_whose_rule_is_refuse_takes_its_own_size_alone(http: httpx.Client) -> None:
    encoded = cv2.imencode(".png", WRIST)[1].tobytes()
    for top in (TOP[:-1], WRIST, encoded):
        response = http.post("/v1/policies/camera/act", json={"observation": in_json({**CAMERA, "top": top})})
        refusal = refusal_of(response)
        assert (refusal.status, refusal.code) == (422, "shape_mismatch")
        assert "'top'" in refusal.message
        assert "expected (48, 64, 3)" in refusal.message


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/policies/tidy", 404, "unknown_policy"),
        ("POST", "/v1/policies/tidy/act", 404, "unknown_policy"),
        ("DELETE", "/v1/policies/tidy/sessions/a", 404, "unknown_policy"),
        ("GET", "/v1/nothing", 404, "no_such_address"),
        ("GET", "/", 404, "no_such_address"),
        ("GET", "/v1/policies/tiny/act", 405, "wrong_method"),
    ],
)
def test_a_wrong_address_is_refused_as_json(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    refusal = refusal_of(http.request(method, path))
    assert (refusal.status, refusal.code) == (status, code)


@pytest.fixture
def episode(http: httpx.Client) -> Iterator[str]:
    """Name a session of tiny-step that nobody has used, and end it afterwards."""
    yield "test-http"
    http.delete("/v1/policies/tiny-step/sessions/test-http")


def _act(http: httpx.Client, observation: Mapping[str, Any], *, policy: str = "tiny", **rest: Any) -> dict[str, Any]:
    response = http.post(f"/v1/policies/{policy}/act", json={"observation": in_json(observation), **rest})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def _actions(http: httpx.Client, observation: Mapping[str, Any], **options: Any) -> list[list[float]]:
    return _act(http, observation, options=options)["actions"]


def _turn(http: httpx.Client, observation: Mapping[str, Any], session: str | None = None) -> list[list[float]]:
    return _act(http, observation, policy="tiny-step", options={"seed": 1}, session=session)["actions"]


def _references(node: Any) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "$ref":
            yield value
        yield from _references(value)


def _resolves(document: Any, reference: str) -> bool:
    for part in reference.removeprefix("#/").split("/"):
        if part not in document:
            return False
        document = document[part]
    return reference.startswith("#/")
