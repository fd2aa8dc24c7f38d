"""Policies on a real Triton server: the same chunks as in this process, and what happens when things go wrong."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from policy_models.spec import SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.engine.base import ENGINES
from policy_server.golden import draw_observation
from policy_server.runtime.guard import Guard
from policy_server.runtime.sampling import drive
from tests.conftest import ZOO, Launch, RunningServer
from tests.service.robot import PATIENCE_S, STATE, TINY, Robot, in_json, refusal_of
from tests.service.triton import POLICIES, RunningTriton, export, running_triton, spoiled, successor, tensor


def _path(name: str) -> str:
    return f"/v1/policies/{name}/openpi"


def _wire(observation) -> dict[str, object]:
    inputs = dict(observation.images)
    if observation.state is not None:
        inputs["state"] = observation.state
    if observation.goal is not None:
        inputs["prompt" if isinstance(observation.goal, str) else "goal"] = observation.goal
    return inputs


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("options", [{}, {"steps": 5, "sampler": "heun", "guidance": 1.5}])
def test_a_policy_gives_the_chunks_that_it_gives_in_this_process(gateway: RunningServer, name: str, options) -> None:
    bundle = load_bundle(ZOO / name)
    engine, program = ENGINES["onnx"].make(bundle, 1), bundle.new_program()
    guard, memory, draw = Guard(name, bundle.spec), program.begin(), np.random.default_rng(5)
    with Robot(gateway, _path(name)) as robot:
        for seed in range(6):  # longer than any window
            observation = draw_observation(bundle.spec, draw)
            outcome = drive(program.infer(observation, memory, SamplingOptions(seed, **options)), engine)
            memory = outcome.memory
            reply = robot.ask(_wire(observation), options={"seed": seed, **options})
            wanted = guard.check(outcome.actions).actions
            np.testing.assert_allclose(reply["actions"], wanted, atol=1e-5)
            assert reply["engine"] == "triton"


def test_graphs_that_are_models_of_their_own_give_the_same_chunks(
    triton: RunningTriton, gateway: RunningServer, server: RunningServer
) -> None:
    assert triton.ready_versions("tiny-step@denoise") == ["1"]
    with Robot(gateway, _path("tiny-step")) as apart, Robot(server, _path("tiny-step")) as here:
        for seed in range(5):
            observation = {"state": STATE * seed, "goal": TINY["goal"]}
            np.testing.assert_allclose(apart.actions(observation, seed), here.actions(observation, seed), atol=1e-5)


@pytest.mark.parametrize("continuity", ["rtc", {"mode": "warm", "steps": 2}, "ensemble"])
def test_chunks_go_on_from_one_another_as_they_do_in_this_process(
    gateway: RunningServer, server: RunningServer, continuity
) -> None:
    with Robot(gateway, _path("tiny")) as there, Robot(server, _path("tiny")) as here:
        chunks = []
        for seed in range(4):
            observation = {"state": STATE * (1 + seed), "goal": TINY["goal"]}
            options = {"seed": seed, "continuity": continuity, "captured_ms": 50.0 * seed, "delay_ms": 60.0}
            chunks.append(here.ask(observation, options=options)["actions"])
            np.testing.assert_allclose(there.ask(observation, options=options)["actions"], chunks[-1], atol=1e-4)
        alone = here.actions({"state": STATE * 4, "goal": TINY["goal"]}, seed=3)
    assert np.abs(chunks[3] - alone).max() > 1e-2, "the chunk before made no difference"


def test_thirty_two_robots_at_once_each_have_their_own_episode(gateway: RunningServer, server: RunningServer) -> None:
    episodes = np.random.default_rng(0).standard_normal((32, 6, 4), dtype=np.float32)
    with contextlib.ExitStack() as stack:
        robots = [stack.enter_context(Robot(gateway, _path("tiny-step"))) for _ in episodes]
        together = []
        for turn in range(6):
            for number, robot in enumerate(robots):
                robot.send({"state": episodes[number, turn]}, options={"seed": number})
            together.append([robot.receive()["actions"] for robot in robots])
    for number in range(32):
        with Robot(server, _path("tiny-step")) as alone:
            for turn in range(6):
                wanted = alone.actions({"state": episodes[number, turn]}, seed=number)
                np.testing.assert_allclose(together[turn][number], wanted, atol=1e-5)


def test_what_is_wrong_with_a_request_is_said_as_in_this_process(gateway: RunningServer) -> None:
    request = {"observation": in_json(TINY), "options": {"sampler": "dpmpp_2m_sde", "steps": 0}}
    assert refusal_of(httpx.post(f"{gateway.url}/v1/policies/tiny/act", json=request)).code == "invalid_option"
    words = {name: np.zeros((96, 96, 3), np.uint8) for name in ("static", "wrist")}
    with Robot(gateway, _path("meta-world")) as robot:
        robot.send({**words, "prompt": "open the drawer " * 40})
        assert robot.refusal().code == "unusable_goal"
    budget = {"observation": in_json(TINY), "options": {"steps": 200, "sampler": "heun", "budget_ms": 2}}
    refusal = refusal_of(httpx.post(f"{gateway.url}/v1/policies/tiny/act", json=budget))
    assert (refusal.status, refusal.code) == (504, "deadline_exceeded")


def test_steps_that_nobody_waits_for_are_not_computed(triton: RunningTriton, gateway: RunningServer) -> None:
    def steps() -> int:
        statistics = triton.client.get_inference_statistics("tiny-step@denoise", as_json=True)["model_stats"][0]
        return int(statistics["execution_count"])

    options = {"sampler": "heun", "guidance": 1.5, "budget_ms": 20}
    request = {"observation": in_json(TINY), "options": {**options, "steps": 200}}
    before = steps()
    refusal = refusal_of(httpx.post(f"{gateway.url}/v1/policies/tiny-step/act", json=request))
    assert refusal.code == "deadline_exceeded"
    with Robot(gateway, _path("tiny-step")) as robot:  # answered after what was under way
        robot.ask({"state": STATE}, options={"steps": 3})
    assert 3 <= steps() - before < 399


def test_the_gateway_loads_neither_torch_nor_an_engine(triton: RunningTriton, tiny_bundle: Bundle) -> None:
    statement = f"""
