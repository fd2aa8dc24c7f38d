"""Runs a real Triton server from the binary in NVIDIA's wheel nvidia-pytriton, where there is no container.

The wheel brings the server and its Python backend, and no other. It runs in this Python's virtual environment, which
must have numpy 1: the backend was compiled against it.
"""

import contextlib
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from policy_server.errors import EngineNotInstalled

_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Command:
    """A program to run: its words, and what it needs of the environment."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def server_command(
    repository: Path,
    backends: Path,
    *,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    host: str = "127.0.0.1",
    options: Sequence[str] = (),
) -> Command:
    """Return the command of a server over `repository`, whose models are loaded when somebody says so.

    Args:
        repository: Written by `policy-server export triton`.
        backends: A folder that is filled here with links: the wheel's backend and the stub of this Python.
        grpc_port: Where the gateway asks.
        http_port: Health, and KServe v2 over HTTP.
        metrics_port: Prometheus.
        host: Address to listen on.
        options: More options of `tritonserver`.

    Raises:
        EngineNotInstalled: The wheel is not installed, or has nothing for this Python.
    """
    site = Path(sysconfig.get_path("purelib"))
    wheel = site / "pytriton" / "tritonserver"
    binary = wheel / "bin" / "tritonserver"
    stub = wheel / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB
    if not (binary.exists() and stub.exists()):
        raise EngineNotInstalled(
            f"there is no Triton server for Python {sys.version_info.major}.{sys.version_info.minor} in {site}; "
            "pip install nvidia-pytriton there, or run NVIDIA's container"
        )
    # The backend wants the stub beside itself, and the wheel has one for each Python.
    (backends / "python").mkdir(parents=True, exist_ok=True)
    for file in (*(wheel / "backends" / "python").glob("*.*"), stub):
        with contextlib.suppress(FileExistsError):
            (backends / "python" / file.name).symlink_to(file)
    for program in (binary, stub):
        program.chmod(0o755)
    words = (
        str(binary),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        f"--http-address={host}",
        f"--grpc-address={host}",
        f"--metrics-address={host}",
        f"--grpc-port={grpc_port}",
        f"--http-port={http_port}",
        f"--metrics-port={metrics_port}",
        *options,
    )
    # The stub looks for its Python where PATH points first, and ignores PYTHONPATH.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    libraries = str(site / "nvidia_pytriton.libs")
    return Command(words, {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries})
