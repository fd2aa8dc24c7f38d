"""What an operator decides, resolved once before anything starts."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from policy_server.errors import StartupError


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    Attributes:
        bundles: Folders of the bundles to serve.
        default_policy: Name of the policy behind "/"; empty for the first bundle.
        engine: An engine's name, or "auto".
        threads: Threads per engine; 0 takes one for small networks, else what the engine's library likes.
        host: Address to listen on.
        port: Port to listen on; 0 lets the system choose.
        triton_urls: gRPC addresses, host:port, of the Triton servers that run the policies with engine "triton".
        triton_wait_s: Longest wait for Triton at start.
        api_keys: Keys that are let in; empty lets everybody in.
        admin_keys: Keys that may also change what is served; empty lets only this machine do so, on a server that no
            other machine can reach.
        insecure: Allows an address beyond this machine without keys.
        max_message_bytes: Largest message, on every door.
        queue_capacity: Requests that may wait for one policy.
        request_timeout_s: Longest time for one chunk when the robot sends no budget of its own.
        continuity: How a chunk goes on from the one before where the robot names no way: "replace", "rtc", "ensemble"
            or "warm". Policies that do not denoise keep to "replace" in place of "rtc" and "warm".
        guard_mode: What happens to a chunk that breaks a limit of its spec: "clamp" or "refuse".
        guard_fallback: What a robot gets in place of a chunk that is withheld: "refuse" (an error), "last_good" or
            "hold".
        stream_grace_s: How long a streaming session waits for a robot whose connection broke.
        stream_capacity: Streaming sessions at the same time.
        drain_s: Longest wait for running requests at shutdown.
        ignore_unknown_inputs: Ignores inputs that a policy does not have instead of refusing them.
    """

    bundles: tuple[Path, ...]
    default_policy: str = ""
    engine: str = "auto"
    threads: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    triton_urls: tuple[str, ...] = ("127.0.0.1:8001",)
    triton_wait_s: float = 60.0
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    insecure: bool = False
    max_message_bytes: int = 16 << 20
    queue_capacity: int = 64
    request_timeout_s: float = 10.0
    continuity: str = "replace"
    guard_mode: Literal["clamp", "refuse"] = "clamp"
    guard_fallback: str = "refuse"
    stream_grace_s: float = 30.0
    stream_capacity: int = 1024
    drain_s: float = 10.0
    ignore_unknown_inputs: bool = False

    def __post_init__(self) -> None:
        if not self.bundles:
            raise StartupError("no bundle to serve; name at least one folder, such as models/zoo/point-maze")
        if not (self.api_keys or self.insecure or self.is_local):
            raise StartupError(
                f"{self.host} can be reached from other machines, and no API key is set. Set POLICY_SERVER_API_KEYS, "
                "or pass --insecure if everybody who can reach this port may use the robot's policy"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
