"""Lets in who has a key."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from policy_server.errors import Unauthorized

_TENANT = "policy_server.tenant"
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
            if scope["type"] != "lifespan":
                scope[_TENANT] = hashlib.sha256(_credential(Headers(scope=scope))).hexdigest()[:12]
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
    got = _credential(headers)
    # Every key is compared, and in constant time: how long a refusal takes tells nothing about any key.
    matches = [hmac.compare_digest(got, key.encode()) for key in keys]
    return any(matches)


def tenant_of(scope: Scope) -> str:
    """Return who pays for a request: its key, without saying which; without keys, the address that it comes from."""
    tenant: str | None = scope.get(_TENANT)
    return tenant or (scope.get("client") or ("",))[0]


def _credential(headers: Headers) -> bytes:
    """Return the key that a request brings, empty for none."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    got = credential.strip().encode()
    if scheme.lower() == "basic":
        return _password(got)
    return got if scheme.lower() in ("api-key", "bearer") else b""


def _password(credential: bytes) -> bytes:
    """Return the password of HTTP Basic credentials: how a browser gets to the pages, under any user name."""
    try:
        return base64.b64decode(credential, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