import sys
from pathlib import Path
import policy_server.gateway.server
from policy_server.catalog import load_catalog
from policy_server.gateway.app import create_app
from policy_server.gateway.traffic import Traffic
from policy_server.settings import Settings
settings = Settings((Path({str(tiny_bundle.path)!r}),), engine="triton", triton_urls=({triton.url!r},))
create_app(load_catalog(settings), settings, Traffic())
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "tritonclient" in loaded
    assert not loaded & {"torch", "onnxruntime", "openvino", "onnx", "onnx_ir"}


@pytest.fixture
def repository(tmp_path: Path, tiny_step_bundle: Bundle) -> Path:
    """A repository with one policy that remembers."""
    export(tiny_step_bundle, tmp_path / "repository")
    return tmp_path / "repository"


def test_a_triton_server_that_is_killed_costs_typed_errors_and_no_session(
    repository: Path, tiny_step_bundle: Bundle, server: RunningServer, launch: Launch
) -> None:
    with running_triton(repository) as triton:
        gateway = launch(tiny_step_bundle.path, "--engine", "triton", "--triton-url", triton.url)
        episodes = {name: np.random.default_rng(n).standard_normal((6, 4), np.float32) for n, name in enumerate("abc")}

        def ask(at: RunningServer, name: str, turn: int) -> httpx.Response:
            request = {"observation": {"state": episodes[name][turn].tolist()}, "session": name, "options": {"seed": 1}}
            return httpx.post(f"{at.url}/v1/policies/tiny-step/act", json=request, timeout=PATIENCE_S)

        for turn in range(3):
            for name in episodes:
                assert ask(gateway, name, turn).status_code == 200

        codes: list[str] = []
        stop = threading.Event()

        def load() -> None:
            with httpx.Client(timeout=PATIENCE_S) as client:
                while not stop.is_set():
                    request = {"observation": in_json(TINY), "options": {"steps": 50, "budget_ms": 2000}}
                    response = client.post(f"{gateway.url}/v1/policies/tiny-step/act", json=request)
                    codes.append("ok" if response.status_code == 200 else refusal_of(response).code)

        robots = [threading.Thread(target=load) for _ in range(4)]
        for robot in robots:
            robot.start()
        _until(lambda: "ok" in codes)
        triton.kill()
        _until(lambda: codes.count("engine_unreachable") > 8)
        assert httpx.get(f"{gateway.url}/healthz").status_code == 200
        assert "tiny-step" in httpx.get(f"{gateway.url}/readyz").text
        triton.start()
        _until(lambda: httpx.get(f"{gateway.url}/readyz").status_code == 200)
        seen = len(codes)
        _until(lambda: "ok" in codes[seen:])
        stop.set()
        for robot in robots:
            robot.join()
        assert set(codes) <= {"ok", "engine_unreachable", "deadline_exceeded"}

        # Episodes go on where they were: what they remember is not Triton's.
        for name in episodes:
            got = [ask(gateway, name, turn).json()["actions"] for turn in range(3, 6)]
            wanted = [ask(server, name, turn).json()["actions"] for turn in range(6)][3:]
            np.testing.assert_allclose(got, wanted, atol=1e-5)
            httpx.delete(f"{server.url}/v1/policies/tiny-step/sessions/{name}")


