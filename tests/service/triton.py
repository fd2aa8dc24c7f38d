"""A real Triton server for tests, and what is exported for it."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import yaml
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from policy_models.normalizer import Normalizer
from policy_server.bundle import Bundle, load_bundle
from policy_server.export.bundle import write_bundle
from policy_server.export.triton_config import layout_of
from policy_server.export.triton_repo import export_policy
from tests.conftest import free_port
from tests.service.robot import PATIENCE_S

POLICIES = ("point-maze", "point-maze-step", "meta-world", "hold")
PYTHON = os.environ.get("TRITON_PYTHON", "")


class RunningTriton:
    """One Triton server, which can be killed and started again on the same ports."""

    def __init__(self, repository: Path, options: Sequence[str], log: IO[bytes]) -> None:
        self.repository = repository
        self.port, self._http_port, self._metrics_port = free_port(), free_port(), free_port()
        self.url = f"127.0.0.1:{self.port}"
        self._options = options
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.client = InferenceServerClient(self.url)

    def start(self) -> None:
        """Run it, and wait until it lives."""
        ports = ("--grpc-port", self.port, "--http-port", self._http_port, "--metrics-port", self._metrics_port)
        words = [PYTHON, "-m", "policy_server.triton", self.repository, *ports, *self._options]
        # A group of its own, so that its Python backends can be killed with it.
        self._process = subprocess.Popen(
            list(map(str, words)), stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        until_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(InferenceServerException):
                if self.client.is_server_live(client_timeout=1):
                    return
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"Triton did not start:\n{self.log()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Pull the plug."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def kill_model(self, model: str) -> None:
        """Kill the process that answers for a model, as a machine that is out of memory would."""
        found = subprocess.run(
            ["pgrep", "-f", f"stub.*{self.repository}/{model}/"], capture_output=True, text=True, check=False
        )
        for process_id in found.stdout.split():
            os.kill(int(process_id), signal.SIGKILL)

    def log(self) -> str:
        """What it has logged so far."""
        return Path(self._log.name).read_text(errors="replace")

    def ready_versions(self, model: str) -> list[str]:
        """Return the versions of a model that answer."""
        models = self.client.get_model_repository_index(as_json=True).get("models", [])
        return sorted(m["version"] for m in models if m["name"] == model and m.get("state") == "READY")


@contextlib.contextmanager
def running_triton(repository: Path, *options: str) -> Iterator[RunningTriton]:
    """Run a server over a repository for as long as the context lasts."""
    with tempfile.NamedTemporaryFile() as log:
        triton = RunningTriton(repository, options, log)
        try:
            triton.start()
            yield triton
        finally:
            triton.kill()
            triton.client.close()


def export(
    bundle: Bundle,
    repository: Path,
    target: str = "onnx",
    *,
    apart: bool = False,
    max_batch: int = 8,
    plans: Path | None = None,
) -> None:
    """Write a bundle's models into a repository."""
    layout = layout_of(bundle, target, plans=plans, apart=apart, max_batch=max_batch, instances=1, threads=1)
    export_policy(bundle, repository, layout)


def successor(bundle: Bundle, path: Path, *, speed: float = 0.5) -> Bundle:
    """Write the next version of a BESO bundle, whose actions differ: their scale is another."""
    from policy_server.engine.torch import load_weights

    normalizer = bundle.new_program().normalizer
    slower = replace(
        normalizer.action,
        min=tuple(speed * v for v in normalizer.action.min),
        max=tuple(speed * v for v in normalizer.action.max),
    )
    manifest = replace(bundle.manifest, version=str(int(bundle.manifest.version) + 1), files={})
    scaled: Normalizer = replace(normalizer, action=slower)
    return write_bundle(path, manifest, normalizer=scaled, weights=load_weights(bundle.weights), gradients=False)


def spoiled(bundle: Bundle, path: Path) -> Bundle:
    """Write a copy of a bundle whose golden case no engine can reproduce, with digests that say it is all right."""
    import hashlib
    import shutil

    shutil.copytree(bundle.path, path)
    with np.load(path / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["actions"] = golden["actions"] + 0.1
    np.savez_compressed(path / "golden.npz", **golden)
    manifest = yaml.safe_load((path / "policy.yaml").read_text())
    manifest["files"]["golden.npz"] = hashlib.sha256((path / "golden.npz").read_bytes()).hexdigest()
    (path / "policy.yaml").write_text(yaml.safe_dump(manifest))
    return load_bundle(path)


def tensor(name: str, array: np.ndarray, kind: str = "FP32") -> InferInput:
    """Return one input of a KServe request, the row axis included."""
    made = InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made
