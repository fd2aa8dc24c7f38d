"""A policy server of one's own, for as long as a simulation lasts."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_START_S, _STOP_S = 300.0, 15.0


@contextlib.contextmanager
def local_server(bundle: Path) -> Iterator[str]:
    """Run `policy-server serve` on a free port while the context lasts, quietly.

    Yields:
        Its websocket address, once it is ready.

    Raises:
        RuntimeError: It ended, or did not become ready; the message holds the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "policy_server", "serve", str(bundle), "--port", str(port)]
    # A file and not a pipe: nobody reads along, and a full pipe would stop the server.
    with (
        tempfile.TemporaryFile() as log,
        # Out of the terminal's process group: Ctrl-C is for the simulation, which stops the server itself.
        subprocess.Popen(command, stdout=log, stderr=log, process_group=0) as process,
    ):
        try:
            if not _becomes_ready(port, process):
                log.seek(0)
                raise RuntimeError(f"the server did not become ready: {log.read().decode(errors='replace')[-2000:]}")
            yield f"ws://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _becomes_ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False
