"""Another version of a policy: who may ask for it, and what is refused while the old one goes on."""

import shutil
from pathlib import Path

import httpx
import pytest
import yaml

from policy_server.bundle import Bundle
from tests.conftest import Launch, RunningServer
from tests.service.robot import PATIENCE_S, TINY, Robot, refusal_of
from tests.service.triton import successor


@pytest.fixture(scope="module")
def new(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The next version of tiny."""
    return successor(tiny_bundle, tmp_path_factory.mktemp("successor") / "tiny")


def _swap(server: RunningServer, path: Path, name: str = "tiny", **options) -> httpx.Response:
    return httpx.put(f"{server.url}/v1/policies/{name}", json={"bundle": str(path)}, timeout=PATIENCE_S, **options)


def _changed(bundle: Bundle, folder: Path, **entries) -> Path:
    """Return a copy of a bundle whose manifest says something else."""
    shutil.copytree(bundle.path, folder)
    manifest = yaml.safe_load((folder / "policy.yaml").read_text())
    for name, value in entries.items():
        (manifest["spec"] if name in manifest["spec"] else manifest)[name] = value
    (folder / "policy.yaml").write_text(yaml.safe_dump(manifest))
    return folder


def test_a_new_version_takes_over_and_says_so(launch: Launch, tiny_bundle: Bundle, new: Bundle) -> None:
    server = launch(tiny_bundle.path, "--engine", "onnx")
    with Robot(server) as robot:
        before = robot.ask(TINY, options={"seed": 7})
        done = _swap(server, new.path).json()
        assert (done["name"], done["version"], done["engine"], done["retiring"]) == ("tiny", "2", "onnx", ["1"])
        after = robot.ask(TINY, options={"seed": 7})
    assert (before["version"], after["version"]) == ("1", "2")
    assert abs(after["actions"]).max() < abs(before["actions"]).max()
    page = httpx.get(f"{server.url}/v1/policies/tiny").json()
    assert (page["version"], page["spec"]["horizon"]) == ("2", 4)


@pytest.mark.parametrize(
    ("what", "entries", "code"),
    [
        ("set of inputs", {"state": {"names": list("abcd"), "units": ["m"] * 4}}, "not_interchangeable"),
        ("step_s", {"step_s": 0.1}, "not_interchangeable"),
        ("name", {"name": "other"}, "not_interchangeable"),
        ("format", {"format": 2}, "bundle_invalid"),
    ],
)
def test_what_would_hurt_connected_robots_is_refused(
    server: RunningServer, new: Bundle, tmp_path: Path, what: str, entries, code: str
) -> None:
    refusal = refusal_of_swap(_swap(server, _changed(new, tmp_path / "bundle", **entries)))
    assert refusal == (422, code)
    with Robot(server) as robot:
        assert robot.ask(TINY)["version"] == "1"


def refusal_of_swap(response: httpx.Response) -> tuple[int, str]:
    """Return status and code; the message names a folder, as an operator must know which."""
    return response.status_code, response.json()["error"]["code"]


def test_what_is_no_bundle_is_refused(server: RunningServer, tiny_bundle: Bundle, new: Bundle, tmp_path: Path) -> None:
    assert refusal_of_swap(_swap(server, tmp_path)) == (422, "bundle_invalid")
    assert refusal_of_swap(_swap(server, new.path, name="nobody")) == (404, "unknown_policy")
    broken = _changed(new, tmp_path / "broken")
    (broken / "normalizer.json").write_text("{}")
    assert refusal_of_swap(_swap(server, broken)) == (422, "bundle_corrupt")
    address = f"{server.url}/v1/policies/tiny"
    for body in (b"{", b"[]", b'{"bundle": 3}', b'{"bundles": "x"}'):
        response = httpx.put(address, content=body, headers={"Content-Type": "application/json"})
        refusal = refusal_of(response)
        assert (refusal.status, refusal.code) == (400, "malformed_message")
    # What a web page can send without being asked for its origin first.
    response = httpx.put(address, content=f'{{"bundle": "{new.path}"}}', headers={"Content-Type": "text/plain"})
    assert refusal_of(response).code == "malformed_message"


def test_a_swap_takes_an_admin_key_where_there_are_any(launch: Launch, tiny_bundle: Bundle, new: Bundle) -> None:
    keys = {"POLICY_SERVER_API_KEYS": "robot", "POLICY_SERVER_ADMIN_KEYS": "operator"}
    server = launch(tiny_bundle.path, "--engine", "onnx", env=keys)
    assert refusal_of(_swap(server, new.path)).status == 401
    robots = {"Authorization": "Api-Key robot"}
    assert refusal_of(_swap(server, new.path, headers=robots)).code == "forbidden"
    assert httpx.get(f"{server.url}/v1/policies", headers=robots).json()[0]["version"] == "1"
    assert _swap(server, new.path, headers={"Authorization": "Bearer operator"}).status_code == 200
    assert httpx.get(f"{server.url}/v1/policies", headers=robots).json()[0]["version"] == "2"


def test_a_server_that_others_can_reach_swaps_nothing_without_admin_keys(
    launch: Launch, tiny_bundle: Bundle, new: Bundle
) -> None:
    server = launch(tiny_bundle.path, "--engine", "onnx", "--host", "0.0.0.0", "--insecure")
    assert refusal_of(_swap(server, new.path)).code == "forbidden"
