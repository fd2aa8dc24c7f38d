"""What many tests need: a small bundle, and a server that runs for real."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import httpx
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer

from policy_models.beso.config import BesoConfig
from policy_models.beso.network import make_denoiser
from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig
from policy_models.divla.network import DivlaNetworks
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.mode.assembly import ModeNetworks
from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig, VisionConfig
from policy_models.mode.tokenizer import learn_merges, make_tokenizer
from policy_models.normalizer import Normalizer, Statistics
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, ReasoningSpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, Bundle, Manifest, load_bundle
from policy_server.export.bundle import DEFAULT_TOLERANCE, write_bundle

REPOSITORY = Path(__file__).parent.parent
ZOO = REPOSITORY / "models" / "zoo"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A BESO bundle with random weights: chunks of 4, a window of 1."""
    return _made_once(tmp_path_factory, "tiny", lambda path: _write_tiny(path, window=1, horizon=4))


@pytest.fixture(scope="session")
def tiny_step_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A BESO bundle with random weights in upstream's configuration: one action, a window of 3."""
    return _made_once(tmp_path_factory, "tiny-step", lambda path: _write_tiny(path, window=3, horizon=1))


@pytest.fixture(scope="session")
def camera_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that holds its state and takes two cameras: one exact size, one resized."""
    joints = VectorSpec(("shoulder", "elbow"), ("rad", "rad"))
    spec = PolicySpec(
        action=joints,
        state=joints,
        horizon=4,
        step_s=0.05,
        cameras=(CameraSpec("top", 48, 64), CameraSpec("wrist", 32, 32, "area")),
    )
    manifest = Manifest(FORMAT, "camera", "hold", "1", "Holds still.", "Apache-2.0", spec, tolerance={"f32": 0.0})
    return write_bundle(tmp_path_factory.mktemp("bundles") / "camera", manifest)


@pytest.fixture(scope="session")
def tiny_mode_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A MoDE bundle with random weights: two cameras and an instruction in, chunks of 4 out."""
    return _made_once(tmp_path_factory, "tiny-mode", lambda path: _write_tiny_mode(path, "text"))


@pytest.fixture(scope="session")
def tiny_goal_image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, but its goals are images."""
    return _made_once(tmp_path_factory, "tiny-goal-image", lambda path: _write_tiny_mode(path, "image"))


@pytest.fixture(scope="session")
def tiny_divla_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A DiVLA bundle with random weights: it reasons in 8 tokens, and acts on what it said."""
    return _made_once(tmp_path_factory, "tiny-divla", _write_tiny_divla)


def _made_once(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], Bundle]) -> Bundle:
    """Return a bundle that is made by whoever wants it first: to export one takes longer than most tests."""
    root = factory.getbasetemp()
    path = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "bundles" / name
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        return load_bundle(path) if path.exists() else write(path)


def _write_tiny_divla(path: Path) -> Bundle:
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(("put it there", "Take it.Next action:"), 300)
    config = DivlaConfig(
        ScaleDpConfig(1, 32, 2),
        state_width=2,
        action_width=2,
        horizon=4,
        eyes=EyesConfig(layers=1, width=32, heads=2),
        language=LanguageConfig(300, 32, 1, 2, 1, 64, rope_sections=(2, 3, 3), context=96),
        reasoning_tokens=8,
        system="Sort.",
    )
    hand = VectorSpec(("x", "y"), ("m", "m"), (-1.0, -1.0), (1.0, 1.0))
    spec = PolicySpec(
        action=hand,
        state=hand,
        cameras=(CameraSpec("top", 28, 28),),
        goal=GoalSpec("text", examples=("put it there",), longest=400),
        horizon=4,
        step_s=0.05,
        sampler=SamplerSpec("ddim_clipped", "squaredcos", 3, 0.01, 100.0),
        reasoning=ReasoningSpec(tokens=8, every_s=0.05),
    )
    networks = DivlaNetworks(config)
    with torch.no_grad():  # reasonings must show in the actions
        for name, parameter in networks.named_parameters():
            if parameter.ndim > 1 and not name.startswith("vlm.model.visual"):
                parameter.normal_(std=0.5)
    scales = Statistics((0.0,) * 2, (1.0,) * 2, (-1.0,) * 2, (1.0,) * 2)
    weights = {name: value for name, value in networks.state_dict().items() if "lm_head" not in name}
    manifest = Manifest(
        FORMAT, path.name, "divla", "1", "Random weights.", "Apache-2.0", spec, asdict(config), dict(DEFAULT_TOLERANCE)
    )
    normalizer = Normalizer(scales, scales, clip=1.0)
    return write_bundle(path, manifest, normalizer=normalizer, weights=weights, tokenizer=tokenizer, gradients=False)


