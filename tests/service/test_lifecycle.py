"""A server's life: it does not start with what it cannot vouch for, and it does not stop in mid-sentence."""

import pickle
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from websockets.exceptions import ConnectionClosed

from policy_server.bundle import MANIFEST, Bundle, digest
from tests.conftest import Launch
from tests.service.robot import PATIENCE_S, SLOWLY, TINY, Robot, in_json, refusal_of, refused_start


class Tampered:
    """A copy of a bundle, for breaking."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def edit(self, **entries: object) -> None:
        """Change entries of the manifest."""
        manifest = yaml.safe_load((self.path / MANIFEST).read_text())
        (self.path / MANIFEST).write_text(yaml.safe_dump({**manifest, **entries}))

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, and its digest, as somebody would who publishes the bundle anew."""
        (self.path / name).write_bytes(data)
        manifest = yaml.safe_load((self.path / MANIFEST).read_text())
        self.edit(files={**manifest["files"], name: digest(self.path / name)})


class _Opened:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._path,)


def _flip_a_weight(bundle: Tampered) -> None:
    weights = bytearray((bundle.path / "graphs/weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle.path / "graphs/weights.safetensors").write_bytes(weights)


def _pickle_the_weights(bundle: Tampered) -> None:
    bundle.write("graphs/weights.safetensors", pickle.dumps(_Opened(bundle.path / "opened")))


def _pickle_the_golden_case(bundle: Tampered) -> None:
    bundle.write("golden.npz", pickle.dumps(_Opened(bundle.path / "opened")))


def _miss_the_golden_case(bundle: Tampered) -> None:
    with np.load(bundle.path / "golden.npz") as case:
        arrays = dict(case)
    arrays["actions"] = arrays["actions"] + np.float32(0.1)
    np.savez(bundle.path / "golden.npz", **arrays)
    bundle.write("golden.npz", (bundle.path / "golden.npz").read_bytes())


def _shorten_the_golden_case(bundle: Tampered) -> None:
    bundle.write("golden.npz", (bundle.path / "golden.npz").read_bytes()[:-30])


def _garble_the_graph(bundle: Tampered) -> None:
    bundle.write("graphs/denoise.onnx", b"no graph at all")


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (_flip_a_weight, ("weights.safetensors has SHA-256", "was published with")),
        (_pickle_the_weights, ("weights.safetensors is not a safetensors file", "pickled weights are refused")),
        (_pickle_the_golden_case, ("golden.npz is not a golden case",)),
        (_shorten_the_golden_case, ("golden.npz is not a golden case",)),
        (_miss_the_golden_case, ("engine 'onnx' misses the golden case of policy 'tiny' by 5.00e-02", "1.00e-04")),
        (_garble_the_graph, ("engine 'onnx' cannot load 'tiny'", "denoise.onnx")),
        (lambda b: (b.path / "graphs" / "x.onnx").touch(), ("graphs/x.onnx is not listed under 'files'",)),
        (lambda b: (b.path / "golden.npz").unlink(), ("golden.npz cannot be read: No such file",)),
        (lambda b: b.edit(licens="MIT"), ("policy.yaml: licens: ", "got 'MIT'")),
        (lambda b: (b.path / MANIFEST).write_text("!!python/object/apply:os.getcwd []"), ("is not YAML",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_bundle_that_is_not_what_it_says_is_refused_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path, tamper: Callable[[Tampered], object], words: tuple[str, ...]
) -> None:
    bundle = Tampered(shutil.copytree(tiny_bundle.path, tmp_path / "tampered"))
    tamper(bundle)
    reason = refused_start(bundle.path, "--engine", "onnx")
    for word in words:
        assert word in reason
    assert not (bundle.path / "opened").exists(), "something was unpickled"


def test_when_no_engine_reproduces_the_golden_case_the_refusal_tells_each_of_them(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = Tampered(shutil.copytree(tiny_bundle.path, tmp_path / "tampered"))
    _miss_the_golden_case(bundle)
    reason = refused_start(bundle.path)
    assert reason.startswith("no engine can run 'tiny' on this machine: ")
    for engine in ("onnx", "openvino", "openvino-bf16"):
        assert f"engine '{engine}' misses the golden case of policy 'tiny' by 5" in reason


def test_two_bundles_of_one_name_are_refused_with_both_their_places(tiny_bundle: Bundle, tmp_path: Path) -> None:
    twin = shutil.copytree(tiny_bundle.path, tmp_path / "twin")
    reason = refused_start(tiny_bundle.path, twin, "--engine", "onnx")
    assert "two bundles are called 'tiny'" in reason
    assert str(tiny_bundle.path) in reason
    assert str(twin) in reason


def test_a_port_that_is_taken_is_refused_in_one_line(tiny_bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        reason = refused_start(tiny_bundle.path, "--engine", "onnx", "--port", port)
    assert reason == f"cannot listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_idle_server_stops_at_once_and_says_goodbye(
    launch: Launch, tiny_bundle: Bundle, stop: signal.Signals
) -> None:
    server = launch(tiny_bundle.path, "--engine", "onnx", "--drain-s", "3600")
    with Robot(server) as robot:
        robot.ask(TINY)
        server.process.send_signal(stop)
        with pytest.raises(ConnectionClosed) as closed:
            robot.receive()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012  # "service restart": come back in a moment
    assert server.process.wait(15) == 0
    assert "Traceback" not in server.log()


def test_a_stopping_server_finishes_what_it_took_and_takes_nothing_new(launch: Launch, slow_bundle: Bundle) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx")
    robots = [Robot(server) for _ in range(3)]
    latecomer = Robot(server)
    for robot in robots:
        robot.begin(TINY, options={**SLOWLY, "seed": 7})
    server.process.send_signal(signal.SIGTERM)
    while (response := httpx.get(f"{server.url}/readyz")).status_code == 200:
        pass
    assert (response.status_code, response.text) == (503, "draining\n")
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    act = httpx.post(f"{server.url}/v1/policies/slow/act", json={"observation": in_json(TINY)})
    assert (refusal_of(act).status, refusal_of(act).code) == (503, "draining")
    latecomer.send(TINY)
    assert latecomer.refusal().code == "draining"

    chunks = [robot.receive()["actions"] for robot in robots]
    for chunk in chunks:  # rounding may differ with the number of robots that share a run
        np.testing.assert_allclose(chunk, chunks[0], atol=1e-5)
    assert server.process.wait(15) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/healthz")
    for robot in (*robots, latecomer):
        robot.socket.close()
    assert "Traceback" not in server.log()


def test_a_second_signal_does_not_wait_for_what_still_runs(launch: Launch, slow_bundle: Bundle) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx")
    with Robot(server) as robot:
        robot.begin(TINY, options=SLOWLY)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            robot.receive()
    server.process.wait(PATIENCE_S)


def test_a_drain_lasts_no_longer_than_allowed(launch: Launch, slow_bundle: Bundle) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx", "--drain-s", "0")
    with Robot(server) as robot:
        robot.begin(TINY, options=SLOWLY)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            robot.receive()
    assert server.process.wait(PATIENCE_S) == 0
