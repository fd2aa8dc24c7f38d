"""The openpi websocket protocol, byte for byte, so that its stock clients work unmodified.

One binary msgpack frame in, one out, strictly in order. An error is a text frame, then close code 1011. RoboArena's
dialect shares the socket: `endpoint` is "infer" or "reset", and `session_id` names the episode.
"""

import logging
import time
from typing import Any

from starlette.types import Receive, Send

from policy_client.codec import DecodeError, pack, unpack
from policy_server.catalog import ServedPolicy
from policy_server.errors import MalformedMessage
from policy_server.gateway.report import describe
from policy_server.gateway.traffic import Traffic
from policy_server.runtime.options import read_options
from policy_server.runtime.policy import PolicyRuntime
from policy_server.runtime.request import Request
from policy_server.runtime.session import Session

logger = logging.getLogger(__name__)

_RESET_DONE = "reset successful"  # RoboArena's server says it so


async def serve_openpi(receive: Receive, send: Send, policy: ServedPolicy, traffic: Traffic, tenant: str) -> None:
    """Serve one robot until it leaves, over the ASGI messages of its websocket."""
    await receive()  # the robot asks to be let in
    await send({"type": "websocket.accept"})
    connection = _Connection(policy.runtime, tenant)
    try:
        await _send(send, pack(policy.bundle.manifest.metadata or _description(policy)))
        while (message := await receive())["type"] == "websocket.receive":
            try:
                with traffic:
                    reply = await connection.answer(message.get("bytes"))
            except Exception as error:
                code, text = describe(error)
                await _send(send, text)
                await send({"type": "websocket.close", "code": 1011, "reason": code})
                return
            await _send(send, reply)
            connection.sent()
    except OSError:
        logger.debug("a robot left in mid-conversation")


async def _send(send: Send, frame: bytes | str) -> None:
    await send({"type": "websocket.send", "text" if isinstance(frame, str) else "bytes": frame})


class _Connection:
    """One robot's side of the conversation, without its socket."""

    def __init__(self, runtime: PolicyRuntime, tenant: str) -> None:
        self._runtime = runtime
        self._tenant = tenant
        self._session: Session = runtime.begin_session()
        self._episode: str | None = None
        self._received_at_s = 0.0
        self._previous_total_ms: float | None = None

    async def answer(self, data: bytes | None) -> bytes | str:
        """Return the frame that answers one frame: bytes for a chunk, text for a reset."""
        self._received_at_s = time.monotonic()
        observation = _decode(data)
        self._follow_episode(observation.pop("session_id", None))
        endpoint = observation.pop("endpoint", "infer")
        if not isinstance(endpoint, str) or endpoint not in ("infer", "reset"):
            raise MalformedMessage(f"'endpoint' is {endpoint!r}, expected 'infer' or 'reset'")
        if endpoint == "reset":
            self._session.reset()
            return _RESET_DONE
        options = read_options(observation.pop("options", None))
        chunk = await self._runtime.act(self._session, Request(observation, options, tenant=self._tenant))

        server_timing = {"infer_ms": 1e3 * (time.monotonic() - self._received_at_s)}
        if self._previous_total_ms is not None:
            server_timing["prev_total_ms"] = self._previous_total_ms
        # openpi's ActionChunkBroker slices every array of a reply along its first axis, so `actions` is the only one.
        return pack(
            {
                "actions": chunk.actions,
                "policy_timing": {"infer_ms": chunk.infer_ms},
                "server_timing": server_timing,
                "policy": self._runtime.name,
                "version": chunk.version,
                "engine": chunk.engine,
                "step_s": chunk.step_s,
                "seed": chunk.seed,
                "clamped": chunk.guard.clamped,
                **({} if chunk.thought is None else {"reasoning": chunk.thought.reasoning.text}),
            }
        )

    def sent(self) -> None:
        """Note that the reply is on its way: the next one reports how long this one took in all."""
        self._previous_total_ms = 1e3 * (time.monotonic() - self._received_at_s)

    def _follow_episode(self, session_id: Any) -> None:
        if session_id is None:
            return
        episode = str(session_id)
        if self._episode is not None and episode != self._episode:
            self._session.reset()
        self._episode = episode


def _decode(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise MalformedMessage("got a text frame, expected a binary frame with a msgpack map")
    try:
        observation = unpack(data)
    except DecodeError as error:
        raise MalformedMessage(str(error)) from error
    if not isinstance(observation, dict):
        raise MalformedMessage(f"got a message of type {type(observation).__name__}, expected a map")
    return observation


def _description(policy: ServedPolicy) -> dict[str, Any]:
    spec = policy.bundle.spec
    return {
        "policy": policy.bundle.name,
        "version": policy.bundle.manifest.version,
        "engine": policy.loaded.version.engine,
        "horizon": spec.horizon,
        "step_s": spec.step_s,
        "inputs": list(policy.loaded.version.inputs),
        "action": list(spec.action.names),
    }
