"""A policy that sees two cameras and is told what to do, at every door: what it takes, and what it refuses."""

import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from policy_client import PolicyClient, ServerError
from policy_client.codec import pack, unpack
from policy_server.bundle import Bundle
from tests.conftest import REPOSITORY, RunningServer, launched
from tests.service.robot import CAMERA, PATIENCE_S, Robot, in_json
from tests.service.test_bad_input import DOORS as DOORS_THAT_REFUSE
from tests.service.test_bad_input import Bad

# The first test waits for the export of two policies, half a minute where nothing else runs.
pytestmark = pytest.mark.timeout(300)

Actions = Callable[..., np.ndarray]
StillServing = Callable[[], None]


def _scene(height: int, width: int, seed: int) -> np.ndarray:
    """Return a smooth picture, which JPEG hardly changes."""
    blobs = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(blobs, (width, height), interpolation=cv2.INTER_LINEAR)


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Return what a camera of twice the resolution sees."""
    return image.repeat(2, axis=0).repeat(2, axis=1)


STATIC, WRIST, PROMPT = _scene(48, 64, 0), _scene(40, 50, 1), "open the drawer"
TOLD = {"static": STATIC, "wrist": WRIST, "prompt": PROMPT}
GOAL = _scene(32, 32, 2)
SHOWN = {"static": STATIC, "wrist": WRIST, "goal": GOAL}
IMAGES = {"static": STATIC, "wrist": WRIST}
UNSEEN = {"static": STATIC, "prompt": PROMPT}
OTHER = {"static": _scene(48, 64, 6), "wrist": _scene(40, 50, 6), "goal": _scene(32, 32, 6)}
# A picture in another form moves the chunk by less than this part of what another picture does.
NEAR = 0.2


@pytest.fixture(scope="module")
def server(tiny_mode_bundle: Bundle, tiny_goal_image_bundle: Bundle, camera_bundle: Bundle) -> Iterator[RunningServer]:
    """One server for all tests here: policies tiny-mode (default), tiny-goal-image and camera."""
    bundles = (tiny_mode_bundle.path, tiny_goal_image_bundle.path, camera_bundle.path)
    with launched(*bundles, "--engine", "onnx") as running:
        yield running


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def told(server: RunningServer) -> Iterator[Actions]:
    """Ask the policy that is told what to do, over one connection: told(observation, option=...)."""
    with PolicyClient(server.websocket_url) as client:
        yield lambda observation, **options: client.infer(observation, **{"seed": 7, **options}).actions


@pytest.fixture(scope="module")
def shown(server: RunningServer) -> Iterator[Actions]:
    """Ask the policy that is shown what it should look like when done."""
    with PolicyClient(f"{server.websocket_url}/v1/policies/tiny-goal-image/openpi") as client:
        yield lambda observation, **options: client.infer(observation, **{"seed": 7, **options}).actions


@pytest.fixture(scope="module")
def assert_still_serving(server: RunningServer, told: Actions) -> Iterator[StillServing]:
    """Call this after a refusal: robots that were connected all the while get the very chunks they always got."""
    wanted = told(TOLD)
    with Robot(server, "/v1/policies/camera/openpi") as other:

        def check() -> None:
            np.testing.assert_array_equal(told(TOLD), wanted)
            np.testing.assert_array_equal(other.ask(CAMERA)["actions"], [CAMERA["state"]] * 4)

        yield check


def _by_client(server: RunningServer, policy: str, observation: Mapping[str, Any]) -> np.ndarray:
    with PolicyClient(f"{server.websocket_url}/v1/policies/{policy}/openpi") as client:
        return client.infer(observation, seed=7).actions


def _by_json(server: RunningServer, policy: str, observation: Mapping[str, Any]) -> np.ndarray:
    body = {"observation": in_json(observation), "options": {"seed": 7}}
    response = httpx.post(f"{server.url}/v1/policies/{policy}/act", json=body, timeout=PATIENCE_S)
    assert response.status_code == 200, response.text
    return np.float32(response.json()["actions"])


def _by_msgpack(server: RunningServer, policy: str, observation: Mapping[str, Any]) -> np.ndarray:
    body, headers = pack({"observation": observation, "options": {"seed": 7}}), {"content-type": "application/msgpack"}
    response = httpx.post(f"{server.url}/v1/policies/{policy}/act", content=body, headers=headers, timeout=PATIENCE_S)
    assert response.status_code == 200, response.text
    return unpack(response.content)["actions"]


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


DOORS = {"websocket": _by_client, "JSON": _by_json, "msgpack": _by_msgpack}


@pytest.mark.parametrize("policy", ["tiny-mode", "tiny-goal-image"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_images_raw_and_as_png_and_as_jpeg(
    server: RunningServer, told: Actions, shown: Actions, door: str, policy: str
) -> None:
    ask, raw = (told, TOLD) if policy == "tiny-mode" else (shown, SHOWN)
    wanted, other = ask(raw), ask({name: OTHER.get(name, value) for name, value in raw.items()})
    pngs = {name: _png(value) if isinstance(value, np.ndarray) else value for name, value in raw.items()}
    jpegs = {name: _jpeg(value) if isinstance(value, np.ndarray) else value for name, value in raw.items()}
    assert (wanted.shape, wanted.dtype) == ((4, 3), np.float32)
    np.testing.assert_array_equal(DOORS[door](server, policy, raw), wanted)
    np.testing.assert_array_equal(DOORS[door](server, policy, pngs), wanted)
    assert 0 < _apart(DOORS[door](server, policy, jpegs), wanted) < NEAR * _apart(other, wanted)


# Sends what lies in the file of its second argument in every form that a robot of openpi's may choose.
STOCK_ROBOT = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy(sys.argv[1])
found = np.load(sys.argv[2])
prompt, images = str(found["prompt"]), {name: found[name] for name in ("static", "wrist")}
forms = {
    "nested": {"images": images, "prompt": prompt},
    "flat": {**{"observation/" + name: image for name, image in images.items()}, "prompt": prompt},
    "channels first": {"images": {k: np.transpose(v, (2, 0, 1)) for k, v in images.items()}, "prompt": prompt},
    "PNG": {"images": {name: found[name + "_png"].tobytes() for name in images}, "prompt": prompt},
    "a prompt in numpy's form": {"images": images, "prompt": found["prompt"]},
}
actions = {name: policy.infer({**form, "options": {"seed": 7}})["actions"].tolist() for name, form in forms.items()}
try:
    policy.infer({"static": images["static"], "prompt": prompt})
    complaint = ""
except RuntimeError as error:
    complaint = str(error)
print(json.dumps({"metadata": policy.get_server_metadata(), "actions": actions, "complaint": complaint}))
"""


