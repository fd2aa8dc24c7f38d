"""Lets in who has a key."""

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from policy_server.errors import Unauthorized

# Probes of orchestrators carry no keys, and learn nothing here.
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})


class ApiKeys:
    """ASGI middleware that refuses requests and websocket upgrades without a valid API key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401; on a websocket that is the answer to the upgrade."""
        # A websocket to the same path is no probe: every path leads to a policy.
        is_probe = scope["type"] == "http" and scope["path"] in _OPEN_PATHS
        if scope["type"] == "lifespan" or is_probe or admits(Headers(scope=scope), self._keys):
            await self._app(scope, receive, send)
            return
        error = Unauthorized()
        response = JSONResponse(
            {"error": {"code": error.code, "message": str(error)}},
            status_code=error.status,
            headers={"WWW-Authenticate": 'Basic realm="the password is an API key", Bearer, Api-Key'},
        )
        await response(scope, receive, send)


def admits(headers: Headers, keys: Sequence[str]) -> bool:
    """Return whether a request with these headers brings one of `keys`."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    got = credential.strip().encode()
    if scheme.lower() == "basic":
        got = _password(got)
    elif scheme.lower() not in ("api-key", "bearer"):
        return False
    # Every key is compared, and in constant time: how long a refusal takes tells nothing about any key.
    matches = [hmac.compare_digest(got, key.encode()) for key in keys]
    return any(matches)


def _password(credential: bytes) -> bytes:
    """Return the password of HTTP Basic credentials: how a browser gets to the pages, under any user name."""
    try:
        return base64.b64decode(credential, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
