"""Servers under measurement, each in a process of its own on 127.0.0.1."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.settings import ROOT

HOST = "127.0.0.1"
_START_S, _STOP_S = 180.0, 15.0


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        port: Where it listens.
        process_id: Of its process.
        started_in_s: How long it took from the start of its process to its first answer.
    """

    port: int
    process_id: int
    started_in_s: float

    @property
    def url(self) -> str:
        """Where its websocket is."""
        return f"ws://{HOST}:{self.port}"

    def cpu_s(self) -> float:
        """Return the processor time that all its threads have used so far."""
        fields = Path(f"/proc/{self.process_id}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(arguments: Sequence[str], *, python_path: Sequence[Path] = ()) -> Iterator[Server]:
    """Run `python <arguments> --port N` for as long as the context lasts.

    Args:
        arguments: Of the interpreter that runs this, so that all servers have the same libraries.
        python_path: Folders that the server imports from besides.

    Yields:
        The server, once `/healthz` answers.

    Raises:
        RuntimeError: The server ended or said nothing; the message holds the end of its log.
    """
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path))}
    with tempfile.TemporaryFile() as log:
        started_at_s = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *arguments, "--port", str(port)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            if not _answers(port, process):
                log.seek(0)
                raise RuntimeError(f"{' '.join(arguments)} did not start:\n{log.read().decode()[-2000:]}")
            yield Server(port, process.pid, time.monotonic() - started_at_s)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ours(bundle: Path) -> list[str]:
    """Return the arguments of this project's server."""
    return ["-m", "policy_server", "serve", str(bundle)]


def openpi_path(checkout: Path) -> tuple[Path, ...]:
    """Return where openpi's server finds itself; its own package would import jax."""
    return checkout / "src/openpi/serving", checkout / "packages/openpi-client/src"


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    give_up_at_s = time.monotonic() + _START_S
    while time.monotonic() < give_up_at_s and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/healthz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