def test_a_policy_whose_process_dies_is_loaded_anew_and_no_other_notices(
    repository: Path, tiny_bundle: Bundle, tiny_step_bundle: Bundle, launch: Launch
) -> None:
    export(tiny_bundle, repository)
    with running_triton(repository) as triton:
        gateway = launch(tiny_bundle.path, tiny_step_bundle.path, "--engine", "triton", "--triton-url", triton.url)
        triton.kill_model("tiny-step")
        codes = []

        def ask() -> bool:
            request = {"observation": in_json(TINY), "options": {"budget_ms": 5000}}
            response = httpx.post(f"{gateway.url}/v1/policies/tiny-step/act", json=request, timeout=PATIENCE_S)
            codes.append("ok" if response.status_code == 200 else refusal_of(response).code)
            with Robot(gateway) as robot:
                assert robot.ask(TINY)["policy"] == "tiny"
            return codes[-1] == "ok"

        _until(ask)
        assert codes[0] == "engine_unreachable"
        assert set(codes) == {"engine_unreachable", "ok"}


def test_with_two_servers_one_may_die_and_no_robot_notices(
    repository: Path, tiny_step_bundle: Bundle, launch: Launch
) -> None:
    with running_triton(repository) as one, running_triton(repository) as two:
        two.kill()
        urls = ("--triton-url", f"{one.url},{two.url}", "--triton-wait-s", "0.5")
        gateway = launch(tiny_step_bundle.path, "--engine", "triton", *urls)  # one of two will do
        two.start()
        _until(lambda: f"{two.url} is back" in gateway.log())
        with Robot(gateway, _path("tiny-step")) as robot:
            for turn in range(60):
                if turn == 20:
                    one.kill()
                if turn == 40:
                    one.start()
                    _until(lambda: f"{one.url} is back" in gateway.log())
                    two.kill()
                assert robot.ask({"state": STATE})["actions"].shape == (1, 2)


def test_a_swap_under_load_fails_no_request(
    repository: Path, tiny_step_bundle: Bundle, tmp_path: Path, launch: Launch
) -> None:
    new = successor(tiny_step_bundle, tmp_path / "tiny-step")
    with running_triton(repository) as triton:
        gateway = launch(tiny_step_bundle.path, "--engine", "triton", "--triton-url", triton.url)
        export(new, repository)
        _swap_under_load(gateway, new, "tiny-step")
        _until(lambda: triton.ready_versions("tiny-step") == ["2"])
        triton.kill()
        triton.start()  # it has loaded nothing, and the gateway sees to that although no robot asks
        _until(lambda: triton.ready_versions("tiny-step") == ["2"])


def test_the_embedded_engine_is_swapped_by_the_same_verb(
    tiny_step_bundle: Bundle, tmp_path: Path, launch: Launch
) -> None:
    new = successor(tiny_step_bundle, tmp_path / "tiny-step")
    gateway = launch(tiny_step_bundle.path, "--engine", "onnx")
    _swap_under_load(gateway, new, "tiny-step")
    _until(lambda: "tiny-step 1 was let go by its last session" in gateway.log())