def test_the_unmodified_openpi_client_is_served(server: RunningServer, told: Actions, tmp_path: Path) -> None:
    python = os.environ.get("OPENPI_PYTHON")
    if not python:
        pytest.skip("OPENPI_PYTHON names no environment with openpi-client; make test sets one up")
    encoded = {f"{name}_png": np.frombuffer(_png(image), np.uint8) for name, image in IMAGES.items()}
    np.savez(tmp_path / "told.npz", **TOLD, **encoded)
    command = [python, "-c", STOCK_ROBOT, server.websocket_url, str(tmp_path / "told.npz")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["metadata"]["inputs"] == ["static", "wrist", "prompt"]
    assert len(said["actions"]) == 5
    for form, actions in said["actions"].items():
        np.testing.assert_array_equal(np.float32(actions), told(TOLD), form)
    assert said["complaint"].startswith("Error in inference server:\nmissing_input: 'wrist' is missing; got 'prompt'")


@pytest.mark.parametrize(
    "observation",
    [
        {"images": IMAGES, "prompt": PROMPT},
        {"observation/images/static": STATIC, "observation/wrist": WRIST, "prompt": PROMPT},
        {"observation.images.static": STATIC, "observation.images.wrist": WRIST, "prompt": PROMPT},
        {"observation": {"images": IMAGES, "prompt": PROMPT}},
        {"images": {name: image.transpose(2, 0, 1) for name, image in IMAGES.items()}, "prompt": PROMPT},
        {"images": {"static": _png(STATIC)}, "wrist": WRIST.transpose(2, 0, 1), "prompt": np.array(PROMPT)},
    ],
    ids=["openpi", "slashes", "LeRobot", "nested", "channels first", "mixed"],
)
def test_an_observation_is_understood_as_the_field_spells_it(told: Actions, observation: Mapping[str, Any]) -> None:
    np.testing.assert_array_equal(told(observation), told(TOLD))


@pytest.mark.parametrize("name", ["static", "wrist"])
def test_each_camera_matters(told: Actions, name: str) -> None:
    assert _apart(told({**TOLD, name: OTHER[name]}), told(TOLD)) > 1e-4


def test_a_camera_of_twice_the_resolution_shows_the_same(told: Actions) -> None:
    larger, other = told({**TOLD, "wrist": _enlarged(WRIST)}), told({**TOLD, "wrist": OTHER["wrist"]})
    assert _apart(larger, told(TOLD)) < NEAR * _apart(other, told(TOLD))


def test_the_edge_of_a_cropped_camera_is_not_seen(told: Actions) -> None:
    # Nine tenths of 40 x 50 are 36 x 45.
    edge = np.ones(WRIST.shape[:2], bool)
    edge[2:38, 2:47] = False
    np.testing.assert_array_equal(told({**TOLD, "wrist": np.where(edge[..., None], 255 - WRIST, WRIST)}), told(TOLD))
    for seen in [(slice(2, 3), slice(None)), (slice(37, 38), slice(None)), (slice(None), 2), (slice(None), 46)]:
        wrist = WRIST.copy()
        wrist[seen] = 255 - wrist[seen]
        assert _apart(told({**TOLD, "wrist": wrist}), told(TOLD)) > 0


def test_an_instruction_decides_where_to_go(told: Actions) -> None:
    opening, closing = told(TOLD), told({**TOLD, "prompt": "close the drawer"})
    assert _apart(opening, closing) > 1e-3
    np.testing.assert_array_equal(told(TOLD), opening)  # also when it was asked for other things in between
    np.testing.assert_array_equal(told({**TOLD, "prompt": " Open  the DRAWER\n"}), opening)  # CLIP reads no case
    for prompt in ("öffne die Schublade", "🤖", "<|endoftext|>", "open\0the drawer", "x" * 20):
        assert np.isfinite(told({**TOLD, "prompt": prompt})).all()


def test_a_goal_image_decides_where_to_go_in_any_form(shown: Actions) -> None:
    wanted = shown(SHOWN)
    far = _apart(shown({**SHOWN, "goal": OTHER["goal"]}), wanted)
    assert far > 1e-3
    np.testing.assert_array_equal(shown({**SHOWN, "goal": _png(GOAL)}), wanted)
    np.testing.assert_array_equal(shown({**SHOWN, "goal": GOAL.transpose(2, 0, 1)}), wanted)
    np.testing.assert_array_equal(shown({**IMAGES, "observation/goal": GOAL, "prompt": "ignored"}), wanted)
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    resized = cv2.resize(noise, (32, 32), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(shown({**SHOWN, "goal": noise}), shown({**SHOWN, "goal": resized}))
    for goal in (_enlarged(GOAL), _jpeg(_enlarged(GOAL)), _jpeg(GOAL)):
        assert _apart(shown({**SHOWN, "goal": goal}), wanted) < NEAR * far


def test_the_same_seed_gives_the_same_chunk_and_another_seed_another(told: Actions) -> None:
    np.testing.assert_array_equal(told(TOLD, seed=1), told(TOLD, seed=1))
    assert _apart(told(TOLD, seed=1), told(TOLD, seed=2)) > 1e-3
    assert _apart(told(TOLD, seed=None), told(TOLD, seed=None)) > 1e-3


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 1},
        {"steps": 10},
        {"sampler": "heun"},
        {"sampler": "euler_ancestral"},
        {"guidance": 2},
        {"guidance": 0},
    ],
    ids=str,
)
def test_each_option_changes_the_chunk_for_either_kind_of_goal(
    told: Actions, shown: Actions, option: Mapping[str, Any]
) -> None:
    assert _apart(told(TOLD, **option), told(TOLD)) > 1e-3
    assert _apart(shown(SHOWN, **option), shown(SHOWN)) > 1e-3