def _write_tiny_mode(path: Path, goal: Literal["text", "image"]) -> Bundle:
    torch.manual_seed(0)
    examples = ("open the drawer", "close the drawer")
    tokenizer = make_tokenizer(learn_merges(examples, 64)) if goal == "text" else None
    text = TextConfig(Tokenizer.from_str(tokenizer).get_vocab_size(), 32, 1, 2, 24, 16) if tokenizer else None
    vision = None if text else VisionConfig(32, 16, 32, 1, 2, 16)
    config = ModeConfig(
        TransformerConfig(3, 4, 32, 2, 4, goal_width=16, token_width=64), ImageConfig("resnet18", 8), text, vision
    )
    spec = PolicySpec(
        action=VectorSpec(("x", "y", "gripper"), ("m", "m", ""), (-1.0,) * 3, (1.0,) * 3),
        cameras=(CameraSpec("static", 48, 64), CameraSpec("wrist", 32, 32, "area", crop=0.9)),
        goal=GoalSpec("text", examples=examples)
        if text
        else GoalSpec("image", camera=CameraSpec("goal", 32, 32, "area")),
        horizon=4,
        step_s=0.05,
        sampler=SamplerSpec("ddim", "exponential", 3, 0.05, 1.0),
    )
    networks = ModeNetworks(config, [camera.name for camera in spec.cameras])
    networks.materialize()
    for name, parameter in networks.named_parameters():
        # Images, goals and noise levels must all show in the actions.
        if name.startswith("denoiser"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "film" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("bias") else 0.0, std=0.2)
    tolerance = {**DEFAULT_TOLERANCE, "int8": 0.1} if text else DEFAULT_TOLERANCE
    manifest = Manifest(
        FORMAT, path.name, "mode", "1", "Random weights.", "Apache-2.0", spec, asdict(config), dict(tolerance)
    )
    return write_bundle(path, manifest, weights=networks.state_dict(), tokenizer=tokenizer, gradients=False)


def _write_tiny(path: Path, *, window: int, horizon: int) -> Bundle:
    torch.manual_seed(0)
    config = BesoConfig(4, 2, 16, 1, 2, goal_length=1, window=window, horizon=horizon, zeroed_goal_dims=(2, 3))
    network = make_denoiser(config)
    with torch.no_grad():  # weights of such a size that steps, guidance and goals all show in the actions
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    spec = PolicySpec(
        action=VectorSpec(("fx", "fy"), ("N", "N"), (-1.0, -1.0), (1.0, 1.0)),
        state=VectorSpec(("x", "y", "vx", "vy"), ("m", "m", "m/s", "m/s")),
        goal=GoalSpec("state", 1, required=False),
        horizon=horizon,
        step_s=0.05,
        window=window,
        sampler=SamplerSpec("ddim", "exponential", 3, 0.05, 1.0),
    )
    normalizer = Normalizer(
        Statistics((0.1,) * 4, (1.1,) * 4, (-3.0,) * 4, (3.0,) * 4),
        Statistics((0.0,) * 2, (0.3,) * 2, (-0.9,) * 2, (0.9,) * 2),
    )
    manifest = Manifest(
        FORMAT, path.name, "beso", "1", "Random weights.", "Apache-2.0", spec, asdict(config), dict(DEFAULT_TOLERANCE)
    )
    return write_bundle(path, manifest, normalizer=normalizer, weights=network.state_dict())


class RunningServer:
    """A `policy-server serve` process of its own, reached over real sockets."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self._log = log
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.websocket_url = f"ws://127.0.0.1:{port}"

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask it to stop, as an operator would, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Pull the plug."""
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()


Launch = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def server(tiny_bundle: Bundle, tiny_step_bundle: Bundle, camera_bundle: Bundle) -> Iterator[RunningServer]:
    """One server for all tests that do not stop it: policies tiny (default), tiny-step and camera."""
    with launched(tiny_bundle.path, tiny_step_bundle.path, camera_bundle.path, "--engine", "onnx") as running:
        yield running


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start servers of one's own: launch(bundle_path, ..., "--option", "value", env={...})."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(launched(*arguments, **options))


@contextlib.contextmanager
def launched(*arguments: object, env: dict[str, str] | None = None) -> Iterator[RunningServer]:
    port = free_port()
    command = [sys.executable, "-m", "policy_server", "serve", "--port", str(port), "--threads", "1"]
    # A file and not a pipe: nobody reads along, and a full pipe would stop the server.
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], env={**os.environ, **(env or {})}, stdout=log, stderr=subprocess.STDOUT
        )
        running = RunningServer(process, port, Path(log.name))
        try:
            _wait_until_ready(running)
            yield running
        finally:
            if process.poll() is None:
                running.kill()


def _wait_until_ready(running: RunningServer, timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        if running.process.poll() is not None:
            raise RuntimeError(f"the server ended with {running.process.returncode}:\n{running.log()}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{running.url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError("the server did not become ready")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
