"""API keys: who has one is let in at every door, and a server beyond this machine does not start without."""

import base64

import httpx
import pytest

from policy_server.bundle import Bundle
from tests.conftest import Launch, RunningServer
from tests.service.robot import TINY, Refusal, Robot, in_json, refusal_of, refused_start, refused_upgrade

KEYS = {"POLICY_SERVER_API_KEYS": "first-key, second-key,"}
REFUSAL = Refusal(
    401,
    "unauthorized",
    "a valid API key is needed: send 'Authorization: Api-Key <key>' or 'Authorization: Bearer <key>'",
)
WRONG = [
    None,
    "Api-Key third-key",
    "Api-Key first-ke",
    "Api-Key first-key2",
    "Api-Key FIRST-KEY",
    "Api-Key first-key, second-key",
    "Api-Key",
    "Bearer",
    "Basic first-key",
    "Basic " + base64.b64encode(b"first-key:").decode(),
    "Basic " + base64.b64encode(b"first-key:third-key").decode(),
    "first-key",
    "Api-Key schlüssel",
]


@pytest.fixture
def locked(launch: Launch, tiny_bundle: Bundle) -> RunningServer:
    return launch(tiny_bundle.path, "--engine", "onnx", env=KEYS)


def test_every_key_opens_every_door_under_either_scheme(locked: RunningServer) -> None:
    for scheme in ("Api-Key", "Bearer", "api-key", "BEARER"):
        for key in ("first-key", "second-key"):
            headers = {"Authorization": f"{scheme} {key}"}
            with Robot(locked, headers=headers) as robot:
                assert robot.ask(TINY)["policy"] == "tiny"
            body = {"observation": in_json(TINY)}
            assert httpx.post(f"{locked.url}/v1/policies/tiny/act", json=body, headers=headers).status_code == 200


def test_a_browser_may_send_a_key_as_its_password(locked: RunningServer) -> None:
    for user in ("", "anybody"):
        assert httpx.get(f"{locked.url}/v1/policies", auth=(user, "second-key")).status_code == 200
    assert refusal_of(httpx.get(f"{locked.url}/v1/policies", auth=("second-key", "second"))) == REFUSAL


def test_without_a_right_key_no_door_opens_but_the_health_checks(locked: RunningServer) -> None:
    with httpx.Client(base_url=locked.url) as http:
        for wrong in WRONG:
            headers = {"Authorization": wrong.encode()} if wrong else {}
            assert refusal_of(http.post("/v1/policies/tiny/act", json={}, headers=headers)) == REFUSAL
            for path in ("/", "/v1/policies", "/v1/policies/tiny", "/openapi.json", "/docs", "/nowhere", "/healthz/"):
                response = http.get(path, headers=headers)
                assert refusal_of(response) == REFUSAL
                assert {"Api-Key", "Bearer"} < set(response.headers["www-authenticate"].split(", "))
            for path in ("/healthz", "/readyz"):
                assert http.get(path, headers=headers).status_code == 200
    for path in ("/", "/healthz", "/readyz", "/any/path", "/v1/policies/tiny/openpi", "/v1/policies/tidy/openpi"):
        assert refused_upgrade(locked, path) == REFUSAL
        assert refused_upgrade(locked, path, {"Authorization": "Api-Key third-key"}) == REFUSAL


def test_keys_appear_neither_in_the_log_nor_in_an_answer(locked: RunningServer) -> None:
    headers = {"Authorization": "Api-Key third-key"}
    answer = httpx.get(f"{locked.url}/v1/policies", headers=headers).text
    assert locked.stop() == 0
    for key in ("first-key", "second-key", "third-key"):
        assert key not in answer + locked.log()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "robot.example"])
def test_a_server_that_others_can_reach_does_not_start_without_keys(tiny_bundle: Bundle, host: str) -> None:
    reason = refused_start(tiny_bundle.path, "--host", host, env={"POLICY_SERVER_API_KEYS": " , "})
    assert reason.startswith(f"{host} can be reached from other machines, and no API key is set.")
    assert "POLICY_SERVER_API_KEYS" in reason
    assert "--insecure" in reason


@pytest.mark.parametrize(("options", "env"), [(["--insecure"], {}), ([], KEYS)], ids=["insecure", "with keys"])
def test_it_starts_when_that_is_wanted(
    launch: Launch, tiny_bundle: Bundle, options: list[str], env: dict[str, str]
) -> None:
    server = launch(tiny_bundle.path, "--engine", "onnx", "--host", "0.0.0.0", *options, env=env)
    status = httpx.get(f"{server.url}/v1/policies").status_code
    assert status == (401 if env else 200)
