"""One Triton server, as it is asked."""

import logging

from grpc import RpcError, aio, insecure_channel
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from policy_server.engine.triton_control import ModelControl

logger = logging.getLogger(__name__)

# Left alone, gRPC waits ever longer between two attempts to connect, up to two minutes.
_CHANNEL: list[tuple[str, int]] = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
_CHANNEL += [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]


class TritonServer:
    """One Triton server.

    Attributes:
        url: Its gRPC address.
        outstanding: Requests that it has not answered yet.
        asked: How many it was sent since it was first known.
        is_up: Whether requests are sent to it.
        control: Which models it has loaded.
        blocking: Asks it, and blocks.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.control = ModelControl(url)
        self.outstanding = 0
        self.asked = 0
        self.is_up = True
        self._reason = ""
        self.blocking = GRPCInferenceServiceStub(insecure_channel(url, options=_CHANNEL))
        self._stub: GRPCInferenceServiceStub | None = None

    @property
    def stub(self) -> GRPCInferenceServiceStub:
        """Asks it from the event loop, on which this is first asked for."""
        # Not tritonclient's own client: that takes 0.1 ms longer over every request.
        if self._stub is None:
            self._stub = GRPCInferenceServiceStub(aio.insecure_channel(self.url, options=_CHANNEL))
        return self._stub

    def leave_out(self, reason: str) -> None:
        """Send it nothing until it was looked after."""
        if self.is_up or reason != self._reason:
            logger.warning("Triton at %s is left out: %s", self.url, reason)
        self.is_up, self._reason = False, reason


def reason_of(error: RpcError) -> str:
    """Return in one line why a server did not answer."""
    return (error.details() or "no reason given").strip().partition("\n")[0]
