"""The gateway: one ASGI application over the loaded policies."""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send

from policy_server import __version__
from policy_server.catalog import Catalog, ServedPolicy
from policy_server.errors import MalformedMessage, PolicyServerError, Unavailable
from policy_server.gateway.admin import make_admin_router
from policy_server.gateway.auth import ApiKeys, tenant_of
from policy_server.gateway.http import make_router
from policy_server.gateway.openpi import serve_openpi
from policy_server.gateway.report import describe
from policy_server.gateway.stream.door import serve_stream
from policy_server.gateway.stream.sessions import StreamSessions
from policy_server.gateway.traffic import Traffic
from policy_server.settings import Settings

_DESCRIPTION = """\
Observations in, chunks of future actions out.

* `GET /v1/policies` lists what is served; `GET /v1/policies/{name}` says what one needs, with units and an example.
* `POST /v1/policies/{name}/act` answers one observation, in JSON or msgpack.
* `ws://.../v1/policies/{name}/stream` takes observations at any rate, and sends chunks that go on from one another.
* `ws://.../` and `ws://.../v1/policies/{name}/openpi` speak the openpi websocket protocol: its clients work unmodified.
"""


def create_app(catalog: Catalog, settings: Settings, traffic: Traffic) -> FastAPI:
    """Return the application; the caller keeps and closes the catalog."""
    # Like FastAPI(), with the scripts of its pages on board: robots often live where no internet is.
    app = FastAPIOffline(title="Robot policy server", version=__version__, description=_DESCRIPTION, redoc_url=None)
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=(*settings.api_keys, *settings.admin_keys))
    app.include_router(make_router(catalog, traffic, settings.max_message_bytes))
    app.include_router(make_admin_router(catalog, settings))

    streams = StreamSessions(traffic, grace_s=settings.stream_grace_s, capacity=settings.stream_capacity)

    async def openpi(receive: Receive, send: Send, policy: ServedPolicy, tenant: str) -> None:
        await serve_openpi(receive, send, policy, traffic, tenant)

    async def stream(receive: Receive, send: Send, policy: ServedPolicy, tenant: str) -> None:
        await serve_stream(receive, send, policy, streams, tenant, settings.max_message_bytes)

    app.router.routes += [
        WebSocketRoute("/v1/policies/{name}/openpi", _Door(catalog, openpi)),
        WebSocketRoute("/v1/policies/{name}/stream", _Door(catalog, stream)),
        WebSocketRoute("/{path:path}", _Door(catalog, openpi)),
    ]

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(PolicyServerError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(Exception)
    async def report(request: Request, error: Exception) -> JSONResponse:
        return _error_response(error)

    return app


Protocol = Callable[[Receive, Send, ServedPolicy, str], Awaitable[None]]


class _Door:
    """The ASGI application behind every websocket: finds the policy, then lets its protocol speak."""

    def __init__(self, catalog: Catalog, protocol: Protocol) -> None:
        self._catalog = catalog
        self._protocol = protocol

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            policy = self._policy(scope["path_params"])
        except (PolicyServerError, HTTPException) as error:
            await _error_response(error)(scope, receive, send)
            return
        await self._protocol(receive, send, policy, tenant_of(scope))

    def _policy(self, parameters: dict[str, str]) -> ServedPolicy:
        # openpi's server takes any path, and some robots send one; but a misspelt policy must not get another one.
        path = parameters.get("path", "")
        if path.startswith("v1/"):
            raise HTTPException(404, f"there is nothing at /{path}")
        return self._catalog[parameters.get("name", self._catalog.default)]


def _error_response(error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        details = error.errors()[0]
        error = MalformedMessage(f"{'.'.join(map(str, details['loc']))!r}: {details['msg']}")
    if isinstance(error, HTTPException):
        code = "wrong_method" if error.status_code == 405 else "no_such_address"
        message, status = str(error.detail), error.status_code
    else:
        code, text = describe(error)
        message = text.removeprefix(f"{code}: ")
        status = error.status if isinstance(error, PolicyServerError) else 500
    headers = {"Retry-After": "1"} if isinstance(error, Unavailable) else None
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status, headers=headers)