def test_a_model_that_fails_its_golden_case_is_not_served(
    repository: Path, tiny_step_bundle: Bundle, tmp_path: Path, launch: Launch
) -> None:
    new = successor(tiny_step_bundle, tmp_path / "good" / "tiny-step")
    bad = spoiled(new, tmp_path / "bad" / "tiny-step")
    with running_triton(repository) as triton:
        gateway = launch(tiny_step_bundle.path, "--engine", "triton", "--triton-url", triton.url)
        export(bad, repository)
        response = httpx.put(f"{gateway.url}/v1/policies/tiny-step", json={"bundle": str(bad.path)}, timeout=PATIENCE_S)
        assert response.status_code == 422
        assert "misses the golden case" in response.json()["error"]["message"]
        assert triton.ready_versions("tiny-step") == ["1"]
        with Robot(gateway, _path("tiny-step")) as robot:
            assert robot.ask({"state": STATE})["version"] == "1"
        with pytest.raises(RuntimeError, match="misses the golden case"):
            launch(bad.path, "--engine", "triton", "--triton-url", triton.url)


def test_nor_is_one_whose_graphs_are_models_of_their_own(
    tiny_step_bundle: Bundle, tmp_path: Path, launch: Launch
) -> None:
    bad = spoiled(tiny_step_bundle, tmp_path / "tiny-step")
    export(bad, tmp_path / "repository", apart=True)
    with running_triton(tmp_path / "repository") as triton:
        with pytest.raises(RuntimeError, match="misses the golden case"):
            launch(bad.path, "--engine", "triton", "--triton-url", triton.url)
        for _ in range(2):  # whoever asks Triton itself is told so, too
            with pytest.raises(InferenceServerException, match="misses the golden case"):
                triton.client.infer("tiny-step", [tensor("state", STATE[None])])


def test_a_bundle_that_triton_does_not_have_is_not_served(
    repository: Path, tiny_bundle: Bundle, tiny_step_bundle: Bundle, tmp_path: Path, launch: Launch
) -> None:
    other = successor(tiny_step_bundle, tmp_path / "tiny-step")
    text = (other.path / "policy.yaml").read_text().replace("version: '2'", "version: '1'")
    (other.path / "policy.yaml").write_text(text)
    with running_triton(repository) as triton:
        with pytest.raises(RuntimeError, match="another bundle as version 1 of 'tiny-step'"):
            launch(other.path, "--engine", "triton", "--triton-url", triton.url)
        with pytest.raises(RuntimeError, match="policy-server export triton"):
            launch(tiny_bundle.path, "--engine", "triton", "--triton-url", triton.url)
    with pytest.raises(RuntimeError, match="no Triton server answers"):
        launch(tiny_bundle.path, "--engine", "triton", "--triton-url", triton.url, "--triton-wait-s", "0")


def _swap_under_load(gateway: RunningServer, new: Bundle, name: str) -> None:
    """Swap a policy that remembers, while eight robots ask in episodes; check which version answers whom."""
    answered: list[list[str]] = [[] for _ in range(8)]
    failures: list[Exception] = []
    stop = threading.Event()

    def drive_robot(number: int) -> None:
        try:
            with Robot(gateway, _path(name)) as robot:
                while not stop.is_set():
                    versions = {robot.ask({"state": STATE}, session_id=len(answered[number]))["version"]}
                    for _ in range(20):
                        versions.add(robot.ask({"state": STATE}, session_id=len(answered[number]))["version"])
                    assert len(versions) == 1, "an episode was answered by two versions"
                    answered[number] += versions
        except Exception as error:
            failures.append(error)

    robots = [threading.Thread(target=drive_robot, args=(number,)) for number in range(8)]
    for robot in robots:
        robot.start()
    _until(lambda: all(answered) or bool(failures))
    swapped = subprocess.run(
        [sys.executable, "-m", "policy_server", "swap", str(new.path), "--url", gateway.url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert swapped.returncode == 0, swapped.stderr
    assert f"{name} 2 answers" in swapped.stdout
    _until(lambda: all(versions[-1] == "2" for versions in answered) or bool(failures))
    stop.set()
    for robot in robots:
        robot.join()
    assert not failures
    for versions in answered:
        assert versions == sorted(versions), "a robot went back to the old version"


def _until(fact) -> None:
    for _ in range(int(PATIENCE_S / 0.05)):
        if fact():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not happen")
