"""Starts the gateway, and stops it without dropping what is being answered."""

import ctypes
import gc
import logging
import socket
import sys
import time
from types import FrameType

import uvicorn

from policy_server.catalog import load_catalog
from policy_server.errors import StartupError
from policy_server.gateway.app import create_app
from policy_server.gateway.traffic import Traffic
from policy_server.settings import Settings

logger = logging.getLogger(__name__)

# A run of the engine ends for its thread only once the event loop lets it go on in Python. With the 5 ms that Python
# grants a thread, a burst of messages makes engines wait for longer than runs of small networks take.
_SWITCH_S = 1e-4


class DrainingServer(uvicorn.Server):
    """On the first signal: takes nothing new, finishes what runs, then stops. On the second: stops."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, drain_s: float) -> None:
        super().__init__(config)
        self._traffic = traffic
        self._drain_s = drain_s
        self._drain_until_s = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; called by uvicorn for SIGINT and SIGTERM."""
        if self._traffic.draining:
            super().handle_exit(sig, frame)
        self._traffic.draining = True
        self._drain_until_s = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn whether to stop; called ten times a second."""
        if self._traffic.draining and (not self._traffic.in_flight or time.monotonic() > self._drain_until_s):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: Settings) -> None:
    """Load the policies, then serve until told to stop; raises StartupError if they cannot be served."""
    _check_address(settings.host, settings.port)
    catalog = load_catalog(settings)
    traffic = Traffic()
    config = uvicorn.Config(
        create_app(catalog, settings, traffic),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=settings.max_message_bytes,
        ws_per_message_deflate=False,  # costs 10 ms a message and saves nothing on images
        timeout_graceful_shutdown=2,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    # What is loaded now lives as long as the process: the collector need not walk it while robots wait.
    gc.collect()
    gc.freeze()
    _keep_freed_memory()
    sys.setswitchinterval(_SWITCH_S)
    try:
        DrainingServer(config, traffic, settings.drain_s).run()
    finally:
        catalog.close()


def _check_address(host: str, port: int) -> None:
    """Raise StartupError if nobody can listen there: better now than after the policies were loaded."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _keep_freed_memory(limit_bytes: int = 128 << 20) -> None:
    """Keep what a message's images leave free for the next message.

    Left alone, glibc may hand it back to the system after every message, and fault it in page by page for the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc has it
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, limit_bytes)