def test_robots_with_other_instructions_at_the_same_time_get_their_own_chunks(server: RunningServer) -> None:
    def episode(prompt: str) -> list[np.ndarray]:
        with PolicyClient(server.websocket_url) as client:
            return [client.infer({**TOLD, "prompt": prompt}, seed=seed).actions for seed in range(5)]

    prompts = [f"drawer {i}" for i in range(6)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(threads.map(episode, prompts))
    np.testing.assert_array_equal(together, [episode(prompt) for prompt in prompts])


def test_a_refused_robot_may_ask_again_at_once(server: RunningServer, told: Actions) -> None:
    with PolicyClient(server.websocket_url) as client:
        for bad in ({**TOLD, "prompt": " "}, {**TOLD, "static": b""}, IMAGES):
            with pytest.raises(ServerError):
                client.infer(bad)
            np.testing.assert_array_equal(client.infer(TOLD, seed=7).actions, told(TOLD))


def _png_that_claims(width: int, height: int) -> bytes:
    """Return a small PNG whose header promises many pixels."""
    png = _png(STATIC)
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _told(name: str, change: Mapping[str, Any], code: str, *words: str, json_alone: bool = False) -> Bad:
    return Bad(name, {**TOLD, **change}, code, words, "tiny-mode", json_alone)


def _pictures(observation: Mapping[str, Any], picture: str, policy: str) -> list[Bad]:
    """Return what is wrong with one picture, whatever it is for."""
    jpeg = _jpeg(STATIC)
    return [
        Bad(f"{picture}: {name}", {**observation, picture: value}, code, (f"'{picture}'", *words), policy)
        for name, value, code, words in [
            ("floats", STATIC / np.float32(255), "wrong_type", ("float32", "uint8")),
            ("text", "static.png", "wrong_type", ("str", "uint8 array, or JPEG or PNG bytes")),
            ("nested lists", STATIC[:2, :2].tolist(), "wrong_type", ("list", "uint8 array")),
            ("a batch axis", STATIC[None], "shape_mismatch", ("(1, 48, 64, 3)", "(height, width, 3)")),
            ("grey", STATIC[..., 0], "shape_mismatch", ("(48, 64)", "(height, width, 3)")),
            ("a JPEG cut in half", jpeg[: len(jpeg) // 2], "undecodable_image", ("cut off",)),
            ("no image", b"GIF89a and so on", "undecodable_image", ("b'GIF8'", "JPEG or PNG")),
            ("no bytes", b"", "undecodable_image", ("b''", "JPEG or PNG")),
            ("a bomb", _png_that_claims(60_000, 60_000), "undecodable_image", ("pixels",)),
        ]
    ]


BAD_OBSERVATIONS = [
    Bad("no wrist", UNSEEN, "missing_input", ("'wrist' is missing; got 'prompt', 'static'",), "tiny-mode"),
    _told("a null camera", {"wrist": None}, "wrong_type", "'wrist' is NoneType", "uint8 array"),
    _told("a third camera", {"top": STATIC}, "unexpected_input", "'top'", "it takes 'static', 'wrist', 'prompt'"),
    _told("a goal image to a listener", {"goal": GOAL}, "unexpected_input", "'goal'", "'static', 'wrist', 'prompt'"),
    _told("another size", {"static": STATIC[1:]}, "shape_mismatch", "'static'", "(47, 64, 3)", "(48, 64, 3)"),
    _told("a JPEG of another size", {"static": _jpeg(STATIC[:, 1:])}, "shape_mismatch", "(48, 63, 3)", "(48, 64, 3)"),
    *_pictures(TOLD, "static", "tiny-mode"),
    *_pictures(TOLD, "wrist", "tiny-mode"),
    Bad("no prompt", IMAGES, "missing_input", ("'prompt' is missing; got 'static', 'wrist'",), "tiny-mode"),
    _told("a null prompt", {"prompt": None}, "missing_input", "'prompt' is missing; got 'static', 'wrist'"),
    _told("an empty prompt", {"prompt": ""}, "wrong_type", "'prompt' is '', expected an instruction"),
    _told("a blank prompt", {"prompt": " \t\n"}, "wrong_type", r"'prompt' is ' \t\n', expected an instruction"),
    _told("a number as prompt", {"prompt": 3}, "wrong_type", "'prompt' is int, expected an instruction"),
    _told("bytes as prompt", {"prompt": b"open"}, "wrong_type", "'prompt' is bytes, expected an instruction"),
    _told("a list of prompts", {"prompt": [PROMPT]}, "wrong_type", "'prompt' is list, expected an instruction"),
    _told("tokens as prompt", {"prompt": np.zeros(24, int)}, "wrong_type", "'prompt' is ndarray", "an instruction"),
    _told("half a letter", {"prompt": "open \ud83e"}, "wrong_type", "'prompt'", "half a letter", json_alone=True),
    _told("a page", {"prompt": "open " * 2000}, "unusable_goal", "'prompt' has 10000 characters", "at most 1000"),
    _told("a page of blanks", {"prompt": " " * 10_000}, "unusable_goal", "10000 characters", "at most 1000"),
    _told("too many tokens", {"prompt": "q " * 30}, "unusable_goal", "the instruction has 32 tokens", "reads 24"),
    _told("far too many tokens", {"prompt": "🤖" * 999}, "unusable_goal", "tokens", "reads 24"),
    Bad("a task", {**IMAGES, "task": PROMPT}, "unexpected_input", ("'task'", "it takes", "'prompt'"), "tiny-mode"),
    Bad("no goal", IMAGES, "missing_input", ("'goal' is missing; got 'static', 'wrist'",), "tiny-goal-image"),
    Bad("words for an image", TOLD, "missing_input", ("'goal' is missing; got 'static', 'wrist'",), "tiny-goal-image"),
    Bad("a null goal", {**SHOWN, "goal": None}, "missing_input", ("'goal' is missing",), "tiny-goal-image"),
    Bad("a state as goal", {**SHOWN, "goal": [0.1, 0.2]}, "wrong_type", ("'goal' is list",), "tiny-goal-image"),
    *_pictures(SHOWN, "goal", "tiny-goal-image"),
]


@pytest.mark.parametrize(
    ("bad", "door"),
    [(bad, door) for bad in BAD_OBSERVATIONS for door in DOORS_THAT_REFUSE if door == "JSON" or not bad.json_alone],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name_at_every_door_and_disturbs_nobody(
    http: httpx.Client, server: RunningServer, assert_still_serving: StillServing, bad: Bad, door: str
) -> None:
    ask, status = DOORS_THAT_REFUSE[door]
    bad.check(ask(http, server, bad.policy, {"observation": bad.request}), status)
    assert_still_serving()


def test_a_spec_tells_what_the_cameras_are_and_what_may_be_said(http: httpx.Client) -> None:
    policy = http.get("/v1/policies/tiny-mode").json()
    assert policy["spec"]["cameras"] == [
        {"name": "static", "height": 48, "width": 64, "resize": "refuse", "crop": 1.0},
        {"name": "wrist", "height": 32, "width": 32, "resize": "area", "crop": 0.9},
    ]
    assert policy["spec"]["goal"]["examples"] == ["open the drawer", "close the drawer"]
    assert policy["inputs"] == {
        "static": "uint8 (48, 64, 3) RGB, raw or JPEG or PNG",
        "wrist": "uint8 RGB of any size, raw or JPEG or PNG; its centre, 90% of each side, is resized to (32, 32, 3)",
        "prompt": "an instruction of at most 1000 characters, such as 'open the drawer'",
    }
    goal = http.get("/v1/policies/tiny-goal-image").json()["inputs"]["goal"]
    assert goal == (
        "what it should look like when done: uint8 RGB of any size, raw or JPEG or PNG; it is resized to (32, 32, 3)"
    )


@pytest.mark.parametrize("name", ["tiny-mode", "tiny-goal-image"])
def test_the_example_of_a_spec_works_as_given(http: httpx.Client, name: str) -> None:
    example = http.get(f"/v1/policies/{name}").json()["example"]
    response = http.post(f"/v1/policies/{name}/act", json=example)
    assert response.status_code == 200, response.text
    assert np.shape(response.json()["actions"]) == (4, 3)
    assert ("prompt" in example["observation"]) == (name == "tiny-mode")


def test_the_example_of_the_documentation_works_as_printed(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall("```python\n(.*?)```", (REPOSITORY / "docs" / "protocols.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if '"prompt"' in block]
    ours = re.sub(r"//localhost:8000/v1/policies/[\w-]+", f"//127.0.0.1:{server.port}/v1/policies/tiny-mode", example)
    assert ours.count("tiny-mode") == 2
    exec(ours, {})
    assert "(4, 3)" in capsys.readouterr().out
